"""What both towers are built from."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

UNROLLED_DEPTH = 6


def dense(params: dict, x: jax.Array) -> jax.Array:
    """x @ kernel + bias in x's dtype."""
    return x @ params["kernel"].astype(x.dtype) + params["bias"].astype(x.dtype)


def over_layers(step: Callable, stacked: dict, carry, *, extra=None, remat: bool = False):
    """Apply `step` layer by layer to parameters that are stacked along their first axis.

    Shallow towers are unrolled, since a loop costs more than it saves there, above all on a CPU; deep ones are scanned.

    Args:
        step: (parameters of the layer, carry[, extra of the layer]) -> (carry, output of the layer).
        stacked: parameters with a leading axis of length depth.
        extra: further input of each layer, stacked likewise, or None.
        remat: recompute each layer in the backward pass.

    Returns:
        (carry, the layers' outputs stacked, or None).
    """
    apply = (
        (lambda layer, carry: step(layer[0], carry)) if extra is None else (lambda layer, carry: step(layer[0], carry, layer[1]))
    )
    apply = jax.checkpoint(apply, prevent_cse=False) if remat else apply
    inputs = (stacked, extra)
    depth = len(jax.tree.leaves(stacked)[0])
    if depth > UNROLLED_DEPTH:
        return jax.lax.scan(lambda carry, layer: apply(layer, carry), carry, inputs)
    outputs = []
    for index in range(depth):
        carry, output = apply(jax.tree.map(lambda array: array[index], inputs), carry)  # noqa: B023  (used at once)
        outputs.append(output)
    return carry, jax.tree.map(lambda *layers: jnp.stack(layers), *outputs)
