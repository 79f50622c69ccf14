"""SigLIP, the vision encoder: one token for each patch of an image.

Zhai et al., 2023; Dosovitskiy et al., 2021.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Float

from demo2eval.pi0.config import SiglipConfig
from demo2eval.pi0.layers import (
    apply_layers,
    dense,
    fused_attention,
    has_fused_attention,
    unstack,
)


def layer_norm(params: dict, x: Float[Array, "*b d"]) -> Float[Array, "*b d"]:
    """Layer normalization over the last axis in float32, eps 1e-6; returns x's dtype."""
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean)
    normed = (wide - mean) * jax.lax.rsqrt(jnp.maximum(variance, 0) + 1e-6)
    return (normed * params["scale"] + params["bias"]).astype(x.dtype)


def patchify(images: Float[Array, "b h w c"], size: int) -> Float[Array, "b n {size}*{size}*c"]:
    """Cut images into patches of `size` by `size` pixels, row by row."""
    batch, height, width, channels = images.shape
    rows, columns = height // size, width // size
    cut = images[:, : rows * size, : columns * size].reshape(
        batch, rows, size, columns, size, channels
    )
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, size * size * channels)


def attention(
    config: SiglipConfig, params: dict, x: Float[Array, "tokens d"]
) -> Float[Array, "tokens d"]:
    """Multi-head self-attention of the tokens of each image."""
    heads = (-1, config.num_patches, config.num_heads, config.width // config.num_heads)
    if "qkv" in params:  # joined by sampling.fold_params
        query, key, value = jnp.split(dense(params["qkv"], x), 3, axis=-1)
    else:
        query, key, value = (
            checkpoint_name(dense(_flat(params[name], config.width), x), "qkv")
            for name in ("query", "key", "value")
        )
    query, key, value = (array.reshape(heads) for array in (query, key, value))
    if "qkv" in params or has_fused_attention(x.dtype, config.num_patches):
        encoded = fused_attention(query, key, value)
    else:
        logits = jnp.einsum(
            "bqhk,bnhk->bhqn", query / jnp.sqrt(query.shape[-1]).astype(x.dtype), key
        )
        encoded = jnp.einsum("bhqn,bnhk->bqhk", jax.nn.softmax(logits, axis=-1), value)
    return dense(_flat(params["out"], config.width), encoded.reshape(x.shape))


def _flat(params: dict, width: int) -> dict:
    """Return a Dense layer's parameters with all heads as one axis."""
    return {
        "kernel": params["kernel"].reshape(width, width),
        "bias": params["bias"].reshape(width),
    }


def block(
    config: SiglipConfig, params: dict, x: Float[Array, "tokens d"]
) -> Float[Array, "tokens d"]:
    """One pre-norm transformer block.

    Tokens of all images are one axis, or XLA transposes them again and again on a GPU.
    """
    x = x + attention(
        config, params["MultiHeadDotProductAttention_0"], layer_norm(params["LayerNorm_0"], x)
    )
    x = checkpoint_name(x, "residual")
    hidden = dense(params["MlpBlock_0"]["Dense_0"], layer_norm(params["LayerNorm_1"], x))
    hidden = checkpoint_name(hidden, "hidden")
    return x + dense(params["MlpBlock_0"]["Dense_1"], jax.nn.gelu(hidden, approximate=True))


def encode(
    config: SiglipConfig, params: dict, images: Float[Array, "b h w 3"], dtype, remat: str
) -> Float[Array, "b n d"]:
    """Encode images.

    Args:
        params: the tree below PaliGemma/img.
        images: float32 in [-1, 1].
        dtype: of the transformer; the patch embedding is computed in float32.
        remat: as of `apply_layers`.

    Returns:
        one token per patch, in `dtype`; d is the width of PaliGemma's expert.
    """
    kernel = params["embedding"]["kernel"].reshape(-1, config.width)
    patches = patchify(images.astype(jnp.float32), config.patch_size)
    x = patches @ kernel + params["embedding"]["bias"]
    x = (x + params["pos_embedding"]).astype(dtype)
    layers = unstack(params["Transformer"]["encoderblock"])
    tokens = x.reshape(-1, config.width)
    tokens = apply_layers(partial(block, config), layers, tokens, remat=remat)
    outputs = dense(params["head"], layer_norm(params["Transformer"]["encoder_norm"], tokens))
    return outputs.reshape(*x.shape[:2], -1)
