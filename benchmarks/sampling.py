"""Inference latency: ten Euler steps of a full-size model with random weights, ours and openpi's.

    python benchmarks/sampling.py --openpi ../openpi

Both get the same images, prompt and noise. openpi is measured if a checkout is given: as it stands
(three cameras of which one is masked, the prompt padded to 200 tokens), and with the masked camera
and the padding left out. The floor is the time that the arithmetic or, if that is longer, the
reading of the weights takes at the rates that this very device reaches in a large copy and in a
large matrix product.
"""

import argparse
import dataclasses
import json
import statistics
import sys
import time
import types
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp

from demo2eval.pi0.config import Pi0Config, make_config
from demo2eval.pi0.model import Observation
from demo2eval.pi0.params import flatten, init_params, unflatten
from demo2eval.pi0.sampling import compiler_options, fold_params, sample_folded

CAMERAS = ("base_0_rgb", "left_wrist_0_rgb")
MASKED_CAMERA = "right_wrist_0_rgb"


def seconds_per_call(function, *arguments, seconds: float) -> float:
    """Return the median time of a call, after two calls that do not count, over about `seconds`."""
    for _ in range(2):
        jax.block_until_ready(function(*arguments))
    times, end = [], time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 5:
        started = time.perf_counter()
        jax.block_until_ready(function(*arguments))
        times.append(time.perf_counter() - started)
    return statistics.median(times)


def device_rates(seconds: float) -> tuple[float, float]:
    """Return what this device reaches.

    Returns:
        (bytes/s read and written in a large copy, operations/s of the fastest of some large
        bfloat16 matrix products).
    """
    large = jax.default_backend() == "gpu"
    data = jax.random.normal(jax.random.key(0), (8192 if large else 512, 32768), jnp.float32)
    copy = seconds_per_call(jax.jit(lambda x: x + 1), data, seconds=seconds)
    rates = []
    for rows, inner, columns in (
        [(8192, 8192, 8192), (16384, 2048, 32768), (16384, 16384, 2048)]
        if large
        else [(512, 512, 512)]
    ):
        left = jax.random.normal(jax.random.key(1), (rows, inner), jnp.bfloat16)
        right = jax.random.normal(jax.random.key(2), (inner, columns), jnp.bfloat16)
        rates.append(
            2
            * rows
            * inner
            * columns
            / seconds_per_call(jax.jit(jnp.matmul), left, right, seconds=seconds / 3)
        )
    return 2 * data.nbytes / copy, max(rates)


