"""The training loop: compiled steps, the moving average, metrics, and saves on the way."""

import csv
import dataclasses
import os
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import jax
import numpy as np
import optax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from tqdm import tqdm

from demo2eval.config import Training
from demo2eval.data.loader import BatchLoader, prefetch
from demo2eval.errors import UserError
from demo2eval.pi0.config import Pi0Config
from demo2eval.pi0.tokenizer import padding_mask
from demo2eval.provenance import sha256_folder, write_atomic
from demo2eval.training.budget import PEAK_FLOPS, StepPlan, flops_per_sample
from demo2eval.training.host_ema import HostEma
from demo2eval.training.processes import any_process, is_first, wait_for_all
from demo2eval.training.sharding import AXES, process_rows, shard_state
from demo2eval.training.state import StateSaver, TrainState
from demo2eval.training.step import compute_gradients, update_state
from demo2eval.training.tracker import Tracker

LOG_INTERVAL = 20
COLUMNS: tuple[str, ...] = ("step", "loss", "grad_norm", "learning_rate")


class Stopped(Exception):
    """The job was told to stop; its state is saved."""


class Metrics:
    """metrics.csv, a row for each step, none twice and none missing."""

    def __init__(self, path: Path | None, step: int, tracker: Tracker | None = None):
        """Open a file that may hold rows already; those after `step` are dropped.

        Args:
            path: of the file; None: rows go nowhere.
            step: number of steps that were done.
            tracker: takes every row too.
        """
        self._tracker = tracker or Tracker()
        header = ",".join(COLUMNS) + "\n"
        if path is not None:
            rows = path.read_text().splitlines(keepends=True)[1:] if path.exists() else []
            kept = [row for row in rows if row.endswith("\n") and int(row.split(",", 1)[0]) <= step]
            # A kill before the first new row must not lose the old ones.
            write_atomic(path, header + "".join(kept))
        self._file = open(path or os.devnull, "a", newline="")  # noqa: SIM115
        self._table = csv.DictWriter(self._file, COLUMNS, lineterminator="\n")

    def write(self, rows: list[dict]) -> None:
        """Append rows, and see to it that neither a kill nor a power cut loses any of them."""
        self._table.writerows(rows)
        self._file.flush()
        if self._file.name != os.devnull:
            os.fsync(self._file.fileno())
        for row in rows:
            self._tracker.log(row["step"], {name: row[name] for name in COLUMNS[1:]})

    def close(self) -> None:
        """Close the file and the tracker."""
        self._file.close()
        self._tracker.close()


class SavedStates:
    """Training states that were saved on the way to a checkpoint, the newest of which is kept.

    Each is a folder <step>-<hash of its files>, which gets this name when it is whole.
    """

    def __init__(self, folder: Path, saver: StateSaver):
        """Take the folder of the states, and remove what is not whole: cut short, or damaged."""
        self._folder, self._saver = folder, saver
        self._pool = ThreadPoolExecutor(1)
        self._saving: Future | None = None
        if is_first():
            folder.mkdir(parents=True, exist_ok=True)
            while (path := self.newest) and not path.name.endswith(f"-{sha256_folder(path)}"):
                print(
                    f"{path} is damaged: it is not what was saved. Training goes on from what is "
                    "before it.",
                    file=sys.stderr,
                )
                shutil.rmtree(path)
            self._remove_others()
        wait_for_all("saved states")

    @property
    def newest(self) -> Path | None:
        """The folder of the newest state, or None."""
        return max(self._folder.glob(f"*-{64 * '?'}"), key=saved_step, default=None)

    def _remove_others(self) -> None:
        newest = self.newest
        for path in self._folder.iterdir():
            if path != newest:
                shutil.rmtree(path)

    def save(self, step: int, state: TrainState, ema: dict | None) -> None:
        """Begin to save a state; the one before is removed when the next save begins."""
        self.wait()
        if is_first():
            self._remove_others()
        path = self._folder / str(step)
        self._saver.save(path, state, ema)
        self._saving = self._pool.submit(self._finish, path)

    def _finish(self, path: Path) -> None:
        self._saver.wait()
        if is_first():
            path.rename(f"{path}-{sha256_folder(path)}")

    def wait(self) -> None:
        """Wait until what `save` began is done."""
        if self._saving is not None:
            self._saving.result()


