"""SigLIP's vision transformer: one token for each patch of a picture (Zhai et al., 2023; Dosovitskiy et al., 2021)."""

from functools import partial

import jax
import jax.numpy as jnp

from demo2eval.pi0.config import SiglipConfig
from demo2eval.pi0.layers import dense, fused_attention, over_layers


def layer_norm(params: dict, x: jax.Array) -> jax.Array:
    """Layer normalisation over the last axis in float32, eps 1e-6; returns x's dtype."""
    wide = x.astype(jnp.float32)
    mean = wide.mean(-1, keepdims=True)
    variance = jnp.square(wide).mean(-1, keepdims=True) - jnp.square(mean)
    normed = (wide - mean) * jax.lax.rsqrt(jnp.maximum(variance, 0) + 1e-6)
    return (normed * params["scale"] + params["bias"]).astype(x.dtype)


def patches(images: jax.Array, size: int) -> jax.Array:
    """Cut images [b, h, w, 3] into [b, (h/size)(w/size), size * size * 3], row by row."""
    batch, height, width, channels = images.shape
    rows, columns = height // size, width // size
    cut = images[:, : rows * size, : columns * size].reshape(
        batch, rows, size, columns, size, channels
    )
    return cut.transpose(0, 1, 3, 2, 4, 5).reshape(batch, rows * columns, size * size * channels)


def attention(config: SiglipConfig, params: dict, x: jax.Array) -> jax.Array:
    """Multi-head self-attention of all tokens, [b, n, width] -> [b, n, width]."""

    def project(name):
        return jnp.einsum("bnd,dhk->bnhk", x, params[name]["kernel"].astype(x.dtype)) + params[
            name
        ]["bias"].astype(x.dtype)

    if "qkv" in params:
        query, key, value = jnp.split(
            dense(params["qkv"], x).reshape(*x.shape[:2], 3 * config.num_heads, -1), 3, axis=2
        )
        mixed = fused_attention(query, key, value)
    else:
        query, key, value = project("query"), project("key"), project("value")
        logits = jnp.einsum(
            "bqhk,bnhk->bhqn", query / jnp.sqrt(query.shape[-1]).astype(x.dtype), key
        )
        mixed = jnp.einsum("bhqn,bnhk->bqhk", jax.nn.softmax(logits, axis=-1), value)
    out = {
        "kernel": params["out"]["kernel"].reshape(config.width, config.width),
        "bias": params["out"]["bias"],
    }
    return dense(out, mixed.reshape(x.shape))


def block(config: SiglipConfig, params: dict, x: jax.Array) -> jax.Array:
    """One pre-norm transformer block."""
    x = x + attention(
        config, params["MultiHeadDotProductAttention_0"], layer_norm(params["LayerNorm_0"], x)
    )
    hidden = dense(params["MlpBlock_0"]["Dense_0"], layer_norm(params["LayerNorm_1"], x))
    return x + dense(params["MlpBlock_0"]["Dense_1"], jax.nn.gelu(hidden, approximate=True))


def encode(config: SiglipConfig, params: dict, images: jax.Array, dtype, remat: bool) -> jax.Array:
    """Encode pictures.

    Args:
        params: the tree below PaliGemma/img.
        images: float32 [b, h, w, 3] in [-1, 1].
        dtype: of the transformer; the patch embedding is computed in float32.

    Returns:
        [b, tokens, width of the language tower] in `dtype`.
    """
    kernel = params["embedding"]["kernel"].reshape(-1, config.width)
    x = (
        patches(images.astype(jnp.float32), config.patch_size) @ kernel
        + params["embedding"]["bias"]
    )
    x = (x + params["pos_embedding"]).astype(dtype)
    x = over_layers(partial(block, config), params["Transformer"]["encoderblock"], x, remat=remat)
    return dense(params["head"], layer_norm(params["Transformer"]["encoder_norm"], x))
