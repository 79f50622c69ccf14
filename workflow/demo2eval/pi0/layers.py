"""What the vision encoder and the experts are built from."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

SAVED_NAMES = ("qkv", "residual", "hidden")
"""Outputs of matrix products that the backward pass needs: their blocks name them so."""


@jax.custom_vjp
def _use_copy(master: jax.Array, copy: jax.Array) -> jax.Array:
    return copy


_use_copy.defvjp(
    lambda master, copy: (copy, None),
    lambda _, gradient: (gradient.astype(jnp.float32), jnp.zeros_like(gradient)),
)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class CastWeight:
    """A float32 weight that was cast once for many uses; the gradient goes to the float32 weight.

    Attributes:
        master: float32; never read.
        copy: the same in the dtype of the computation.
            Of stacked layers both are lists of each layer's.
    """

    master: Any
    copy: Any

    def astype(self, dtype) -> jax.Array:
        """Return the copy, which must be of this dtype."""
        assert dtype == self.copy.dtype
        return _use_copy(self.master, self.copy)

    def __getitem__(self, index) -> "CastWeight":
        return CastWeight(self.master[index], self.copy[index])

    def __len__(self) -> int:
        return len(self.copy)

    def reshape(self, *shape) -> "CastWeight":
        """Reshape both."""
        return CastWeight(self.master.reshape(*shape), self.copy.reshape(*shape))


def dense(params: dict, x: Float[Array | np.ndarray, "*b i"]) -> Float[Array, "*b o"]:
    """x @ kernel + bias in x's dtype."""
    return x @ params["kernel"].astype(x.dtype) + params["bias"].astype(x.dtype)


def has_fused_attention(dtype, length: int = 0) -> bool:
    """Whether this device computes attention in one kernel (cuDNN's).

    Args:
        length: of queries and keys, if a gradient is wanted, which that kernel has for even ones.
    """
    is_half = dtype in (jnp.bfloat16, jnp.float16)
    return jax.default_backend() == "gpu" and is_half and length % 2 == 0


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


def _is_saved(primitive, *_, **parameters) -> bool:
    """Whether the backward pass finds what a primitive computed, or computes it again."""
    if primitive.name == "name":
        return parameters["name"] in SAVED_NAMES
    return primitive.name.startswith("dot_product_attention_fwd")


def apply_layers(
    block: Callable, layers: Sequence[dict], carry: Any, *, remat: str = "none"
) -> Any:
    """Apply `block` layer by layer.

    Layers are unrolled: a loop would copy each layer's weights and saved outputs out of stacks.

    Args:
        block: (parameters of the layer, carry) -> carry.
        layers: the parameters of each layer.
        remat: what the backward pass computes again: "none", "elementwise" (all but the outputs of
            matrix products and attention) or "all" (each layer from its input).

    Returns:
        carry.
    """
    if remat != "none":
        block = jax.checkpoint(block, policy=_is_saved if remat == "elementwise" else None)
    for layer in layers:
        carry = block(layer, carry)
    return carry


def unstack(params: dict | list) -> list[dict]:
    """Return the list of each layer's parameters, which may be stacked along a leading axis."""
    if isinstance(params, list):
        return params

    def is_leaf(item) -> bool:
        return isinstance(item, CastWeight)

    depth = len(jax.tree.leaves(params, is_leaf=is_leaf)[0])
    return [
        jax.tree.map(lambda array, index=index: array[index], params, is_leaf=is_leaf)
        for index in range(depth)
    ]
