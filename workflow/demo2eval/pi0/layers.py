"""What both towers are built from."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

UNROLLED_DEPTH = 6


def dense(params: dict, x: jax.Array) -> jax.Array:
    """x @ kernel + bias in x's dtype."""
    return x @ params["kernel"].astype(x.dtype) + params["bias"].astype(x.dtype)


def has_fused_attention(dtype) -> bool:
    """Whether this device computes attention of this dtype in one kernel (cuDNN's)."""
    return jax.default_backend() == "gpu" and dtype in (jnp.bfloat16, jnp.float16)


def fused_attention(
    query: jax.Array, key: jax.Array, value: jax.Array, scale: float | None = None
) -> jax.Array:
    """Attention of all queries [b, q, heads, head_dim] to all keys and values [b, n, kv heads, head_dim] in one kernel, if there is one.

    Args:
        scale: of the logits; None is head_dim^-0.5.
    """
    implementation = "cudnn" if has_fused_attention(query.dtype) else "xla"
    return jax.nn.dot_product_attention(
        query, key, value, scale=scale, implementation=implementation
    )


def over_layers(step: Callable, params: dict | list, carry, *, remat: bool = False):
    """Apply `step` layer by layer.

    Shallow towers are unrolled, since a loop costs more than it saves there, above all on a CPU; deep ones are scanned.

    Args:
        step: (parameters of the layer, carry) -> carry.
        params: the layers' parameters, stacked along a leading axis of length depth; or a list of each layer's, always unrolled.
        remat: recompute each layer in the backward pass.

    Returns:
        carry.
    """
    step = jax.checkpoint(step, prevent_cse=False) if remat else step
    if isinstance(params, dict):
        depth = len(jax.tree.leaves(params)[0])
        if depth > UNROLLED_DEPTH:
            return jax.lax.scan(lambda carry, layer: (step(layer, carry), None), carry, params)[0]
        params = unstack(params)
    for layer in params:
        carry = step(layer, carry)
    return carry


def unstack(params: dict) -> list[dict]:
    """Return the list of each layer's parameters, given them stacked along a leading axis."""
    depth = len(jax.tree.leaves(params)[0])
    return [jax.tree.map(lambda array: array[index], params) for index in range(depth)]  # noqa: B023  (used at once)
