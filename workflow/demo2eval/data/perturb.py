"""Joint perturbation: the arm is moved off a demo before an image is rendered (DART).

Demos show the hand only where it should be. A policy can learn to carry on from there without
looking at the image; in an evaluation it drifts off and does not come back. Where actions are
absolute joint targets, those of the demo lead back from anywhere near, and an image of the
displaced arm shows what to do then. DART (Laskey et al., 2017) injects noise while demos are
recorded; here it costs nothing, since recorded states are set and not simulated.
"""

import numpy as np

from demo2eval.data.trajectory import Demo
from demo2eval.robots import ARM_JOINTS, JOINT_LIMITS

NEAR = 10
"""Control steps around a change of the gripper's command in which the perturbation is smaller."""
RISEN = 0.005
"""Meters by which an object must be lifted to move along; before that the closed hand stays."""


def gripper_phases(actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how far the arm may be displaced, and whether the hand is closed, per state of a demo.

    Args:
        actions: [T, A], the last dimension the gripper's command: below 0 closes.

    Returns:
        float64 [T + 1] from 0 at a change of the command to 1 from `NEAR` steps on, and bool [T +
        1]. A gripper that is closed from the start, as in pushing, holds nothing.
    """
    closed = actions[:, -1] < 0
    steps = np.arange(len(actions) + 1)
    changes = np.flatnonzero(closed[1:] != closed[:-1]) + 1
    scale = np.ones(len(steps))
    if len(changes):
        scale = np.minimum(1.0, np.abs(steps[:, None] - changes).min(axis=1) / NEAR)
    was_open = np.logical_or.accumulate(~closed)
    return scale, np.concatenate([[False], closed & was_open])


class JointPerturbation:
    """Displaces the arm of an env in which the states of one demo are set."""

    def __init__(self, env, demo: Demo, std: float, object_name: str):
        """Take an env in the demo's first state.

        Args:
            std: standard deviation on each arm joint, radians.
            object_name: attribute of the env, the object that is manipulated.
        """
        self._base = env.unwrapped
        self._object = getattr(self._base, object_name)
        self._rest_height, self._seed, self._std = self._height(), demo.seed, std
        self._scale, self._closed = gripper_phases(demo.actions)

    def apply(self, step: int) -> None:
        """Displace the arm, and what it holds, at a state that was just set.

        The displacement follows from the demo's seed and the step alone.
        """
        if self._closed[step] and self._height() < self._rest_height + RISEN:
            return
        seed = np.random.SeedSequence([self._seed, step])
        noise = np.random.Generator(np.random.Philox(seed)).standard_normal(ARM_JOINTS)
        offset = self._std * self._scale[step] * noise
        agent = self._base.agent
        before, qpos = agent.tcp.pose, agent.robot.get_qpos().clone()
        arm = np.clip(qpos[0, :ARM_JOINTS].cpu().numpy() + offset, *JOINT_LIMITS)
        qpos[0, :ARM_JOINTS] = qpos.new_tensor(arm)
        agent.robot.set_qpos(qpos)
        if self._closed[step]:
            self._object.set_pose(agent.tcp.pose * before.inv() * self._object.pose)

    def _height(self) -> float:
        return float(self._object.pose.p[0, 2])