def compute_floor(
    config: Pi0Config,
    batch: int,
    tokens: int,
    num_steps: int,
    bytes_rate: float,
    operations_rate: float,
) -> dict:
    """Return the least time of one policy call [s], of vision encoder and experts each.

    Weights are read once and each product is computed once. The last layer of the prefix needs keys
    and values alone, and the modulation of the adaptive norms is known beforehand.
    """
    vision, language, expert = config.siglip, config.paligemma, config.action_expert
    cameras = batch * len(CAMERAS)
    prefix = batch * (len(CAMERAS) * vision.num_patches + tokens)
    suffix = batch * (config.action_horizon + (0 if config.is_pi05 else 1))

    vision_weights = vision.depth * vision.layer_size
    language_weights = (language.depth - 1) * language.layer_size
    expert_weights = expert.depth * expert.layer_size
    attention = {
        "vision": 4 * cameras * vision.num_patches**2 * vision.width * vision.depth,
        "language": 4
        * prefix
        * (prefix // batch)
        * language.num_heads
        * language.head_dim
        * (language.depth - 1),
        "expert": 4
        * suffix
        * (prefix + suffix)
        // batch
        * expert.num_heads
        * expert.head_dim
        * expert.depth,
    }
    modules = {
        "vision": (vision_weights, cameras * vision.num_patches, 1),
        "language": (language_weights, prefix, 1),
        "expert": (expert_weights, suffix, num_steps),
    }
    times = {}
    for name, (weights, rows, runs) in modules.items():
        operations = runs * (2 * weights * rows + attention[name])
        read = runs * 2 * weights
        times[name] = max(operations / operations_rate, read / bytes_rate)
    return times


def random_inputs(config: Pi0Config, batch: int, tokens: int) -> tuple[Observation, jax.Array]:
    """Return an observation with a prompt of `tokens`, and noise."""
    keys = jax.random.split(jax.random.key(3), 5)
    size = config.siglip.image_size
    images = {
        camera: jax.random.randint(key, (batch, size, size, 3), 0, 256).astype(jnp.float32) / 127.5
        - 1
        for camera, key in zip(CAMERAS, keys, strict=False)
    }
    observation = Observation(
        images=images,
        state=jax.random.normal(keys[2], (batch, config.action_dim)),
        tokenized_prompt=jax.random.randint(keys[3], (batch, tokens), 0, config.vocab_size),
    )
    return observation, jax.random.normal(
        keys[4], (batch, config.action_horizon, config.action_dim)
    )


def random_params(config: Pi0Config) -> dict:
    """Return bfloat16 weights, none of them zero, since fresh ones shut every adaptive norm."""

    def draw(key):
        flat = flatten(init_params(config, key))
        keys = jax.random.split(key, len(flat))
        noisy = {
            name: value + 0.02 * jax.random.normal(array_key, value.shape)
            for array_key, (name, value) in zip(keys, flat.items(), strict=True)
        }
        return unflatten({name: value.astype(jnp.bfloat16) for name, value in noisy.items()})

    return jax.jit(draw)(jax.random.key(0))


def measure_ours(
    config: Pi0Config, params: dict, batch: int, tokens: int, num_steps: int, seconds: float
) -> tuple[dict, jax.Array]:
    """Return ({"compile": s, "call": s}, the actions)."""
    observation, noise = random_inputs(config, batch, tokens)
    folded = jax.jit(partial(fold_params, config, num_steps=num_steps))(params)
    started = time.perf_counter()
    compiled = (
        jax.jit(partial(sample_folded, config))
        .lower(folded, observation, noise)
        .compile(compiler_options(batch))
    )
    compile_time = time.perf_counter() - started
    call = seconds_per_call(compiled, folded, observation, noise, seconds=seconds)
    return {"compile": compile_time, "call": call}, compiled(folded, observation, noise)


def import_openpi(checkout: Path):
    """Import openpi's model from a checkout; its PyTorch twin is not needed.

    Returns:
        its modules (model, pi0_config, gemma, array_typing).
    """
    sys.path.insert(0, str(checkout / "src"))
    twin = types.ModuleType("openpi.models_pytorch.pi0_pytorch")
    package = types.ModuleType("openpi.models_pytorch")
    package.pi0_pytorch = twin  # pyright: ignore
    sys.modules |= {"openpi.models_pytorch": package, "openpi.models_pytorch.pi0_pytorch": twin}
    from openpi.models import gemma, model, pi0_config
    from openpi.shared import array_typing

    return model, pi0_config, gemma, array_typing


def measure_openpi(
    checkout: Path,
    config: Pi0Config,
    params: dict,
    batch: int,
    tokens: int,
    num_steps: int,
    seconds: float,
    *,
    trimmed: bool,
) -> tuple[dict, jax.Array]:
    """The same as `measure_ours` with openpi's code.

    Args:
        trimmed: leave out the masked camera and the padding of the prompt.
    """
    from flax import nnx

    model, pi0_config, gemma, array_typing = import_openpi(checkout)
    experts = {"gemma_2b": config.paligemma, "gemma_300m": config.action_expert}
    gemma.get_config = lambda variant: gemma.Config(
        **{
            key: value
            for key, value in dataclasses.asdict(experts[variant]).items()
            if key != "lora"
        }
    )
    theirs = pi0_config.Pi0Config(
        pi05=config.is_pi05,
        action_dim=config.action_dim,
        action_horizon=config.action_horizon,
        dtype=config.dtype,
    )
    names = CAMERAS if trimmed else (*CAMERAS, MASKED_CAMERA)
    model.preprocess_observation.__kwdefaults__["image_keys"] = names
    observation, noise = random_inputs(config, batch, tokens)
    padding = 0 if trimmed else theirs.max_token_len - tokens
    images = dict(observation.images) | (
        {} if trimmed else {MASKED_CAMERA: jnp.zeros_like(observation.images[CAMERAS[0]])}
    )
    observed = model.Observation(
        images=images,
        image_masks={name: jnp.full(batch, name != MASKED_CAMERA) for name in names},
        state=observation.state,
        tokenized_prompt=jnp.pad(observation.tokenized_prompt, ((0, 0), (0, padding))),
        tokenized_prompt_mask=jnp.broadcast_to(
            jnp.arange(tokens + padding) < tokens, (batch, tokens + padding)
        ),
    )
    network = theirs.load(params)
    graph, state = nnx.split(network)
    function = jax.jit(
        lambda state, key, observed, noise: nnx.merge(graph, state).sample_actions(
            key, observed, num_steps=num_steps, noise=noise
        )
    )
    started = time.perf_counter()
    with array_typing.disable_typechecking():
        compiled = function.lower(state, jax.random.key(0), observed, noise).compile()
    compile_time = time.perf_counter() - started
    inputs = (state, jax.random.key(0), observed, noise)
    call = seconds_per_call(compiled, *inputs, seconds=seconds)
    return {"compile": compile_time, "call": call}, compiled(*inputs)


def main() -> None:
    """Measure and print a table, and the same as JSON."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--openpi", type=Path, help="checkout of openpi")
    parser.add_argument("--variant", default="pi05", help="model variant")
    parser.add_argument(
        "--overrides", type=json.loads, default={}, help="fields of Pi0Config, JSON"
    )
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 32])
    parser.add_argument("--tokens", type=int, default=24, help="tokens of the prompt")
    parser.add_argument("--action-horizon", type=int, default=20, help="actions of a chunk")
    parser.add_argument("--num-steps", type=int, default=10, help="Euler steps")
    parser.add_argument("--seconds", type=float, default=3.0, help="time to measure each case")
    parser.add_argument("--output", type=Path, help="JSON to write")
    arguments = parser.parse_args()
    config = make_config(
        arguments.variant, action_horizon=arguments.action_horizon, **arguments.overrides
    )
    settings = (arguments.tokens, arguments.num_steps, arguments.seconds)
    device = jax.devices()[0].device_kind
    bytes_rate, operations_rate = device_rates(arguments.seconds / 3)
    print(
        f"{device}, jax {jax.__version__}: {bytes_rate / 1e12:.2f} TB/s, "
        f"{operations_rate / 1e12:.0f} TFLOP/s",
        flush=True,
    )
    params = random_params(config)
    rows = []
    for batch in arguments.batch_sizes:
        cases = {"demo2eval": lambda batch=batch: measure_ours(config, params, batch, *settings)}
        if arguments.openpi:
            for name, trimmed in (("openpi", False), ("openpi, trimmed", True)):
                cases[name] = lambda batch=batch, trimmed=trimmed: measure_openpi(
                    arguments.openpi, config, params, batch, *settings, trimmed=trimmed
                )
        floor = compute_floor(
            config, batch, arguments.tokens, arguments.num_steps, bytes_rate, operations_rate
        )
        print(
            f"batch {batch}: floor {sum(floor.values()) * 1e3:.1f} ms",
            {name: f"{value * 1e3:.1f}" for name, value in floor.items()},
        )
        reference = None
        for name, case in cases.items():
            times, actions = case()
            reference = actions if reference is None else reference
            difference = float(jnp.abs(actions - reference).max())
            row = {
                "batch": batch,
                "code": name,
                **times,
                "observations_per_s": batch / times["call"],
                "difference": difference,
            }
            rows.append(
                row
                | {"floor": sum(floor.values()), "largest_action": float(jnp.abs(actions).max())}
            )
            print(
                f"  {name:16s} {times['call'] * 1e3:8.1f} ms  "
                f"{row['observations_per_s']:7.1f} observations/s  "
                f"compiled in {times['compile']:.0f} s  differs by {difference:.3f}",
                flush=True,
            )
    if arguments.output:
        arguments.output.write_text(
            json.dumps({"device": device, "jax": jax.__version__, "rows": rows}, indent=1)
        )


if __name__ == "__main__":
    main()
