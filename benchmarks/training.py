"""Training steps of full-size Pi0.5 with random weights and data: samples/s, MFU and memory.

    python benchmarks/training.py --batch-size 256 --fsdp-devices 1

Uses all GPUs that there are, and the trainer's own compiled step. Two cameras, a prompt of 24
tokens, 20 actions, openpi's augmentation. The first steps are slower and do not count: XLA takes
pinned memory from the system then.
"""

import argparse
import functools
import json
import threading
import time

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from demo2eval.config import Training
from demo2eval.pi0.config import Pi0Config, make_config
from demo2eval.pi0.params import param_table
from demo2eval.training.budget import GIB, PEAK_FLOPS, flops_per_sample, plan_step
from demo2eval.training.host_ema import HostEma
from demo2eval.training.optimizer import make_optimizer, make_schedule
from demo2eval.training.sharding import AXES, make_mesh, shard_state
from demo2eval.training.state import TrainState
from demo2eval.training.step import update_state
from demo2eval.training.trainer import Trainer, device_memory

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")
SLOW_STEPS = 3


def random_batch(config: Pi0Config, batch_size: int, tokens: int) -> dict:
    """Return data in the form of `BatchLoader.load_batch`."""
    rng, size = np.random.default_rng(0), config.siglip.image_size
    shape = (batch_size, config.action_horizon, config.action_dim)
    return {
        "images": {
            camera: rng.integers(0, 256, (batch_size, size, size, 3), np.uint8)
            for camera in CAMERAS
        },
        "state": rng.standard_normal((batch_size, config.action_dim), np.float32),
        "actions": rng.standard_normal(shape, np.float32),
        "tokenized_prompt": np.tile(np.arange(tokens, dtype=np.int32), (batch_size, 1)),
        "tokenized_prompt_mask": None,
    }


def random_state(trainer: Trainer, ema_decay: float | None) -> TrainState:
    """Return a state whose weights are normal numbers, on the trainer's mesh."""
    shapes = {name: shape for name, (shape, _) in param_table(trainer.config).items()}

    def draw(key: jax.Array) -> TrainState:
        keys = jax.random.split(key, len(shapes))
        params = {
            name: 0.02 * jax.random.normal(array_key, shape)
            for array_key, (name, shape) in zip(keys, shapes.items(), strict=True)
        }
        ema = None if ema_decay is None else {name: value + 0 for name, value in params.items()}
        return TrainState(params, {}, trainer.optimizer.init(params), ema)

    key = jax.random.key(0)
    sharding = shard_state(trainer.mesh, jax.eval_shape(draw, key))
    return jax.jit(draw, out_shardings=sharding)(key)


def main() -> None:
    """Measure, and print a line of JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--variant", default="pi05", help="model variant")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--fsdp-devices", type=int, default=1)
    parser.add_argument("--ema-decay", type=float, default=0.999, help="0: no EMA")
    parser.add_argument("--tokens", type=int, default=24, help="tokens of the prompt")
    parser.add_argument("--steps", type=int, default=8)
    arguments = parser.parse_args()
    config = make_config(
        arguments.variant,
        action_horizon=20,
        max_token_len=arguments.tokens,
        discrete_state_input=False,
    )
    ema_decay = arguments.ema_decay or None
    training = Training(
        batch_size=arguments.batch_size,
        fsdp_devices=arguments.fsdp_devices,
        ema_decay=ema_decay,
    )
    plan = plan_step(
        config, training, len(CAMERAS), devices=jax.device_count(), memory=device_memory()
    )
    schedule = make_schedule(0, 5e-5, 1_000_000, 5e-5)
    optimizer, mesh = make_optimizer(schedule), make_mesh(arguments.fsdp_devices)
    trainer = Trainer(
        config,
        training,
        optimizer,
        schedule,
        mesh,
        plan,
        loader=None,  # pyright: ignore
        seed=0,
        stop=threading.Event(),
    )
    host_ema = None
    state = random_state(trainer, None if plan.ema_on_host else ema_decay)
    if plan.ema_on_host and ema_decay:
        host_ema = HostEma(jax.device_get(state.params), ema_decay)
    step = trainer.compile_step(host_ema is not None)
    update = jax.jit(
        functools.partial(update_state, optimizer, None if host_ema else ema_decay),
        donate_argnums=0,
        out_shardings=(shard_state(mesh, state), None),
    )
    batch = jax.device_put(
        random_batch(config, arguments.batch_size, arguments.tokens),
        NamedSharding(mesh, PartitionSpec(AXES)),
    )
    losses, seconds = [], []
    for number in range(arguments.steps):
        started = time.perf_counter()
        key = jax.random.key(number)
        (device_losses, gradients), before = step(state.params, state.frozen, batch, key)
        state, metrics = update(state, device_losses, gradients)
        del gradients
        if host_ema and number:
            host_ema.update(before)
        losses.append(float(metrics["loss"]))
        seconds.append(time.perf_counter() - started)
    counted = seconds[min(SLOW_STEPS, arguments.steps - 1) :]
    rate = arguments.batch_size * len(counted) / sum(counted)
    device = jax.devices()[0]
    peaks = [peak for name, peak in PEAK_FLOPS.items() if name in device.device_kind]
    flops = rate * flops_per_sample(config, len(CAMERAS)) / jax.device_count()
    memory = device.memory_stats() or {}
    row = {
        "device": f"{jax.device_count()} x {device.device_kind}",
        "jax": jax.__version__,
        "plan": str(plan),
        "samples_per_s": round(rate, 1),
        "step_ms": [round(1e3 * item) for item in seconds],
        "mfu": round(flops / peaks[0], 3) if peaks else None,
        "peak_gib": round(memory.get("peak_bytes_in_use", 0) / GIB, 1),
        "losses": losses,
    }
    print(json.dumps(row))


if __name__ == "__main__":
    main()
