"""The parameter tree, openpi's names and shapes, as one table; and its initialisation.

Arrays of the layers of a tower are stacked along a leading axis of length `depth`.
"""

import math
from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp

from demo2eval.pi0.config import GemmaConfig, Pi0Config, SiglipConfig

Initializer = Callable[[jax.Array, tuple[int, ...]], jax.Array]


def zeros(key, shape):
    """Zeros, float32."""
    return jnp.zeros(shape, jnp.float32)


def ones(key, shape):
    """Ones, float32."""
    return jnp.ones(shape, jnp.float32)


def normal(std: float) -> Initializer:
    """Normal numbers of standard deviation `std`."""
    return lambda key, shape: std * jax.random.normal(key, shape, jnp.float32)


def fan_in(size: int) -> Initializer:
    """Truncated normal numbers of variance 1/size (LeCun et al., 1998)."""

    def draw(key, shape):
        # 0.8796 is the standard deviation of a unit normal cut at +-2.
        return jax.random.truncated_normal(key, -2, 2, shape, jnp.float32) * (
            1 / math.sqrt(size) / 0.87962566103423978
        )

    return draw


def dense(
    name: str, inputs: int, outputs: int, stack: tuple[int, ...] = ()
) -> Iterator[tuple[str, tuple[int, ...], Initializer]]:
    """A Dense layer's kernel [inputs, outputs] and bias [outputs]."""
    yield f"{name}/kernel", (*stack, inputs, outputs), fan_in(inputs)
    yield f"{name}/bias", (*stack, outputs), zeros


def siglip_table(config: SiglipConfig, outputs: int):
    """The vision tower, below PaliGemma/img."""
    root, width, depth = "PaliGemma/img", config.width, config.depth
    head_dim = width // config.num_heads
    patch_inputs = config.patch_size**2 * 3
    yield (
        f"{root}/embedding/kernel",
        (config.patch_size, config.patch_size, 3, width),
        fan_in(patch_inputs),
    )
    yield f"{root}/embedding/bias", (width,), zeros
    yield f"{root}/pos_embedding", (1, config.tokens, width), normal(1 / math.sqrt(width))
    block = f"{root}/Transformer/encoderblock"
    for norm in ("LayerNorm_0", "LayerNorm_1"):
        yield f"{block}/{norm}/scale", (depth, width), ones
        yield f"{block}/{norm}/bias", (depth, width), zeros
    attention = f"{block}/MultiHeadDotProductAttention_0"
    for part in ("query", "key", "value"):
        yield (
            f"{attention}/{part}/kernel",
            (depth, width, config.num_heads, head_dim),
            fan_in(width),
        )
        yield f"{attention}/{part}/bias", (depth, config.num_heads, head_dim), zeros
    yield f"{attention}/out/kernel", (depth, config.num_heads, head_dim, width), fan_in(width)
    yield f"{attention}/out/bias", (depth, width), zeros
    yield from dense(f"{block}/MlpBlock_0/Dense_0", width, config.mlp_dim, (depth,))
    yield from dense(f"{block}/MlpBlock_0/Dense_1", config.mlp_dim, width, (depth,))
    yield f"{root}/Transformer/encoder_norm/scale", (width,), ones
    yield f"{root}/Transformer/encoder_norm/bias", (width,), zeros
    yield from dense(f"{root}/head", width, outputs)


def einsum_with_lora(name: str, shape: tuple[int, ...], inputs: int, rank: int | None):
    """A matrix [..., in, out] and, with LoRA, its factors [..., in, rank] and [..., rank, out]."""
    yield f"{name}/w", shape, fan_in(inputs)
    if rank:
        yield f"{name}/lora_a", (*shape[:-1], rank), normal(0.01)
        yield f"{name}/lora_b", (*shape[:-2], rank, shape[-1]), normal(0.01)


