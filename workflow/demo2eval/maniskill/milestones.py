"""How far an episode comes, by the simulator's own state: the stages of a task, in the order in which a demonstration passes them."""

from collections.abc import Mapping

import numpy as np

from demo2eval.maniskill.tasks import find_task

NOTHING = "nothing"
"""The stage of an episode that did not even reach the object."""
MOVED, LIFTED = 0.02, 0.02
"""Meters from where the object lay, along the table and upwards."""


class Progress:
    """Follows one episode from its start and keeps the furthest stage that was seen, and how near the gripper came to the object.

    reach: the tool centre point was within the task's `reach` of the object (of its long axis, for the peg). grasp: ManiSkill calls the
    object grasped. lift: it is held 2 cm higher than it lay. move: it lies 2 cm off its place. place: ManiSkill's own condition of
    the object's place, held or not. The last stage is success.
    """

    def __init__(self, environment):
        """Take an environment that was just reset."""
        self._base = environment.unwrapped
        self._task = find_task(environment.spec.id)
        self._object = getattr(self._base, self._task.object)
        self._start = self._position()
        self._furthest = -1
        self.nearest = self._distance()
        """Smallest distance so far of the tool centre point from the object, meters."""

    @property
    def furthest(self) -> str:
        """The furthest stage so far."""
        return NOTHING if self._furthest < 0 else self._task.stages[self._furthest]

    def see(self, information: Mapping) -> None:
        """Look at the state after a step; `information` is the last value of `environment.step`."""
        self.nearest = min(self.nearest, self._distance())
        for index in range(len(self._task.stages) - 1, self._furthest, -1):
            if self._passed(self._task.stages[index], information):
                self._furthest = index
                return

    def _passed(self, stage: str, information: Mapping) -> bool:
        if stage == self._task.stages[-1]:
            return bool(information["success"])
        if stage == "place":
            return bool(information[self._task.placed])
        if stage == "reach":
            return self.nearest <= self._task.reach
        if stage == "move":
            return bool(np.linalg.norm((self._position() - self._start)[:2]) >= MOVED)
        held = bool(self._base.agent.is_grasping(self._object)[0])
        return held and (stage == "grasp" or bool(self._position()[2] - self._start[2] >= LIFTED))

    def _position(self) -> np.ndarray:
        return np.asarray(self._object.pose.p[0].cpu())

    def _distance(self) -> float:
        gripper = self._object.pose.inv() * self._base.agent.tcp.pose
        offset = np.asarray(gripper.p[0].cpu(), np.float64)
        if self._task.half_length is not None:
            half = float(getattr(self._base, self._task.half_length)[0, 0])
            offset[0] -= np.clip(offset[0], -half, half)
        return float(np.linalg.norm(offset))
