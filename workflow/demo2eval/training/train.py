"""Training from one checkpoint to the next.

In:  the manifest of the checkpoint before (its weights, training state and assets), and that of the
     image cache.
Out: <output without .json>/params (the EMA weights if there is EMA), assets/, train_state/ and
     metrics.csv.

Batches and noise of a step follow from the seed and the step's number alone, so a resumed training
is the uninterrupted one. A job that is killed starts again at the checkpoint before.
"""

import csv
import dataclasses
import functools
import shutil
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from demo2eval.checkpoints.policy_metadata import read_policy_metadata
from demo2eval.cli import run
from demo2eval.config import Actions, Training
from demo2eval.errors import UserError
from demo2eval.pi0.config import Pi0Config
from demo2eval.provenance import StageJob, read_manifest, run_stage

if TYPE_CHECKING:
    import jax
    import optax

    from demo2eval.data.loader import BatchLoader
    from demo2eval.training.state import TrainState

LOG_INTERVAL = 20
TRAIN_STATES_KEPT = 2


def batch_loss(
    trained: dict,
    frozen: dict,
    config: Pi0Config,
    training: Training,
    batch: dict,
    key: "jax.Array",
) -> "jax.Array":
    """Return the mean flow-matching loss of a batch, after augmentation.

    Args:
        trained, frozen: flat parameters.
        batch: as `BatchLoader.load_batch` gives it: uint8 images [b, h, w, 3] by camera, state
            [b, action_dim], actions [b, horizon, action_dim], the prompt's tokens and mask [b, l].
        key: of augmentation, noise and time.
    """
    import jax
    import jax.numpy as jnp

    from demo2eval.pi0.model import Observation, compute_loss
    from demo2eval.pi0.params import unflatten
    from demo2eval.training.augmentation import augment, random_shift

    augment_key, loss_key = jax.random.split(key)
    images = batch["images"]
    if training.random_shift:
        images = random_shift(jax.random.fold_in(augment_key, 1), images, training.random_shift)
    images = {
        camera: image.astype(jnp.float32) / 255.0 * 2.0 - 1.0 for camera, image in images.items()
    }
    if training.augment:
        images = augment(augment_key, images)
    observation = Observation(
        images=images,
        state=batch["state"],
        tokenized_prompt=batch["tokenized_prompt"],
        tokenized_prompt_mask=batch["tokenized_prompt_mask"],
    )
    params = unflatten(trained | frozen)
    loss = compute_loss(
        config, params, loss_key, observation, batch["actions"], training.num_noise_samples
    )
    return jnp.mean(loss)


def train_step(
    config: Pi0Config,
    optimizer: "optax.GradientTransformation",
    training: Training,
    state: "TrainState",
    batch: dict,
    key: "jax.Array",
) -> tuple["TrainState", dict]:
    """Return the state after a step, and {"loss", "grad_norm"}; arguments as for `batch_loss`."""
    import jax
    import optax

    from demo2eval.training.optimizer import ema_update

    loss, gradients = jax.value_and_grad(batch_loss)(
        state.params, state.frozen, config, training, batch, key
    )
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    ema = None
    if training.ema_decay is not None:
        ema = ema_update(state.ema, params, training.ema_decay)
    state = dataclasses.replace(state, params=params, opt_state=opt_state, ema=ema)
    return state, {"loss": loss, "grad_norm": optax.global_norm(gradients)}


