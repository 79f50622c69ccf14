"""How far a checkpoint's actions are from the demonstrations', at looks that it was trained on and at looks that were held out.

In:  the manifest of a checkpoint, and that of the training cache of its dataset.
Out: <output without .json>.csv: for the looks of each set, training and num_val_demos, and each action dimension the mean and the 95 % quantile
     of the absolute error over the actions that an evaluation would execute, in the environment's units (radians for joint targets).

Looks are spread evenly over a set, and the policy answers them as in a rollout, without noise on the state. The same error on both sets
says that more training may help; one that is much larger where it was held out says that more demonstrations may.
"""

import csv
import io
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo2eval.cli import option, run, settings_from, stage_parser
from demo2eval.data.chunks import chunk_rows, last_rows
from demo2eval.errors import UserError
from demo2eval.provenance import StageJob, run_stage, read_manifest, write_atomic

COLUMNS = ("set", "dimension", "looks", "mean_abs_error", "q95_abs_error")
BATCH_SIZE = 32


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the errors, given the checkpoint."""

    num_val_demos: int = option("demonstrations at the dataset's end that were not trained on")
    looks: int = option("looks of each set", 512)
    replan_steps: int = option(
        "actions of a chunk that count, as many as an evaluation executes", 5
    )
    num_steps: int = option("Euler steps from noise to actions", 10)
    policy_seed: int = option("seed of the policy's noise", 0)


def looks_of_sets(episode: np.ndarray, settings: Settings) -> dict[str, np.ndarray]:
    """Return {"training": looks, "num_val_demos": looks}, each spread evenly over its set.

    Args:
        episode: [looks] the demonstration of each look, ascending.
    """
    from demo2eval.data.loader import trained_looks

    border = trained_looks(episode, settings.num_val_demos)
    sets = {"training": np.arange(border), "num_val_demos": np.arange(border, len(episode))}
    return {
        name: looks[:: max(1, len(looks) // settings.looks)][: settings.looks]
        for name, looks in sets.items()
        if len(looks)
    }


def errors_at(policy, cache: Path, looks: np.ndarray, settings: Settings) -> np.ndarray:
    """Return |policy's action - demonstration's action|, float [looks, replan_steps, action width]."""
    row_of, episode, state, action = (
        np.load(cache / f"{name}.npy") for name in ("look_row", "episode", "state", "action")
    )
    cameras = set(policy.description.cameras.values())
    pictures = {
        camera: np.load(cache / f"images_{camera}.npy", mmap_mode="r") for camera in cameras
    }
    rows = row_of[looks]
    wanted = action[chunk_rows(rows, last_rows(episode), settings.replan_steps)]
    observations = [
        {"images": {camera: pictures[camera][look] for camera in cameras}, "state": state[row]}
        for look, row in zip(looks, rows, strict=True)
    ]
    noise = [policy.noise(settings.policy_seed, int(look), 0) for look in looks]
    return np.abs(policy.act(observations, noise)[:, : settings.replan_steps] - wanted)


def action_error(settings: Settings, checkpoint: Path, cache: Path, output: Path) -> None:
    """Measure the checkpoint of a manifest and write the manifest `output`.

    Raises:
        UserError: if the cache is not of the dataset that the checkpoint was trained on.
    """
    inputs = {"checkpoint": checkpoint, "cache": cache}
    with run_stage(
        output, stage="action_error", module=__spec__.name, settings=settings, inputs=inputs
    ) as job:
        if not job.reused:
            _make(settings, checkpoint, cache, job)


def _make(settings: Settings, checkpoint: Path, cache: Path, job: StageJob) -> None:
    from demo2eval.evaluation.policy import Policy

    manifest = read_manifest(checkpoint)
    if read_manifest(cache)["inputs"]["dataset"][0]["digest"] != manifest["metadata"]["dataset"]:
        raise UserError(
            f"{checkpoint} was not trained on the dataset of {cache}; give the cache of its own dataset."
        )
    policy = Policy(checkpoint.with_suffix(""), num_steps=settings.num_steps, batch_size=BATCH_SIZE)
    episode = np.load(cache.parent / "episode.npy")[np.load(cache.parent / "look_row.npy")]
    text, means = io.StringIO(), {}
    table = csv.writer(text, lineterminator="\n")
    table.writerow(COLUMNS)
    for name, looks in looks_of_sets(episode, settings).items():
        errors = errors_at(policy, cache.parent, looks, settings)
        means[name] = [round(float(value), 6) for value in errors.mean(axis=(0, 1))]
        for dimension, mean in enumerate(means[name]):
            table.writerow(
                [
                    name,
                    dimension,
                    len(looks),
                    mean,
                    round(float(np.quantile(errors[..., dimension], 0.95)), 6),
                ]
            )
        print(
            f"{name}: mean error of {len(looks)} looks "
            + ", ".join(f"{value:.4f}" for value in means[name])
        )
    target = job.output.with_suffix(".csv")
    write_atomic(target, text.getvalue())
    job.finish([target], step=manifest["metadata"]["step"], mean_abs_error=means)


def main() -> None:
    """Run the stage from the command line."""
    parser = stage_parser(__doc__, Settings)
    parser.add_argument("--checkpoint", type=Path, required=True, help="manifest of the checkpoint")
    parser.add_argument(
        "--cache", type=Path, required=True, help="manifest of the training cache of its dataset"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="manifest to write, <run>/action_errors/<step>.json",
    )
    arguments = parser.parse_args()
    action_error(
        settings_from(arguments, Settings), arguments.checkpoint, arguments.cache, arguments.output
    )


if __name__ == "__main__":
    run(main)
