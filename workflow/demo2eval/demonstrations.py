"""Reading and checking demonstrations in ManiSkill's trajectory format: `<name>.h5` and `<name>.json` beside it."""

import hashlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo2eval.errors import UserError
from demo2eval.maniskill.tasks import find_task

ACTION_WIDTH = {"pd_joint_pos": 8, "pd_joint_delta_pos": 8, "pd_ee_delta_pos": 4, "pd_ee_delta_pose": 7}
FINDINGS_SHOWN = 20


@dataclass(frozen=True)
class Demonstration:
    """One recorded trajectory of T control steps.

    Attributes:
        name: its group in the file, such as "traj_0".
        seed: with which the environment was reset.
        actions: float32 [T, A].
        states: environment states before the first and after every action, {"actors/cube": float32 [T + 1, 13], ...}.
        success: of every step, bool [T].
    """

    name: str
    seed: int
    control_mode: str
    actions: np.ndarray
    states: dict[str, np.ndarray]
    success: np.ndarray


@dataclass(frozen=True)
class Finding:
    """One thing that is wrong: in which file, in which trajectory ("" for the file itself), and what."""

    file: Path
    trajectory: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}{' ' + self.trajectory if self.trajectory else ''}: {self.reason}"


def refuse(findings: list[Finding]) -> None:
    """Raise a UserError that lists the findings, if there are any."""
    if findings:
        shown = "; ".join(str(finding) for finding in findings[:FINDINGS_SHOWN])
        more = f"; and {len(findings) - FINDINGS_SHOWN} more" if len(findings) > FINDINGS_SHOWN else ""
        raise UserError(f"{shown}{more}. Record or copy the demonstrations again, or take these trajectories out.")


def read_description(file: Path) -> dict:
    """Read the .json beside an .h5 file.

    Raises:
        UserError: if it is missing or is not ManiSkill's.
    """
    description_file = file.with_suffix(".json")
    try:
        description = json.loads(description_file.read_text(encoding="utf-8"))
        if not isinstance(description["episodes"], list) or "env_id" not in description["env_info"]:
            raise KeyError("episodes")
    except FileNotFoundError:
        raise UserError(f"{description_file} does not exist; ManiSkill's trajectories need it beside {file.name}.") from None
    except (json.JSONDecodeError, KeyError, TypeError):
        raise UserError(f"{description_file} is not the description of a ManiSkill trajectory file; copy it again.") from None
    return description


def read_demonstrations(file: Path, task: str) -> tuple[list[Demonstration], dict]:
    """Read and check every demonstration of a file.

    Returns:
        (demonstrations in the order of the .json, the .json itself).

    Raises:
        UserError: lists everything that is wrong: the file does not open, is of another task, or trajectories are damaged.
    """
    import h5py

    find_task(task)
    if not Path(file).is_file():
        raise UserError(f"{file} does not exist; give a ManiSkill trajectory file, .h5 with its .json beside it.")
    description = read_description(Path(file))
    if description["env_info"]["env_id"] != task:
        raise UserError(f"{file} holds demonstrations of {description['env_info']['env_id']}, not of {task}; set the run's task.")
    check_robot(Path(file), task, description)
    findings: list[Finding] = []
    demonstrations: list[Demonstration] = []
    try:
        content = h5py.File(file, "r")
    except OSError as error:
        raise UserError(f"{file} cannot be opened ({error}): it is cut off or not HDF5; copy or record it again.") from None
    with content:
        for episode in description["episodes"]:
            found, demonstration = read_one(content, Path(file), episode, find_task(task).robot)
            findings.extend(found)
            if demonstration is not None:
                demonstrations.append(demonstration)
    findings.extend(repetitions(Path(file), demonstrations))
    if not description["episodes"]:
        findings.append(Finding(Path(file), "", "holds no demonstration"))
    refuse(findings)
    return demonstrations, description


def check_robot(file: Path, task: str, description: dict) -> None:
    """Raise a UserError if the .json says that another robot than the task's was recorded; many files do not say it."""
    robot = find_task(task).robot
    recorded = (description["env_info"].get("env_kwargs") or {}).get("robot_uids", robot)
    if recorded not in (robot, [robot]):
        raise UserError(
            f"{file.with_suffix('.json')} says that {task} was recorded with the robot {recorded}, but it is evaluated with {robot}, "
            f"which starts in another pose; record it with robot_uids={robot!r}."
        )


