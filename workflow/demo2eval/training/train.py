"""One segment of training: from one checkpoint to the next.

In:  the manifest of the checkpoint before (its weights, training state and assets) and that of the training cache.
Out: <output without .json>/params (EMA weights if there is EMA), assets/, train_state/ and metrics.csv.

Batches and noise of a step follow from the seed and the step's number alone, so a resumed training is the uninterrupted one. A
segment that is killed starts again at the checkpoint before it.
"""

import csv
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from demo2eval.checkpoints.policy_metadata import read_policy_metadata
from demo2eval.cli import option, run, settings_from, stage_parser
from demo2eval.errors import UserError
from demo2eval.provenance import Work, making, read_manifest

REPORT_EVERY = 20
TRAIN_STATES_KEPT = 2


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the weights at `to_step`, given the checkpoint before."""

    to_step: int = option("training step of the checkpoint to make")
    seed: int = option("seed of batches, noise and augmentation", 0)
    batch_size: int = option("samples a step", 32)
    warmup_steps: int = option("steps from peak_lr / (warmup_steps + 1) up to peak_lr", 1000)
    peak_lr: float = option("learning rate after the warm-up", 5e-5)
    decay_steps: int = option("step, the warm-up included, at which the cosine ends", 1_000_000)
    decay_lr: float = option("learning rate at the cosine's end", 5e-5)
    clip_gradient_norm: float = option("largest global norm of the gradient", 1.0)
    weight_decay: float = option("AdamW's weight decay, on all parameters", 1e-10)
    ema_decay: float | None = option("share of the old average kept each step; null: no EMA", 0.999)
    augment: bool = option("openpi's random crop, rotation and colour jitter", True)
    state_noise: float = option("standard deviation of noise on the joints, radians", 0.0)
    random_shift: int = option("largest random shift of the pictures, pixels", 0)
    num_noise_samples: int = option(
        "draws of noise and time a sample, for which its pictures are read once", 1
    )
    num_val_demos: int = option("the last so many demonstrations are not trained on", 0)


def payload_of(manifest: Path) -> Path:
    """Return the folder of a checkpoint, given its manifest."""
    return manifest.with_suffix("")


def make_train_step(
    config,
    optimizer,
    ema_decay: float | None,
    augment: bool,
    *,
    random_shift: int = 0,
    num_noise_samples: int = 1,
) -> Callable:
    """Return the jitted function (state, batch, key) -> (state, metrics).

    `state` holds `params`, those that training changes, `frozen`, those that it does not, `opt_state` and, with EMA, `ema` of `params`;
    parameters as flat dictionaries. `batch` is what `TrainingData.batch` gives: uint8 images [b, h, w, 3]
    by camera, state [b, action_dim], actions [b, horizon, action_dim], and the prompt's tokens and mask [b, l].
    """
    import jax
    import jax.numpy as jnp
    import optax

    from demo2eval.pi0.model import Observation, compute_loss
    from demo2eval.pi0.params import unflatten
    from demo2eval.training import augmentation
    from demo2eval.training.optimizer import ema_update

    def loss_of(trained, frozen, batch, key):
        augment_key, loss_key = jax.random.split(key)
        images = batch["images"]
        if random_shift:
            images = augmentation.random_shift(
                jax.random.fold_in(augment_key, 1), images, random_shift
            )
        images = {
            camera: pixels.astype(jnp.float32) / 255.0 * 2.0 - 1.0
            for camera, pixels in images.items()
        }
        if augment:
            images = augmentation.augment(augment_key, images)
        observation = Observation(
            images=images,
            state=batch["state"],
            tokenized_prompt=batch["tokenized_prompt"],
            tokenized_prompt_mask=batch["tokenized_prompt_mask"],
        )
        return jnp.mean(
            compute_loss(
                config,
                unflatten(trained | frozen),
                loss_key,
                observation,
                batch["actions"],
                num_noise_samples,
            )
        )

    @partial(jax.jit, donate_argnums=0)
    def train_step(state, batch, key):
        loss, gradients = jax.value_and_grad(loss_of)(state["params"], state["frozen"], batch, key)
        updates, opt_state = optimizer.update(gradients, state["opt_state"], state["params"])
        params = optax.apply_updates(state["params"], updates)
        new = {"params": params, "frozen": state["frozen"], "opt_state": opt_state}
        if ema_decay is not None:
            new["ema"] = ema_update(state["ema"], params, ema_decay)
        return new, {"loss": loss, "grad_norm": optax.global_norm(gradients)}

    return train_step


def start_state(previous: Path, step: int, config, optimizer, ema_decay: float | None) -> dict:
    """Return the training state to go on from: that of the checkpoint, or at step 0 a fresh one around its weights.

    Raises:
        UserError: if the weights or the training state are missing, damaged or of another model.
    """
    import jax
    import jax.numpy as jnp

    from demo2eval.checkpoints.openpi import load_params
    from demo2eval.pi0.params import split_trainable
    from demo2eval.training.state import load_train_state

    averaged, frozen = split_trainable(config, load_params(previous / "params", config))
    if step == 0:
        params = {name: jnp.asarray(value, jnp.float32) for name, value in averaged.items()}
        opt_state = optimizer.init(params)
    else:
        params, opt_state = load_train_state(previous / "train_state", optimizer)
    state = {"params": params, "frozen": frozen, "opt_state": opt_state}
    if ema_decay is not None:
        # A copy: the step's buffers are donated, so nothing may be in the state twice.
        state["ema"] = {
            name: jnp.array(value, jnp.float32, copy=True) for name, value in averaged.items()
        }
    return jax.device_put(state)


def batches(settings: Settings, data, first_step: int) -> Iterator[dict]:
    """Yield the batch of each step from `first_step` to the segment's end, on its way to the device."""
    import jax

    for step in range(first_step, settings.to_step):
        yield jax.device_put(data.batch(step, settings.batch_size, settings.seed))


