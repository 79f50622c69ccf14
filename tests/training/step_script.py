"""Two training steps of a small model with random data; prints what came out, a number a line.

python step_script.py MICRO_BATCH_SIZE FSDP_DEVICES [DTYPE]
"""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "workflow"), str(ROOT / "tests/pi0")]

from small_model import OVERRIDES, random_params  # noqa: E402

from demo2eval.config import Training  # noqa: E402
from demo2eval.pi0.config import make_config  # noqa: E402
from demo2eval.pi0.params import flatten  # noqa: E402
from demo2eval.training import sharding  # noqa: E402
from demo2eval.training.optimizer import make_optimizer, make_schedule  # noqa: E402
from demo2eval.training.state import TrainState  # noqa: E402
from demo2eval.training.step import compute_gradients, update_state  # noqa: E402

BATCH_SIZE = 8


def make_batch(config) -> dict:
    """Return random data in the form of `BatchLoader.load_batch`."""
    rng, size = np.random.default_rng(0), config.siglip.image_size
    shape = (BATCH_SIZE, config.action_horizon, config.action_dim)
    return {
        "images": {"base_0_rgb": rng.integers(0, 256, (BATCH_SIZE, size, size, 3), np.uint8)},
        "state": rng.standard_normal((BATCH_SIZE, config.action_dim), np.float32),
        "actions": rng.standard_normal(shape, np.float32),
        "tokenized_prompt": np.tile(np.arange(4, dtype=np.int32), (BATCH_SIZE, 1)),
        "tokenized_prompt_mask": None,
    }


def main(micro_batch_size: int, fsdp_devices: int, dtype: str = "float32") -> None:
    """Train two steps and print loss, gradient norm, and sums over weights and average."""
    depths = {"paligemma.depth": 2, "action_expert.depth": 2, "siglip.depth": 1}
    config = make_config("pi05_tiny", **OVERRIDES, **depths, dtype=dtype)
    training = Training(batch_size=BATCH_SIZE, ema_decay=0.9, random_shift=2, num_noise_samples=2)
    optimizer = make_optimizer(make_schedule(1, 1e-3, 10, 1e-4))
    sharding.SMALLEST_SHARDED = 2**10
    mesh = sharding.make_mesh(fsdp_devices)
    params = flatten(random_params(config))
    state = TrainState(params, {}, optimizer.init(params), jax.tree.map(jnp.copy, params))
    state, batch = sharding.place(mesh, state), make_batch(config)
    if fsdp_devices > 1:
        sharded = [leaf for leaf in state.params.values() if not leaf.is_fully_replicated]
        assert len(sharded) > 10
    pieces = BATCH_SIZE // mesh.size // micro_batch_size
    config = dataclasses.replace(config, remat="elementwise")
    step = jax.jit(functools.partial(compute_gradients, config, training, mesh, pieces))
    update = jax.jit(functools.partial(update_state, optimizer, training.ema_decay))
    for number in range(2):
        losses, gradients = step(state.params, {}, batch, jax.random.key(number))
        state, metrics = update(state, losses, gradients)
        print(float(metrics["loss"]), float(metrics["grad_norm"]))
    for tree in (state.params, state.ema):
        for name in ("action_out_proj/kernel", "PaliGemma/llm/layers/mlp/gating_einsum"):
            print(float(jnp.abs(tree[name]).sum()))
            print(float(jnp.abs(tree[name] - params[name]).sum()))


main(int(sys.argv[1]), int(sys.argv[2]), *sys.argv[3:])