def saved_step(path: Path) -> int:
    """Return the step of a saved state from the name of its folder."""
    return int(path.name.partition("-")[0])


@dataclasses.dataclass
class Trainer:
    """What a training needs besides its state.

    Attributes:
        plan: how a step is computed.
        stop: set when the job is to stop.
    """

    config: Pi0Config
    training: Training
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    mesh: Mesh
    plan: StepPlan
    loader: BatchLoader
    seed: int
    stop: threading.Event

    def train(
        self,
        state: TrainState,
        host_ema: HostEma | None,
        steps: range,
        metrics: Metrics,
        saved: SavedStates,
    ) -> TrainState:
        """Train and return the last state.

        Args:
            host_ema: the moving average, if it is in the host's memory.
            steps: to do.
            metrics: where a row of each step goes.
            saved: where states are saved on the way.

        Raises:
            UserError: if the loss or the gradient is not finite.
            Stopped: after a save, if the job is told to stop.
        """
        step_function = self.compile_step(host_ema is not None)
        ema_decay = None if host_ema else self.training.ema_decay
        update = jax.jit(
            partial(update_state, self.optimizer, ema_decay),
            donate_argnums=0,
            out_shardings=(shard_state(self.mesh, state), None),
        )
        root_key, pending, progress = jax.random.key(self.seed), [], self._progress(steps)
        last_save, behind = time.monotonic(), False
        for step, batch in zip(steps, progress.watch(self._batches(steps)), strict=True):
            key = jax.random.fold_in(root_key, step)
            (losses, gradients), before = step_function(state.params, state.frozen, batch, key)
            state, values = update(state, losses, gradients)
            del gradients
            if host_ema and behind:
                host_ema.update(before)
            behind = True
            pending.append(values)
            done = step + 1
            is_last = done == steps.stop
            is_due, is_told = (False, False) if is_last else self._to_save(done, last_save)
            if done % LOG_INTERVAL and not is_last and not is_due:
                continue
            rows = self._fetch(pending, done)
            metrics.write(rows)
            progress.show(rows)
            pending.clear()
            if host_ema and (is_due or is_last):
                host_ema.update(jax.device_put(state.params, self._host))
                host_ema.wait()
                behind = False
            if is_due:
                saved.save(done, state, host_ema.arrays if host_ema else state.ema)
                last_save = time.monotonic()
                if is_told:
                    raise Stopped(done)
        progress.close()
        return state

    def _to_save(self, done: int, last_save: float) -> tuple[bool, bool]:
        """Return whether to save now, and whether because the job was told to stop.

        Several processes must do the same; they compare where they wait for the device anyhow.
        """
        minutes, is_told = self.training.save_minutes, self.stop.is_set()
        is_due = minutes is not None and time.monotonic() - last_save >= 60 * minutes
        if jax.process_count() > 1:
            if done % LOG_INTERVAL:
                return False, False
            is_due, is_told = any_process([is_due, is_told])
        return is_due or is_told, is_told

    def compile_step(self, copies_params: bool) -> Callable:
        """Return `compute_gradients` as a function of parameters, batch and key, compiled.

        Its second result is None, or the parameters that it was given, in the host's memory.
        """
        config = dataclasses.replace(self.config, remat=self.plan.remat)
        per_device = self.training.batch_size // self.mesh.size
        num_micro_batches = per_device // self.plan.micro_batch_size

        def function(params, frozen, batch, key):
            result = compute_gradients(
                config, self.training, self.mesh, num_micro_batches, params, frozen, batch, key
            )
            return result, jax.device_put(params, self._host) if copies_params else None

        on_gpu = jax.default_backend() == "gpu"
        return jax.jit(
            function,
            out_shardings=(None, self._host if copies_params else None),
            # For large products cuBLAS alone is faster than with Triton's beside it.
            compiler_options={"xla_gpu_enable_triton_gemm": False} if on_gpu else None,
        )

    @property
    def _host(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(), memory_kind="pinned_host")

    def _batches(self, steps: range) -> Iterator[dict]:
        sharding = NamedSharding(self.mesh, PartitionSpec(AXES))
        rows = process_rows(sharding, self.training.batch_size)

        def load() -> Iterator[dict]:
            for step in steps:
                batch = self.loader.load_batch(step, self.training.batch_size, self.seed, rows)
                batch["tokenized_prompt_mask"] = padding_mask(
                    batch["tokenized_prompt_mask"], self.config.discrete_state_input
                )
                yield jax.tree.map(partial(jax.make_array_from_process_local_data, sharding), batch)

        return prefetch(load(), depth=2)

    def _fetch(self, pending: list[dict], done: int) -> list[dict]:
        """Return the rows of the last steps, and refuse to go on from what is not finite."""
        rows = []
        first = done - len(pending)
        for index, values in enumerate(jax.device_get(pending)):
            step, loss, norm = first + index, float(values["loss"]), float(values["grad_norm"])
            if not np.isfinite([loss, norm]).all():
                episodes = self.loader.batch_episodes(step, self.training.batch_size, self.seed)
                raise UserError(
                    f"step {step + 1} has a loss of {loss} and a gradient norm of {norm}; lower "
                    "training.peak_lr, or look at the norm stats' ranges.csv. The batch was of "
                    f"episodes {', '.join(map(str, episodes[:20]))}"
                    f"{' and others' if len(episodes) > 20 else ''}."
                )
            rate = float(np.asarray(self.schedule(step)))
            values = (step + 1, loss, norm, rate)
            rows.append(dict(zip(COLUMNS, values, strict=True)))
        return rows

    def _progress(self, steps: range) -> "Progress":
        flops = flops_per_sample(
            self.config, self.loader.num_cameras, self.training.num_noise_samples
        )
        return Progress(steps, self.training.batch_size, flops)


