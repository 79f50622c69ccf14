"""Metrics for people who watch them in TensorBoard or Weights & Biases; both are optional."""

from importlib import import_module
from pathlib import Path
from types import ModuleType

from demo2eval.errors import UserError
from demo2eval.provenance import sha256_text


class Tracker:
    """Takes the values of each step, and keeps none of them."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Take the values of a step."""

    def close(self) -> None:
        """Write what was not written yet."""


class TensorBoard(Tracker):
    """Writes events below <run>/tensorboard."""

    def __init__(self, run: Path, step: int):
        """Begin a file whose reader forgets what another file has after `step`."""
        self._writer = _import("tensorboardX", "tensorboard").SummaryWriter(
            str(run / "tensorboard"), purge_step=step + 1, filename_suffix=f".{step}"
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Write a point of each curve."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        """Write what was not written yet."""
        self._writer.close()


class WeightsAndBiases(Tracker):
    """Logs to a run in the project demo2eval, which takes no step twice."""

    def __init__(self, run: Path, settings: dict):
        """Begin, or go on with, the run of this folder."""
        self._run = _import("wandb", "wandb").init(
            project="demo2eval",
            name=run.name,
            id=f"{run.name}-{sha256_text(str(run.absolute()))[:8]}",
            resume="allow",
            config=settings,
            dir=str(run),
        )

    def log(self, step: int, values: dict[str, float]) -> None:
        """Log a point of each curve."""
        self._run.log(values, step=step)

    def close(self) -> None:
        """Send what was not sent yet."""
        self._run.finish()


def open_tracker(name: str | None, run: Path, settings: dict, step: int) -> Tracker:
    """Return a tracker; a job that goes on writes into the same curve.

    Args:
        name: "tensorboard", "wandb" or None.
        run: folder of the run, results/<run>.
        settings: to show beside the curve.
        step: number of steps that were done.

    Raises:
        UserError: if the tracker is not installed.
    """
    if name == "tensorboard":
        return TensorBoard(run, step)
    if name == "wandb":
        run.mkdir(parents=True, exist_ok=True)
        return WeightsAndBiases(run, settings)
    return Tracker()


def _import(package: str, tracker: str) -> ModuleType:
    try:
        return import_module(package)
    except ImportError as error:
        raise UserError(
            f"training.tracker {tracker} needs the package {package}: uv sync --inexact --extra "
            f"{tracker} (.tools/uv, if `make setup` fetched it), or set training.tracker to null."
        ) from error
