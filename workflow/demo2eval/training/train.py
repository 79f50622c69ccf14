"""Training from one checkpoint to the next.

In:  the manifest of the checkpoint before (its weights, training state and assets), and that of the
     image cache.
Out: <output without .json>/params (the EMA weights if there is EMA), assets/, train_state/ and
     metrics.csv with a row for each step.

Batches and noise of a step follow from the seed and the step's number alone, so a resumed training
is the uninterrupted one. On the way the state is saved every `training.save_minutes`, and when the
job is told to stop (SIGTERM). The same job goes on from there.
"""

import os
import shutil
import signal
import sys
import threading
import time
from pathlib import Path

from demo2eval.checkpoints.policy_metadata import read_policy_metadata
from demo2eval.checkpoints.verify import verify_checkpoint
from demo2eval.cli import run
from demo2eval.config import Actions, Training
from demo2eval.errors import UserError
from demo2eval.provenance import StageJob, read_manifest
from demo2eval.training.processes import fetch, is_first, run_stage_together, wait_for_all

STOPPED = 143
"""Exit status of a job that was told to stop and saved its state; Snakemake tries it again."""


def train(
    previous: Path,
    image_cache: Path,
    output: Path,
    *,
    step: int,
    seed: int = 0,
    training: Training = Training(),
    actions: Actions = Actions(),
) -> None:
    """Train from the checkpoint before to a step.

    Args:
        previous: manifest of the checkpoint before.
        image_cache: manifest of the image cache.
        output: manifest to write, <run>/checkpoints/<step>.json.
        step: training step of the checkpoint to make.
        seed: seed of batches, noise and augmentation.
        training: settings of the optimization.
        actions: settings of the actions, of which state_noise counts here.

    Raises:
        UserError: if the checkpoint before is not before, or not what its manifest says; if the
            training diverges, or does not fit into the device's memory.
    """
    settings = {
        "step": step,
        "seed": seed,
        "training": training,
        "state_noise": actions.state_noise,
    }
    inputs = {"previous": previous, "image_cache": image_cache}
    with run_stage_together(
        output, stage="train", module=__spec__.name, settings=settings, inputs=inputs
    ) as job:
        if not job.reused:
            _train(job, previous, image_cache, step, seed, training, actions.state_noise)
        if is_first():
            prune_checkpoints(output.parent, step, training.keep_period)