def read_one(content, file: Path, episode: dict, robot: str) -> tuple[list[Finding], Demonstration | None]:
    """Read one trajectory; return what is wrong with it, or the demonstration."""
    name = f"traj_{episode.get('episode_id')}"

    def wrong(reason: str) -> tuple[list[Finding], None]:
        return [Finding(file, name, reason)], None

    if name not in content:
        return wrong("is listed in the .json but missing in the .h5")
    group = content[name]
    missing = [key for key in ("actions", "env_states", "success") if key not in group]
    if missing:
        return wrong(f"lacks {', '.join(missing)}")
    try:
        states = {key: np.asarray(values, dtype=np.float32) for key, values in datasets(group["env_states"])}
        demonstration = Demonstration(
            name=name,
            seed=int(np.ravel(episode["episode_seed"])[0]),
            control_mode=episode["control_mode"],
            actions=group["actions"][()],
            states=states,
            success=group["success"][()].astype(bool).reshape(-1),
        )
    except OSError as error:
        return wrong(f"cannot be read ({error}): a part of the file is damaged")
    except (KeyError, TypeError, IndexError) as error:
        return wrong(f"its entry in the .json is incomplete ({error})")
    return [Finding(file, name, reason) for reason in faults(demonstration, robot)], demonstration


def datasets(group, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yield (path, array) of every dataset below an HDF5 group."""
    for key, item in group.items():
        if hasattr(item, "shape"):
            yield f"{prefix}{key}", item[()]
        else:
            yield from datasets(item, f"{prefix}{key}/")


def faults(demonstration: Demonstration, robot: str) -> Iterator[str]:
    """Yield what is wrong with one demonstration of a task that is played by `robot`, each in a few words."""
    actions = demonstration.actions
    width = ACTION_WIDTH.get(demonstration.control_mode)
    if actions.ndim != 2 or actions.dtype != np.float32:
        yield f"its actions are {actions.dtype} {list(actions.shape)}, not float32 [T, A]"
        return
    if len(actions) < 2:
        yield f"it has {len(actions)} actions; at least 2 are needed"
    if width is not None and actions.shape[1] != width:
        yield f"its actions have {actions.shape[1]} dimensions, but {demonstration.control_mode} has {width}"
    if not np.isfinite(actions).all():
        yield f"its actions are not finite at step {int(np.argwhere(~np.isfinite(actions))[0, 0])}"
    elif demonstration.control_mode != "pd_joint_pos" and np.abs(actions).max(initial=0) > 1 + 1e-3:
        yield f"its actions reach {np.abs(actions).max():.3g}, outside the [-1, 1] of {demonstration.control_mode}"
    elif demonstration.control_mode == "pd_joint_pos" and not actions.any(axis=1).all():
        yield f"its actions are all zero at step {int(np.argmin(actions.any(axis=1)))}: a block of the file was lost"
    robots = [key.removeprefix("articulations/") for key in demonstration.states if key.startswith("articulations/")]
    if robots != [robot]:
        yield f"its env_states are of the robot {', '.join(robots) or '(none)'}, but the task is evaluated with {robot}"
    for key, values in demonstration.states.items():
        if len(values) != len(actions) + 1:
            yield f"env_states/{key} has {len(values)} steps for {len(actions)} actions; it should have one more than actions"
        elif not np.isfinite(values).all():
            yield f"env_states/{key} is not finite at step {int(np.argwhere(~np.isfinite(values))[0, 0])}"
    if len(demonstration.success) != len(actions):
        yield f"success has {len(demonstration.success)} steps for {len(actions)} actions"
    elif len(actions) and not demonstration.success[-1]:
        yield "it does not end in success"


def repetitions(file: Path, demonstrations: list[Demonstration]) -> Iterator[Finding]:
    """Yield a finding for each demonstration whose actions and first state are those of an earlier one."""
    seen: dict[str, str] = {}
    for demonstration in demonstrations:
        first_state = b"".join(values[:1].tobytes() for _, values in sorted(demonstration.states.items()))
        digest = hashlib.sha256(demonstration.actions.tobytes() + first_state).hexdigest()
        if digest in seen:
            yield Finding(file, demonstration.name, f"repeats {seen[digest]}")
        seen.setdefault(digest, demonstration.name)
