"""The six tasks, with the facts about them that a configuration or an evaluation can get wrong."""

import difflib
from collections.abc import Iterable
from dataclasses import dataclass

from demo2eval.errors import UserError


@dataclass(frozen=True)
class Task:
    """A ManiSkill task.

    Attributes:
        name: ManiSkill's environment id.
        state_parts: what the state vector can be made of.
        hidden_goal: the part of the state that holds the goal, where no camera shows it; None where one does.
        longest_demonstration: control steps of the longest demonstration that the motion planner was seen to make.
        object: what is manipulated, an attribute of ManiSkill's environment.
        reach: distance, meters, of the tool centre point from it at which it counts as reached.
        stages: through which a demonstration goes, in order; the last is success (`demo2eval.maniskill.milestones`).
        placed: what ManiSkill's information calls the object's being in its place; None where that is success.
        half_length: attribute with half the length of a long object, shape [1, 3], along its x axis; None for a compact one.
        robot: ManiSkill's default robot for the task. All of its environments have it, from planning to evaluation: the two Pandas
            start with their last joint turned by 90 degrees from each other.
    """

    name: str
    state_parts: tuple[str, ...]
    hidden_goal: str | None
    longest_demonstration: int
    robot: str
    object: str
    reach: float
    stages: tuple[str, ...]
    placed: str | None = None
    half_length: str | None = None

    @property
    def cameras(self) -> tuple[str, ...]:
        """Cameras that a policy can be given: the task's own, and those of its robot."""
        return ("base_camera", *ROBOT_CAMERAS[self.robot])


ROBOT_CAMERAS = {"panda": (), "panda_wristcam": ("hand_camera",)}
STACK, PICK, PUSH = (
    ("reach", "grasp", "lift", "place", "release"),
    ("reach", "grasp", "lift", "place", "rest"),
    ("reach", "move", "place"),
)
INSERT = ("reach", "grasp", "lift", "insert")
TASKS = {
    task.name: task
    for task in (
        Task(
            "StackCube-v1",
            ("qpos", "tcp_pose"),
            None,
            120,
            "panda_wristcam",
            "cubeA",
            0.025,
            STACK,
            "is_cubeA_on_cubeB",
        ),
        Task(
            "PickCube-v1",
            ("qpos", "tcp_pose", "goal_pos"),
            "goal_pos",
            88,
            "panda",
            "cube",
            0.025,
            PICK,
            "is_obj_placed",
        ),
        Task("PushCube-v1", ("qpos", "tcp_pose"), None, 77, "panda", "obj", 0.07, PUSH),
        Task("PullCube-v1", ("qpos", "tcp_pose", "goal_pos"), None, 79, "panda", "obj", 0.07, PUSH),
        Task(
            "PlaceSphere-v1",
            ("qpos", "tcp_pose", "bin_pos"),
            None,
            130,
            "panda",
            "obj",
            0.025,
            STACK,
            "is_obj_on_bin",
        ),
        Task(
            "PegInsertionSide-v1",
            ("qpos", "tcp_pose"),
            None,
            205,
            "panda_wristcam",
            "peg",
            0.025,
            INSERT,
            half_length="peg_half_sizes",
        ),
    )
}
STATE_DIMS = {"qpos": 9, "tcp_pose": 7, "goal_pos": 3, "bin_pos": 3}


def find_task(name: str) -> Task:
    """Return a task by its ManiSkill id.

    Raises:
        UserError: if it is none of the six; names the nearest.
    """
    if name not in TASKS:
        close = difflib.get_close_matches(name, TASKS, n=1, cutoff=0.3)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"there is no task {name!r}; there are {', '.join(TASKS)}.{hint}")
    return TASKS[name]


def check_cameras(task: str, cameras: Iterable[str]) -> None:
    """Raise a UserError that names a camera which the task or its robot does not have."""
    known = find_task(task).cameras
    for camera in cameras:
        if camera not in known:
            close = difflib.get_close_matches(camera, known, n=1, cutoff=0.5)
            hint = f" Did you mean {close[0]!r}?" if close else ""
            raise UserError(
                f"replay.cameras of {task} holds {camera!r}, which the task lacks; it has {', '.join(known)}.{hint}"
            )
