"""The state vector of a policy: named parts of ManiSkill's observation in a configured order."""

from collections.abc import Mapping, Sequence

import numpy as np

from demo2eval.robots import JOINTS

AXES = {"pos": ["x", "y", "z"], "pose": ["x", "y", "z", "qw", "qx", "qy", "qz"]}
"""Dimensions of the parts that ManiSkill calls <thing>_pos and <thing>_pose."""


def state_names(parts: Sequence[str], dims: Mapping[str, int]) -> list[str]:
    """Return the name of each dimension of the state vector.

    Args:
        parts: names, in order.
        dims: part -> number of dimensions. A part whose dimensions have no names of their own is
            numbered, `<part>_0` and so on.
    """
    names = []
    for part in parts:
        thing, _, kind = part.rpartition("_")
        known = JOINTS if part == "qpos" else [f"{thing}_{axis}" for axis in AXES.get(kind, [])]
        numbered = [f"{part}_{index}" for index in range(dims[part])]
        names += known if len(known) == dims[part] else numbered
    return names


def state_vector(parts: Sequence[str], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Concatenate parts of an observation.

    Args:
        parts: names, in order.
        arrays: part -> [..., dim of the part]; meters, radians and unit quaternions (w, x, y, z) as
            ManiSkill gives them.

    Returns:
        float32 [..., sum of the parts' dims].
    """
    return np.concatenate([np.asarray(arrays[part], np.float32) for part in parts], axis=-1)