def train(
    settings: Settings,
    config,
    state: dict,
    data,
    first_step: int,
    metrics_file: Path,
    optimizer,
    schedule,
) -> dict:
    """Train from `first_step` to `settings.to_step` and return the state; write the loss log on the way.

    Raises:
        UserError: if the loss is not finite.
    """
    import jax
    import numpy as np
    from tqdm import tqdm

    from demo2eval.data.loader import prefetch

    train_step = make_train_step(
        config,
        optimizer,
        settings.ema_decay,
        settings.augment,
        random_shift=settings.random_shift,
        num_noise_samples=settings.num_noise_samples,
    )
    root_key = jax.random.key(settings.seed)
    pending = []
    bar = tqdm(
        total=settings.to_step, initial=first_step, unit="step", mininterval=2, desc="training"
    )
    with open(metrics_file, "w", newline="") as file, bar:
        log = csv.writer(file)
        log.writerow(["step", "loss", "grad_norm", "learning_rate"])
        for step, batch in enumerate(
            prefetch(batches(settings, data, first_step), depth=2), start=first_step
        ):
            state, metrics = train_step(state, batch, jax.random.fold_in(root_key, step))
            pending.append(metrics)
            if (step + 1) % REPORT_EVERY and step + 1 < settings.to_step:
                continue
            means = {
                key: float(np.mean([item[key] for item in jax.device_get(pending)]))
                for key in metrics
            }
            bar.update(len(pending))
            bar.set_postfix(loss=f"{means['loss']:.4f}", refresh=False)
            log.writerow([step + 1, means["loss"], means["grad_norm"], float(schedule(step))])
            pending.clear()
            if not np.isfinite(means["loss"]):
                raise UserError(
                    f"the loss is {means['loss']} near step {step + 1}; lower training.peak_lr or check the norm stats."
                )
    return state