def gemma_table(config: GemmaConfig, suffix: str, adaptive: bool):
    """One language tower, below PaliGemma/llm; `suffix` is "" or "_1"."""
    layers, width, depth = "PaliGemma/llm/layers", config.width, config.depth
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    rank = config.lora and config.lora.attention_rank
    if heads == kv_heads:
        yield from einsum_with_lora(
            f"{layers}/attn/qkv_einsum{suffix}", (depth, 3, heads, width, head_dim), width, rank
        )
    else:
        yield from einsum_with_lora(
            f"{layers}/attn/q_einsum{suffix}", (depth, heads, width, head_dim), width, rank
        )
        yield from einsum_with_lora(
            f"{layers}/attn/kv_einsum{suffix}", (depth, 2, kv_heads, width, head_dim), width, rank
        )
    yield from einsum_with_lora(
        f"{layers}/attn/attn_vec_einsum{suffix}",
        (depth, heads, head_dim, width),
        heads * head_dim,
        rank,
    )
    for name, shape, inputs in (
        ("gating_einsum", (depth, 2, width, config.mlp_dim), width),
        ("linear", (depth, config.mlp_dim, width), config.mlp_dim),
    ):
        yield f"{layers}/mlp{suffix}/{name}", shape, fan_in(inputs)
        if config.lora:
            yield (
                f"{layers}/mlp{suffix}/{name}_lora_a",
                (*shape[:-1], config.lora.feed_forward_rank),
                normal(0.01),
            )
            yield (
                f"{layers}/mlp{suffix}/{name}_lora_b",
                (*shape[:-2], config.lora.feed_forward_rank, shape[-1]),
                normal(0.01),
            )
    for name, stack in (
        (f"{layers}/pre_attention_norm{suffix}", (depth,)),
        (f"{layers}/pre_ffw_norm{suffix}", (depth,)),
        (f"PaliGemma/llm/final_norm{suffix}", ()),
    ):
        if adaptive:
            # Zeros: at the start every norm is a plain one and every gate is shut, as in openpi.
            yield f"{name}/Dense_0/kernel", (*stack, width, 3 * width), zeros
            yield f"{name}/Dense_0/bias", (*stack, 3 * width), zeros
        else:
            yield f"{name}/scale", (*stack, width), zeros


def table(config: Pi0Config) -> dict[str, tuple[tuple[int, ...], Initializer]]:
    """Return {name: (shape, initialiser)} of every parameter array, names joined by "/"."""
    width, expert = config.paligemma.width, config.action_expert.width
    rows = [
        *siglip_table(config.siglip, width),
        (
            "PaliGemma/llm/embedder/input_embedding",
            (config.vocab_size, width),
            normal(1 / math.sqrt(width)),
        ),
        *gemma_table(config.paligemma, "", adaptive=False),
        *gemma_table(config.action_expert, "_1", adaptive=config.is_pi05),
        *dense("action_in_proj", config.action_dim, expert),
        *dense("action_out_proj", expert, config.action_dim),
    ]
    if config.is_pi05:
        rows += [*dense("time_mlp_in", expert, expert), *dense("time_mlp_out", expert, expert)]
        if config.continuous_state_token:
            rows += [*dense("state_proj", config.action_dim, width)]
    else:
        rows += [
            *dense("state_proj", config.action_dim, expert),
            *dense("action_time_mlp_in", 2 * expert, expert),
            *dense("action_time_mlp_out", expert, expert),
        ]
    return {name: (shape, initializer) for name, shape, initializer in rows}


def unflatten(flat: dict[str, object]) -> dict:
    """Return the nested dictionary of {"a/b": value}."""
    nested: dict = {}
    for name, value in flat.items():
        *parents, last = name.split("/")
        place = nested
        for parent in parents:
            place = place.setdefault(parent, {})
        place[last] = value
    return nested


def flatten(nested: dict, prefix: str = "") -> dict[str, object]:
    """Return {"a/b": value} of a nested dictionary."""
    flat: dict[str, object] = {}
    for key, value in nested.items():
        flat |= (
            flatten(value, f"{prefix}{key}/")
            if isinstance(value, dict)
            else {f"{prefix}{key}": value}
        )
    return flat


def init_params(config: Pi0Config, key: jax.Array) -> dict:
    """Return fresh parameters, a nested dictionary of float32 arrays with openpi's names.

    Args:
        key: a JAX random key; every array draws from its own, by its place in the sorted table.
    """
    rows = table(config)
    keys = jax.random.split(key, len(rows))
    return unflatten(
        {
            name: rows[name][1](one, rows[name][0])
            for name, one in zip(sorted(rows), keys, strict=True)
        }
    )


def is_trainable(config: Pi0Config, name: str) -> bool:
    """Return whether training changes an array; with LoRA in a language tower, all others of that tower are frozen, as in openpi."""
    if "/llm/" not in name or "lora" in name:
        return True
    # Only the expert's names end a part in "_1"; the token embedding belongs to PaliGemma's tower.
    tower = (
        config.action_expert
        if any(part.endswith("_1") for part in name.split("/"))
        else config.paligemma
    )
    return tower.lora is None


def split_trainable(config: Pi0Config, params: dict) -> tuple[dict, dict]:
    """Return the arrays that training changes, as they are, and those that LoRA freezes, in bfloat16 as openpi keeps them; both flat."""
    flat = flatten(params)
    trained = {name: value for name, value in flat.items() if is_trainable(config, name)}
    return trained, {
        name: value.astype(jnp.bfloat16) for name, value in flat.items() if name not in trained
    }
