"""The state vector of a policy: named parts of ManiSkill's observation in a configured order."""

from collections.abc import Mapping, Sequence

import numpy as np

from demo2eval.errors import UserError
from demo2eval.maniskill.tasks import STATE_DIMS, find_task

JOINTS = [f"panda_joint{number}" for number in range(1, 8)] + [
    "panda_finger_joint1",
    "panda_finger_joint2",
]
DIMENSION_NAMES = {
    "qpos": JOINTS,
    "tcp_pose": ["tcp_x", "tcp_y", "tcp_z", "tcp_qw", "tcp_qx", "tcp_qy", "tcp_qz"],
    "goal_pos": ["goal_x", "goal_y", "goal_z"],
    "bin_pos": ["bin_x", "bin_y", "bin_z"],
}


def check_state_parts(task: str, parts: Sequence[str]) -> None:
    """Raise a UserError that names a part of the state vector that the task does not have."""
    known = find_task(task).state_parts
    for part in parts:
        if part not in known:
            raise UserError(
                f"dataset.state of {task} holds {part!r}, which the task lacks; it has {', '.join(known)}."
            )


def state_dim(parts: Sequence[str]) -> int:
    """Return the length of the state vector."""
    return sum(STATE_DIMS[part] for part in parts)


def state_names(parts: Sequence[str]) -> list[str]:
    """Return the name of each dimension of the state vector."""
    return [name for part in parts for name in DIMENSION_NAMES[part]]


def state_vector(parts: Sequence[str], arrays: Mapping[str, np.ndarray]) -> np.ndarray:
    """Concatenate parts of an observation.

    Args:
        parts: names, in order.
        arrays: part -> [..., dim of the part], meters, radians and unit quaternions (w, x, y, z) as ManiSkill gives them.

    Returns:
        float32 [..., state_dim(parts)].
    """
    return np.concatenate([np.asarray(arrays[part], dtype=np.float32) for part in parts], axis=-1)
