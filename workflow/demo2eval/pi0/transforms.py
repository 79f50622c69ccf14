"""Transforms of states and actions between the dataset and the model, and back.

They are openpi's PadStatesAndActions, DeltaActions and AbsoluteActions. Normalization is in
`normalize`, images are in `image`, the prompt is in `tokenizer`.
"""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float


def pad(values: Float[np.ndarray, "*b d"], dim: int) -> Float[np.ndarray, "*b dim"]:
    """Pad the last axis with zeros to `dim`; longer values are returned as they are."""
    missing = dim - values.shape[-1]
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)]) if missing > 0 else values


def delta_actions(
    actions: Float[np.ndarray, "*b ah ad"],
    state: Float[np.ndarray, "*b s"],
    mask: Sequence[bool],
) -> Float[np.ndarray, "*b ah ad"]:
    """Subtract the state from every action of the chunk, in the masked dimensions.

    Args:
        actions: chunks of `ah` actions.
        state: the state at the chunk's first step; s is at least len(mask).
        mask: for each of the first dimensions whether to subtract.
    """
    deltas = np.array(actions, copy=True)
    deltas[..., : len(mask)] -= _masked_state(state, mask).astype(deltas.dtype)
    return deltas


def absolute_actions(
    actions: Float[np.ndarray, "*b ah ad"],
    state: Float[np.ndarray, "*b s"],
    mask: Sequence[bool],
) -> Float[np.ndarray, "*b ah ad"]:
    """Undo `delta_actions`."""
    absolute = np.array(actions, copy=True)
    absolute[..., : len(mask)] += _masked_state(state, mask).astype(absolute.dtype)
    return absolute


def _masked_state(state: np.ndarray, mask: Sequence[bool]) -> np.ndarray:
    subtracted = np.asarray(mask, bool)
    return np.where(subtracted, state[..., : len(subtracted)], 0)[..., None, :]
