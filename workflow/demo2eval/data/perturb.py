"""Looks beside the path: an arm that is moved off a demonstration before its picture is taken.

Demonstrations show the hand only where it should be, so a policy can learn to carry on from there and need never look; in an evaluation it
drifts off and does not come back. Where actions are absolute joint targets, those of the demonstration lead back from anywhere
near, and a picture of the displaced arm shows what to do then. Noise at the time of recording does the same (Laskey et al., DART,
2017); here it costs nothing, since recorded states are set and not simulated.
"""

import numpy as np

from demo2eval.data.chunks import ARM_JOINTS
from demo2eval.data.trajectory import JOINT_LIMITS, Demonstration
from demo2eval.maniskill.tasks import find_task

NEAR = 10
"""Control steps before and after the gripper's opening or closing within which the arm is displaced less, and not at all at it."""
RISEN = 0.005
"""Meters that an object must have been lifted to be moved along with the hand; until then the closed hand stays where it is."""


def gripper_phases(actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return how far the arm may be displaced, and whether the hand was closed on something, at each state of a demonstration.

    Args:
        actions: [T, A], the last dimension the gripper's command: below 0 closes.

    Returns:
        float64 [T + 1] from 0 at a change of command to 1 from `NEAR` steps on, and bool [T + 1]. A gripper that is closed from the start,
        as in pushing, holds nothing.
    """
    closed = actions[:, -1] < 0
    steps = np.arange(len(actions) + 1)
    changes = np.flatnonzero(closed[1:] != closed[:-1]) + 1
    room = np.ones(len(steps))
    if len(changes):
        room = np.minimum(1.0, np.abs(steps[:, None] - changes).min(axis=1) / NEAR)
    was_open = np.logical_or.accumulate(~closed)
    return room, np.concatenate([[False], closed & was_open])


class Displacement:
    """Moves the arm of an environment, in which states of one demonstration are set, off its path."""

    def __init__(self, environment, demonstration: Demonstration, noise: float):
        """Take an environment in the demonstration's first state.

        Args:
            noise: standard deviation on each arm joint, radians.
        """
        self._base = environment.unwrapped
        self._object = getattr(self._base, find_task(environment.spec.id).object)
        self._rest, self._seed, self._noise = self._height(), demonstration.seed, noise
        self._room, self._held = gripper_phases(demonstration.actions)

    def at(self, step: int) -> None:
        """Displace the arm at a state that was just set, and what it holds with it; the noise follows from seed and step alone."""
        if self._held[step] and self._height() < self._rest + RISEN:
            return
        generator = np.random.Generator(
            np.random.Philox(np.random.SeedSequence([self._seed, step]))
        )
        offset = self._noise * self._room[step] * generator.standard_normal(ARM_JOINTS)
        agent = self._base.agent
        before, qpos = agent.tcp.pose, agent.robot.get_qpos().clone()
        arm = np.clip(qpos[0, :ARM_JOINTS].cpu().numpy() + offset, *JOINT_LIMITS)
        qpos[0, :ARM_JOINTS] = qpos.new_tensor(arm)
        agent.robot.set_qpos(qpos)
        if self._held[step]:
            self._object.set_pose(agent.tcp.pose * before.inv() * self._object.pose)

    def _height(self) -> float:
        return float(self._object.pose.p[0, 2])