def train_loop(
    config: Pi0Config,
    optimizer: "optax.GradientTransformation",
    schedule: "optax.Schedule",
    training: Training,
    state: "TrainState",
    loader: "BatchLoader",
    *,
    steps: range,
    seed: int,
    log: Path,
) -> "TrainState":
    """Train and return the last state.

    Args:
        loader: gives the batches.
        steps: to do.
        seed: of batches and noise.
        log: metrics.csv to write.

    Raises:
        UserError: if the loss is not finite.
    """
    import jax
    import numpy as np
    from tqdm import tqdm

    from demo2eval.data.loader import prefetch

    def batches() -> Iterator[dict]:
        for step in steps:
            yield jax.device_put(loader.load_batch(step, training.batch_size, seed))

    compiled_step = jax.jit(
        functools.partial(train_step, config, optimizer, training), donate_argnums=0
    )
    root_key = jax.random.key(seed)
    pending = []
    bar = tqdm(initial=steps.start, total=steps.stop, unit="step", mininterval=2, desc="training")
    with open(log, "w", newline="") as file, bar:
        table = csv.writer(file)
        table.writerow(["step", "loss", "grad_norm", "learning_rate"])
        for step, batch in zip(steps, prefetch(batches(), depth=2), strict=True):
            state, metrics = compiled_step(state, batch, jax.random.fold_in(root_key, step))
            pending.append(metrics)
            if (step + 1) % LOG_INTERVAL and step + 1 < steps.stop:
                continue
            fetched = jax.device_get(pending)
            loss, grad_norm = (
                float(np.mean([item[key] for item in fetched])) for key in ("loss", "grad_norm")
            )
            learning_rate = float(np.asarray(schedule(step)))
            table.writerow([step + 1, loss, grad_norm, learning_rate])
            bar.update(len(pending))
            bar.set_postfix(loss=f"{loss:.4f}", refresh=False)
            pending.clear()
            if not np.isfinite(loss):
                raise UserError(
                    f"the loss is {loss} near step {step + 1}; lower training.peak_lr, or look at "
                    "the norm stats' ranges.csv."
                )
    return state


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
        UserError: if the checkpoint before is not before, or its training state is gone.
    """
    settings = {
        "step": step,
        "seed": seed,
        "training": training,
        "state_noise": actions.state_noise,
    }
    inputs = {"previous": previous, "image_cache": image_cache}
    with run_stage(
        output, stage="train", module=__spec__.name, settings=settings, inputs=inputs
    ) as job:
        if not job.reused:
            _train(job, previous, image_cache, step, seed, training, actions.state_noise)
    prune_train_states(output.parent, step)


def _train(
    job: StageJob,
    previous: Path,
    image_cache: Path,
    step: int,
    seed: int,
    training: Training,
    state_noise: float,
) -> None:
    import jax

    from demo2eval.checkpoints.openpi import save_params
    from demo2eval.data.loader import BatchLoader
    from demo2eval.training.optimizer import make_optimizer, make_schedule
    from demo2eval.training.state import init_train_state, save_train_state, tree_digest

    metadata = read_manifest(previous)["metadata"]
    steps = range(metadata["step"], step)
    if not steps:
        raise UserError(
            f"{previous} is of step {steps.start}, not before {step}; give the checkpoint before."
        )
    source, folder = previous.with_suffix(""), job.output.with_suffix("")
    config = read_policy_metadata(source).config
    schedule = make_schedule(
        training.warmup_steps, training.peak_lr, training.decay_steps, training.decay_lr
    )
    optimizer = make_optimizer(schedule, training.clip_gradient_norm, training.weight_decay)
    state = init_train_state(source, steps.start, config, optimizer, training.ema_decay)
    loader = BatchLoader.for_policy(
        image_cache.parent, source, state_noise=state_noise, num_val_demos=training.num_val_demos
    )

    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(job.partial)
    log = job.partial / "metrics.csv"
    started = time.monotonic()
    state = train_loop(
        config, optimizer, schedule, training, state, loader, steps=steps, seed=seed, log=log
    )
    seconds = time.monotonic() - started
    rate = training.batch_size * len(steps) / seconds
    print(
        f"trained steps {steps.start} to {step} in {seconds:.0f} s, {rate:.1f} samples/s",
        file=sys.stderr,
    )
    save_params(job.partial / "params", state.eval_params)
    save_train_state(job.partial / "train_state", state)
    shutil.copytree(source / "assets", job.partial / "assets")
    job.partial.rename(folder)
    job.finish(
        [folder / name for name in ("assets", "metrics.csv", "params")],
        declared=[folder / "metrics.csv"],
        digest=tree_digest(jax.device_get(state.eval_params)),
        step=step,
        training_time_s=round(seconds, 3),
        samples_per_s=round(rate, 2),
        device=jax.devices()[0].device_kind,
        dataset=metadata["dataset"],
    )


def prune_train_states(checkpoints: Path, step: int) -> None:
    """Remove the training states of checkpoints up to `step`, the newest two excepted."""
    steps = sorted(
        int(path.parent.name)
        for path in checkpoints.glob("*/train_state")
        if path.parent.name.isdigit()
    )
    for old in [item for item in steps if item <= step][:-TRAIN_STATES_KEPT]:
        shutil.rmtree(checkpoints / str(old) / "train_state")


if __name__ == "__main__":
    run(train)