def prune_train_states(checkpoints: Path, step: int) -> None:
    """Remove the training states of all checkpoints up to `step` but the newest two; weights and manifests stay."""
    steps = sorted(
        int(path.parent.name)
        for path in checkpoints.glob("*/train_state")
        if path.parent.name.isdigit()
    )
    for old in [item for item in steps if item <= step][:-TRAIN_STATES_KEPT]:
        shutil.rmtree(checkpoints / str(old) / "train_state")


def train_segment(settings: Settings, previous: Path, cache: Path, output: Path) -> None:
    """Train from the checkpoint of manifest `previous` to `settings.to_step` and write the manifest `output`."""
    inputs = {"previous": previous, "cache": cache}
    with making(
        output, stage="train_segment", module=__spec__.name, settings=settings, inputs=inputs
    ) as work:
        if not work.finished:
            _make(settings, previous, cache, work)
    prune_train_states(output.parent, settings.to_step)


def _make(settings: Settings, previous: Path, cache: Path, work: Work) -> None:
    import jax

    from demo2eval.checkpoints.openpi import save_params
    from demo2eval.data.loader import TrainingData
    from demo2eval.pi0.params import unflatten
    from demo2eval.training.optimizer import make_optimizer, make_schedule
    from demo2eval.training.state import save_train_state, tree_digest

    first_step = read_manifest(previous)["facts"]["step"]
    if first_step >= settings.to_step:
        raise UserError(
            f"{previous} is of step {first_step}, not before {settings.to_step}; give the checkpoint before."
        )
    source, payload = payload_of(previous), payload_of(work.output)
    config = read_policy_metadata(source).config
    schedule = make_schedule(
        settings.warmup_steps, settings.peak_lr, settings.decay_steps, settings.decay_lr
    )
    optimizer = make_optimizer(
        schedule, clip=settings.clip_gradient_norm, weight_decay=settings.weight_decay
    )
    state = start_state(source, first_step, config, optimizer, settings.ema_decay)
    data = TrainingData.for_policy(
        cache.parent, source, state_noise=settings.state_noise, num_val_demos=settings.num_val_demos
    )

    shutil.rmtree(payload, ignore_errors=True)
    shutil.rmtree(work.partial)
    metrics_file = work.partial / "metrics.csv"
    started = time.monotonic()
    state = train(settings, config, state, data, first_step, metrics_file, optimizer, schedule)
    seconds = time.monotonic() - started
    published = unflatten(state.get("ema", state["params"]) | state["frozen"])
    save_params(work.partial / "params", published)
    save_train_state(work.partial / "train_state", state["params"], state["opt_state"])
    shutil.copytree(source / "assets", work.partial / "assets")
    work.partial.rename(payload)
    kept = [item for item in payload.iterdir() if item.name != "train_state"]
    rate = settings.batch_size * (settings.to_step - first_step) / seconds
    print(
        f"trained steps {first_step} to {settings.to_step} in {seconds:.0f} s, {rate:.1f} samples/s",
        file=sys.stderr,
    )
    work.finish(
        kept,
        digest=tree_digest(jax.device_get(published)),
        step=settings.to_step,
        training_time_s=round(seconds, 3),
        samples_per_s=round(rate, 2),
        device=jax.devices()[0].device_kind,
        dataset=read_manifest(previous)["facts"]["dataset"],
    )


def main() -> None:
    """Run the stage from the command line."""
    parser = stage_parser(__doc__, Settings)
    parser.add_argument(
        "--previous", type=Path, required=True, help="manifest of the checkpoint before"
    )
    parser.add_argument("--cache", type=Path, required=True, help="manifest of the training cache")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="manifest to write, <run>/checkpoints/<step>.json",
    )
    arguments = parser.parse_args()
    train_segment(
        settings_from(arguments, Settings), arguments.previous, arguments.cache, arguments.output
    )


if __name__ == "__main__":
    run(main)