def _train(
    job: StageJob,
    previous: Path,
    image_cache: Path,
    step: int,
    seed: int,
    training: Training,
    state_noise: float,
) -> None:
    from demo2eval.training.budget import JAX_SHARE, plan_step

    # Else JAX takes three quarters of a GPU's memory.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(JAX_SHARE))
    import jax

    from demo2eval.checkpoints.openpi import save_params
    from demo2eval.data.loader import BatchLoader
    from demo2eval.pi0.params import round_params, unflatten
    from demo2eval.training.optimizer import make_optimizer, make_schedule
    from demo2eval.training.sharding import make_mesh
    from demo2eval.training.state import StateSaver, init_train_state, tree_digest
    from demo2eval.training.tracker import open_tracker
    from demo2eval.training.trainer import (
        Metrics,
        SavedStates,
        Stopped,
        Trainer,
        device_memory,
        saved_step,
    )

    metadata = read_manifest(previous)["metadata"]
    if metadata["step"] >= step:
        raise UserError(
            f"{previous} is of step {metadata['step']}, not before {step}; give the checkpoint "
            "before."
        )
    saver = StateSaver()
    saved = SavedStates(job.partial / "saved", saver)
    first = saved_step(saved.newest) if saved.newest else metadata["step"]
    is_fresh = saved.newest is None and first > 0
    source = verify_checkpoint(previous, "params", *(["train_state"] if is_fresh else []))
    config = read_policy_metadata(source).config
    schedule = make_schedule(
        training.warmup_steps, training.peak_lr, training.decay_steps, training.decay_lr
    )
    optimizer = make_optimizer(schedule, training.clip_gradient_norm, training.weight_decay)
    loader = BatchLoader.for_policy(
        image_cache.parent, source, state_noise=state_noise, num_val_demos=training.num_val_demos
    )
    plan = plan_step(
        config,
        training,
        loader.num_cameras,
        devices=jax.device_count(),
        memory=device_memory(),
    )
    print(plan, file=sys.stderr)
    mesh = make_mesh(training.fsdp_devices)
    state, host_ema = init_train_state(
        source,
        first,
        config,
        optimizer,
        training.ema_decay,
        mesh=mesh,
        saved=saved.newest,
        ema_on_host=plan.ema_on_host,
    )
    stop = threading.Event()
    trainer = Trainer(config, training, optimizer, schedule, mesh, plan, loader, seed, stop)
    metrics = Metrics(None, first)
    if is_first():
        tracker = open_tracker(training.tracker, job.folder.parent, job.settings, first)
        metrics = Metrics(job.partial / "metrics.csv", first, tracker)
    started = time.monotonic()
    before = signal.signal(signal.SIGTERM, lambda *_: stop.set())
    try:
        state = trainer.train(state, host_ema, range(first, step), metrics, saved)
    except Stopped as stopped:
        saver.wait()
        # srun kills the other processes when the first one ends.
        wait_for_all("stopped")
        print(
            f"told to stop at step {stopped}, which is saved; the same command goes on from there.",
            file=sys.stderr,
        )
        sys.exit(STOPPED)
    finally:
        saved.wait()
        signal.signal(signal.SIGTERM, before)
        metrics.close()
    seconds = time.monotonic() - started
    finished = job.partial / job.output.stem
    if is_first():
        shutil.rmtree(finished, ignore_errors=True)
    wait_for_all("trained")
    average = host_ema.arrays if host_ema else state.ema
    is_rounded = training.params_dtype == "bfloat16"
    # Else the weights of the checkpoint hold the average.
    saver.save(finished / "train_state", state, average if is_rounded else None)
    eval_params = fetch((average or state.params) | state.frozen)
    if is_rounded:
        eval_params = round_params(eval_params)
    eval_params = unflatten(eval_params)
    save_params(finished / "params", eval_params)
    saver.wait()
    if not is_first():
        return
    rate = training.batch_size * (step - first) / seconds
    print(
        f"trained steps {first} to {step} in {seconds:.0f} s, {rate:.1f} samples/s",
        file=sys.stderr,
    )
    shutil.copytree(source / "assets", finished / "assets")
    shutil.copy(job.partial / "metrics.csv", finished / "metrics.csv")
    (folder,) = job.publish(finished.name)
    outputs = [folder / "assets", folder / "metrics.csv"]
    job.finish(
        outputs,
        kept=outputs,
        removable=[folder / "params", folder / "train_state"],
        digest=tree_digest(eval_params),
        step=step,
        training_time_s=round(seconds, 3),
        samples_per_s=round(rate, 2),
        step_plan=str(plan),
        device=jax.devices()[0].device_kind,
        num_devices=jax.device_count(),
        dataset=metadata["dataset"],
    )


def prune_checkpoints(checkpoints: Path, step: int, keep_period: int | None) -> list[Path]:
    """Remove what checkpoints before `step` hold and nobody needs; manifests stay.

    That is their training states, and the weights of those that were evaluated and are no multiple
    of `keep_period`. Returns the folders that are gone.
    """
    unneeded = []
    for folder in checkpoints.iterdir():
        if not folder.name.isdigit() or int(folder.name) >= step:
            continue
        unneeded.append(folder / "train_state")
        evaluated = (checkpoints.parent / f"rollouts/{folder.name}.json").exists()
        if keep_period is not None and int(folder.name) % keep_period and evaluated:
            unneeded.append(folder / "params")
    removed = sorted(folder for folder in unneeded if folder.exists())
    for folder in removed:
        shutil.rmtree(folder, ignore_errors=True)
    return removed


if __name__ == "__main__":
    run(train)
