"""Facts about ManiSkill's Panda robots, which all tasks use."""

from typing import Literal

import numpy as np

Robot = Literal["panda", "panda_wristcam"]
CAMERAS: dict[str, tuple[str, ...]] = {
    "panda": ("base_camera",),
    "panda_wristcam": ("base_camera", "hand_camera"),
}
"""Cameras that a policy can be given: the task's own, then those of the robot."""
ARM_JOINTS = 7
JOINTS = [
    *(f"panda_joint{number}" for number in range(1, 8)),
    "panda_finger_joint1",
    "panda_finger_joint2",
]
ACTION_NAMES = {
    "pd_joint_pos": [*JOINTS[:ARM_JOINTS], "gripper"],
    "pd_joint_delta_pos": [*(f"delta_{joint}" for joint in JOINTS[:ARM_JOINTS]), "gripper"],
    "pd_ee_delta_pos": ["delta_x", "delta_y", "delta_z", "gripper"],
    "pd_ee_delta_pose": [
        "delta_x",
        "delta_y",
        "delta_z",
        "delta_rx",
        "delta_ry",
        "delta_rz",
        "gripper",
    ],
}
ACTION_DIM = {control_mode: len(names) for control_mode, names in ACTION_NAMES.items()}
JOINT_LIMITS = np.array(
    [
        [-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973],
        [2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973],
    ]
)
"""Smallest and largest angle of joints 1 to 7, radians."""


def delta_action_mask(control_mode: str, delta: bool) -> list[bool] | None:
    """Return for each action dimension whether it is a difference from the state; None if none is.

    As in openpi the arm's joints are, and the gripper is not.

    Args:
        control_mode: of the actions.
        delta: the setting `actions.delta`.
    """
    if not delta:
        return None
    return [index < ARM_JOINTS for index in range(ACTION_DIM[control_mode])]
