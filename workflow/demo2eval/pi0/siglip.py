"""SigLIP, the vision encoder: one token for each patch of an image.

Zhai et al., 2023; Dosovitskiy et al., 2021.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from demo2eval.pi0.config import SiglipConfig
from demo2eval.pi0.layers import apply_layers, dense, fused_attention


def layer_norm(params: dict, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
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
    config: SiglipConfig, params: dict, x: Float[Array, "b n d"]
) -> Float[Array, "b n d"]:
    """Multi-head self-attention of all tokens."""
    if "qkv" in params:  # joined by sampling.fold_params
        query, key, value = jnp.split(
            dense(params["qkv"], x).reshape(*x.shape[:2], 3 * config.num_heads, -1), 3, axis=2
        )
        encoded = fused_attention(query, key, value)
    else:
        query, key, value = (
            jnp.einsum("bnd,dhk->bnhk", x, params[name]["kernel"].astype(x.dtype))
            + params[name]["bias"].astype(x.dtype)
            for name in ("query", "key", "value")
        )
        logits = jnp.einsum(
            "bqhk,bnhk->bhqn", query / jnp.sqrt(query.shape[-1]).astype(x.dtype), key
        )
        encoded = jnp.einsum("bhqn,bnhk->bqhk", jax.nn.softmax(logits, axis=-1), value)
    out = {
        "kernel": params["out"]["kernel"].reshape(config.width, config.width),
        "bias": params["out"]["bias"],
    }
    return dense(out, encoded.reshape(x.shape))


def block(config: SiglipConfig, params: dict, x: Float[Array, "b n d"]) -> Float[Array, "b n d"]:
    """One pre-norm transformer block."""
    x = x + attention(
        config, params["MultiHeadDotProductAttention_0"], layer_norm(params["LayerNorm_0"], x)
    )
    hidden = dense(params["MlpBlock_0"]["Dense_0"], layer_norm(params["LayerNorm_1"], x))
    return x + dense(params["MlpBlock_0"]["Dense_1"], jax.nn.gelu(hidden, approximate=True))


def encode(
    config: SiglipConfig, params: dict, images: Float[Array, "b h w 3"], dtype, remat: bool
) -> Float[Array, "b n d"]:
    """Encode images.

    Args:
        params: the tree below PaliGemma/img.
        images: float32 in [-1, 1].
        dtype: of the transformer; the patch embedding is computed in float32.

    Returns:
        one token per patch, in `dtype`; d is the width of PaliGemma's expert.
    """
    kernel = params["embedding"]["kernel"].reshape(-1, config.width)
    patches = patchify(images.astype(jnp.float32), config.patch_size)
    x = patches @ kernel + params["embedding"]["bias"]
    x = (x + params["pos_embedding"]).astype(dtype)
    x = apply_layers(partial(block, config), params["Transformer"]["encoderblock"], x, remat=remat)
    return dense(params["head"], layer_norm(params["Transformer"]["encoder_norm"], x))
