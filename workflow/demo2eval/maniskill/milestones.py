"""How far an episode comes, by the env's own state: the milestones of a task, in order.

- reach: the tool center point was within `reach_distance` of the object, or of its long axis.
- grasp: ManiSkill says that the object is grasped.
- lift: it is grasped, 2 cm above where it lay.
- move: it is 2 cm away, along the table, from where it lay.
- place: ManiSkill's own condition, `placed`, whether the object is held or not.
- The last one, whatever its name: success.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from demo2eval.config import Milestones

NOTHING = "nothing"
"""The milestone of an episode that did not even reach the object."""
MOVE_DISTANCE, LIFT_HEIGHT = 0.02, 0.02
"""Meters."""


class MilestoneTracker:
    """Follows one episode and keeps its furthest milestone.

    Attributes:
        nearest: smallest distance so far of the tool center point from the object, meters.
    """

    def __init__(self, env: Any, object_name: str, milestones: Milestones):
        """Start at the state of an env that was just reset.

        Args:
            object_name: attribute of the env, the object that is manipulated.
            milestones: the task's.
        """
        self._base = env.unwrapped
        self._object = getattr(self._base, object_name)
        self._milestones = milestones
        self._start = self._position()
        self._furthest = -1
        self.nearest = self._distance()

    @property
    def furthest(self) -> str:
        """The furthest milestone so far."""
        return NOTHING if self._furthest < 0 else self._milestones.names[self._furthest]

    def update(self, info: Mapping) -> None:
        """Take the state after a step, and the `info` that `env.step` returned."""
        self.nearest = min(self.nearest, self._distance())
        for index in range(len(self._milestones.names) - 1, self._furthest, -1):
            if self._is_passed(index, info):
                self._furthest = index
                return

    def _is_passed(self, index: int, info: Mapping) -> bool:
        if index == len(self._milestones.names) - 1:
            return bool(info["success"])
        moved = self._position() - self._start
        match self._milestones.names[index]:
            case "reach":
                return self.nearest <= self._milestones.reach_distance
            case "grasp":
                return self._is_grasped()
            case "lift":
                return self._is_grasped() and bool(moved[2] >= LIFT_HEIGHT)
            case "move":
                return bool(np.linalg.norm(moved[:2]) >= MOVE_DISTANCE)
            case "place":
                return bool(info[self._milestones.placed])
            case name:
                raise ValueError(f"{name!r} may only be the last milestone")

    def _is_grasped(self) -> bool:
        return bool(self._base.agent.is_grasping(self._object)[0])

    def _position(self) -> np.ndarray:
        return np.asarray(self._object.pose.p[0].cpu())

    def _distance(self) -> float:
        gripper = self._object.pose.inv() * self._base.agent.tcp.pose
        offset = np.asarray(gripper.p[0].cpu(), np.float64)
        if self._milestones.half_length is not None:
            half_length = float(getattr(self._base, self._milestones.half_length)[0, 0])
            offset[0] -= np.clip(offset[0], -half_length, half_length)
        return float(np.linalg.norm(offset))
