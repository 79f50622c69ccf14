"""The parameter tree, with openpi's names and shapes, as one table; and its initialization.

Arrays of the layers of an expert, and those of the vision encoder, are stacked along a leading axis
of length `depth`.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.nn.initializers import ones, zeros

from demo2eval.pi0.config import GemmaConfig, Pi0Config, SiglipConfig

IS_CAST = re.compile(
    r"PaliGemma/(img/(Transformer/encoderblock/M|head)"
    r"|llm/layers/.*/(w|lora_a|lora_b|gating_einsum\w*|linear\w*|kernel|bias)$)"
)
"""Names of the weights that the model casts before each use."""
Initializer = Callable[..., jax.Array]
Row = tuple[str, tuple[int, ...], Initializer]


def normal(std: float) -> Initializer:
    """Normal numbers."""
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


def fan_in(size: int) -> Initializer:
    """Truncated normal numbers of variance 1/size (LeCun et al., 1998)."""

    def draw(key, shape, dtype):
        # 0.8796 is the std of a unit normal cut at +-2.
        return jax.random.truncated_normal(key, -2, 2, shape, dtype) * (
            1 / math.sqrt(size) / 0.87962566103423978
        )

    return draw


def dense_table(name: str, inputs: int, outputs: int, stack: tuple[int, ...] = ()) -> Iterator[Row]:
    """Yield a Dense layer's kernel [inputs, outputs] and bias [outputs]."""
    yield f"{name}/kernel", (*stack, inputs, outputs), fan_in(inputs)
    yield f"{name}/bias", (*stack, outputs), zeros


def siglip_table(config: SiglipConfig, outputs: int) -> Iterator[Row]:
    """Yield the rows of the vision encoder, below PaliGemma/img."""
    root, width, depth = "PaliGemma/img", config.width, config.depth
    head_dim = width // config.num_heads
    patch_inputs = config.patch_size**2 * 3
    yield (
        f"{root}/embedding/kernel",
        (config.patch_size, config.patch_size, 3, width),
        fan_in(patch_inputs),
    )
    yield f"{root}/embedding/bias", (width,), zeros
    yield f"{root}/pos_embedding", (1, config.num_patches, width), normal(1 / math.sqrt(width))
    block = f"{root}/Transformer/encoderblock"
    for norm in ("LayerNorm_0", "LayerNorm_1"):
        yield f"{block}/{norm}/scale", (depth, width), ones
        yield f"{block}/{norm}/bias", (depth, width), zeros
    attention = f"{block}/MultiHeadDotProductAttention_0"
    for name in ("query", "key", "value"):
        shape = (depth, width, config.num_heads, head_dim)
        yield f"{attention}/{name}/kernel", shape, fan_in(width)
        yield f"{attention}/{name}/bias", (depth, config.num_heads, head_dim), zeros
    yield f"{attention}/out/kernel", (depth, config.num_heads, head_dim, width), fan_in(width)
    yield f"{attention}/out/bias", (depth, width), zeros
    yield from dense_table(f"{block}/MlpBlock_0/Dense_0", width, config.mlp_dim, (depth,))
    yield from dense_table(f"{block}/MlpBlock_0/Dense_1", config.mlp_dim, width, (depth,))
    yield f"{root}/Transformer/encoder_norm/scale", (width,), ones
    yield f"{root}/Transformer/encoder_norm/bias", (width,), zeros
    yield from dense_table(f"{root}/head", width, outputs)


def einsum_table(name: str, shape: tuple[int, ...], inputs: int, rank: int | None) -> Iterator[Row]:
    """Yield a matrix [..., in, out] and, with LoRA, its [..., in, rank] and [..., rank, out]."""
    yield f"{name}/w", shape, fan_in(inputs)
    if rank:
        yield f"{name}/lora_a", (*shape[:-1], rank), normal(0.01)
        yield f"{name}/lora_b", (*shape[:-2], rank, shape[-1]), normal(0.01)