class Progress:
    """A bar with samples and share of the device's peak (MFU), loss, and time waited for data."""

    def __init__(self, steps: range, batch_size: int, flops: float):
        """Take the steps to do, samples per step, and operations per sample."""
        kind = jax.devices()[0].device_kind
        peaks = [peak for name, peak in PEAK_FLOPS.items() if name in kind]
        self._peak = peaks[0] * jax.device_count() if peaks else None
        self._flops, self._batch_size = flops, batch_size
        self._waited, self._shown = 0.0, time.monotonic()
        self._bar = tqdm(
            initial=steps.start,
            total=steps.stop,
            unit="step",
            mininterval=2,
            desc="training",
            disable=not is_first(),
        )

    def watch(self, batches: Iterator[dict]) -> Iterator[dict]:
        """Yield batches and take the time that each is waited for."""
        while True:
            started = time.monotonic()
            batch = next(batches, None)
            self._waited += time.monotonic() - started
            if batch is None:
                return
            yield batch

    def show(self, rows: list[dict]) -> None:
        """Show the steps since the last call."""
        seconds = time.monotonic() - self._shown
        rate = self._batch_size * len(rows) / seconds
        fields = {"loss": f"{np.mean([row['loss'] for row in rows]):.4f}"}
        fields["grad_norm"] = f"{np.mean([row['grad_norm'] for row in rows]):.3g}"
        fields["samples/s"] = f"{rate:.1f}"
        if self._peak:
            fields["MFU"] = f"{100 * rate * self._flops / self._peak:.1f}%"
        fields["data"] = f"{100 * self._waited / seconds:.0f}%"
        self._bar.set_postfix(fields, refresh=False)
        self._bar.update(len(rows))
        self._waited, self._shown = 0.0, time.monotonic()

    def close(self) -> None:
        """End the bar's line."""
        self._bar.close()


def device_memory() -> int | None:
    """Return the bytes that JAX may use of each device, or None where there is no such limit."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit") if jax.default_backend() == "gpu" else None
