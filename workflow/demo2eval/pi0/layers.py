"""What the vision encoder and the experts are built from."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

UNROLLED_DEPTH = 6


def dense(params: dict, x: Float[Array | np.ndarray, "*b i"]) -> Float[Array, "*b o"]:
    """x @ kernel + bias in x's dtype."""
    return x @ params["kernel"].astype(x.dtype) + params["bias"].astype(x.dtype)


def has_fused_attention(dtype) -> bool:
    """Whether this device computes attention of this dtype in one kernel (cuDNN's)."""
    return jax.default_backend() == "gpu" and dtype in (jnp.bfloat16, jnp.float16)


def fused_attention(
    query: Float[Array, "b q heads head_dim"],
    key: Float[Array, "b n kv_heads head_dim"],
    value: Float[Array, "b n kv_heads head_dim"],
    scale: float | None = None,
) -> Float[Array, "b q heads head_dim"]:
    """Attention of all queries to all keys, in one kernel where the device has it.

    Args:
        scale: of the logits; None is head_dim^-0.5.
    """
    implementation = "cudnn" if has_fused_attention(query.dtype) else "xla"
    return jax.nn.dot_product_attention(
        query, key, value, scale=scale, implementation=implementation
    )


def apply_layers(block: Callable, params: dict | list, carry: Any, *, remat: bool = False) -> Any:
    """Apply `block` layer by layer.

    Shallow models are unrolled, since a loop costs more than it saves there, above all on a CPU;
    deep ones are scanned.

    Args:
        block: (parameters of the layer, carry) -> carry.
        params: the layers' parameters, stacked along a leading axis of length depth; or a list of
            each layer's, always unrolled.
        remat: recompute each layer in the backward pass.

    Returns:
        carry.
    """
    block = jax.checkpoint(block, prevent_cse=False) if remat else block
    if isinstance(params, dict):
        depth = len(jax.tree.leaves(params)[0])
        if depth > UNROLLED_DEPTH:
            return jax.lax.scan(lambda carry, layer: (block(layer, carry), None), carry, params)[0]
        params = unstack(params)
    for layer in params:
        carry = block(layer, carry)
    return carry


def unstack(params: dict) -> list[dict]:
    """Return the list of each layer's parameters, given them stacked along a leading axis."""
    depth = len(jax.tree.leaves(params)[0])
    return [jax.tree.map(lambda array, layer=layer: array[layer], params) for layer in range(depth)]