def gemma_table(config: GemmaConfig, suffix: str, adaptive: bool) -> Iterator[Row]:
    """Yield the rows of an expert, below PaliGemma/llm.

    Args:
        suffix: of its names; "" for PaliGemma, "_1" for the action expert.
        adaptive: whether its norms are conditioned on time.
    """
    layers, width, depth = "PaliGemma/llm/layers", config.width, config.depth
    heads, kv_heads, head_dim = config.num_heads, config.num_kv_heads, config.head_dim
    rank = config.lora and config.lora.attention_rank
    q, kv, out = (heads, width, head_dim), (kv_heads, width, head_dim), (heads, head_dim, width)
    attention = {"qkv": (3, *q)} if heads == kv_heads else {"q": q, "kv": (2, *kv)}
    for name, shape in attention.items():
        einsum = f"{layers}/attn/{name}_einsum{suffix}"
        yield from einsum_table(einsum, (depth, *shape), width, rank)
    einsum = f"{layers}/attn/attn_vec_einsum{suffix}"
    yield from einsum_table(einsum, (depth, *out), heads * head_dim, rank)
    for name, shape, inputs in (
        ("gating_einsum", (depth, 2, width, config.mlp_dim), width),
        ("linear", (depth, config.mlp_dim, width), config.mlp_dim),
    ):
        yield f"{layers}/mlp{suffix}/{name}", shape, fan_in(inputs)
        if config.lora:
            lora, rank = f"{layers}/mlp{suffix}/{name}_lora", config.lora.feed_forward_rank
            yield f"{lora}_a", (*shape[:-1], rank), normal(0.01)
            yield f"{lora}_b", (*shape[:-2], rank, shape[-1]), normal(0.01)
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


def param_table(config: Pi0Config) -> dict[str, tuple[tuple[int, ...], Initializer]]:
    """Return {name: (shape, initializer)} of every parameter array, names joined by "/"."""
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
        *dense_table("action_in_proj", config.action_dim, expert),
        *dense_table("action_out_proj", expert, config.action_dim),
    ]
    if config.is_pi05:
        rows += [
            *dense_table("time_mlp_in", expert, expert),
            *dense_table("time_mlp_out", expert, expert),
        ]
        if config.continuous_state_token:
            rows += [*dense_table("state_proj", config.action_dim, width)]
    else:
        rows += [
            *dense_table("state_proj", config.action_dim, expert),
            *dense_table("action_time_mlp_in", 2 * expert, expert),
            *dense_table("action_time_mlp_out", expert, expert),
        ]
    return {name: (shape, initializer) for name, shape, initializer in rows}


def flatten(params: Mapping) -> dict[str, Any]:
    """Return {"a/b": value} of a nested dictionary, in its order."""
    return flatten_dict(params, sep="/")


def unflatten(flat: Mapping[str, Any]) -> dict:
    """Return the nested dictionary of {"a/b": value}, in its order."""
    return unflatten_dict(flat, sep="/")


def round_params(flat: Mapping[str, Any]) -> dict[str, Any]:
    """Return parameters with those in bfloat16 that a model of this dtype casts before each use."""
    return {
        name: value.astype(jnp.bfloat16) if IS_CAST.match(name) else value
        for name, value in flat.items()
    }


def init_params(config: Pi0Config, key: jax.Array) -> dict:
    """Return fresh parameters, a nested dictionary of float32 arrays with openpi's names.

    Args:
        key: a JAX random key; every array draws from its own, by its place in the sorted table.
    """
    rows = param_table(config)
    flat = {}
    for name, array_key in zip(sorted(rows), jax.random.split(key, len(rows)), strict=True):
        shape, initializer = rows[name]
        flat[name] = initializer(array_key, shape, jnp.float32)
    return unflatten(flat)


def is_trainable(config: Pi0Config, name: str) -> bool:
    """Return whether training changes an array.

    With LoRA in an expert, all other arrays of that expert are frozen, as in openpi.
    """
    if "/llm/" not in name or "lora" in name:
        return True
    # Only the action expert's names have a "_1"; the token embedding belongs to PaliGemma.
    is_action_expert = any(module.endswith("_1") for module in name.split("/"))
    expert = config.action_expert if is_action_expert else config.paligemma
    return expert.lora is None


def split_trainable(config: Pi0Config, params: dict) -> tuple[dict, dict]:
    """Return the arrays that training changes and those that LoRA freezes, both flat.

    The former are as they were; the latter are in bfloat16, as openpi keeps them.
    """
    flat = flatten(params)
    trainable = {name: value for name, value in flat.items() if is_trainable(config, name)}
    frozen = {
        name: value.astype(jnp.bfloat16) for name, value in flat.items() if name not in trainable
    }
    return trainable, frozen
