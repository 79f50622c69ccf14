"""Reading and checking demonstrations in ManiSkill's trajectory format: `<name>.h5` and `<name>.json` beside it.

Everything that can be wrong is in docs/checks.md, with its message; a test compares that page with the messages here.
"""

import hashlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo2eval.errors import UserError
from demo2eval.maniskill.tasks import TASKS, find_task

ACTION_WIDTH = {
    "pd_joint_pos": 8,
    "pd_joint_delta_pos": 8,
    "pd_ee_delta_pos": 4,
    "pd_ee_delta_pose": 7,
}
# The Panda's, of joints 1 to 7, radians: a target beyond them is none that the arm can follow.
JOINT_LIMITS = np.array(
    [
        [-2.8973, -1.7628, -2.8973, -3.0718, -2.8973, -0.0175, -2.8973],
        [2.8973, 1.7628, 2.8973, -0.0698, 2.8973, 3.7525, 2.8973],
    ]
)
TOLERANCE = 1e-3
FINDINGS_SHOWN = 20
# What h5py raises where a file is damaged, depending on what the damage hit.
UNREADABLE = (OSError, RuntimeError, KeyError, ValueError, TypeError, AttributeError)


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


@dataclass(frozen=True)
class Recording:
    """A trajectory file as it was found.

    Attributes:
        demonstrations: those that nothing is wrong with, in the order of the .json.
        description: the .json, empty if it cannot be read.
        findings: everything that is wrong.
    """

    file: Path
    demonstrations: list[Demonstration]
    description: dict
    findings: list[Finding]

    @property
    def episodes(self) -> list[dict]:
        """The entries of the .json that belong to the demonstrations."""
        kept = {demonstration.name for demonstration in self.demonstrations}
        entries = [entry for entry in self.description["episodes"] if entry_name(entry) in kept]
        return list({entry_name(entry): entry for entry in reversed(entries)}.values())[::-1]

    def reject(self, findings: list[Finding]) -> None:
        """Add findings, and take out the demonstrations that they are about."""
        self.findings.extend(findings)
        bad = {finding.trajectory for finding in findings}
        self.demonstrations[:] = [
            demonstration for demonstration in self.demonstrations if demonstration.name not in bad
        ]


# What else to check of a trajectory: from its HDF5 group and its number of actions to words for what is wrong.
More = Callable[[object, int], Iterator[str]]


def nothing_more(group, length: int) -> Iterator[str]:
    """Check nothing more of a trajectory."""
    return iter(())


def refuse(findings: list[Finding]) -> None:
    """Raise a UserError that lists the findings, if there are any."""
    if findings:
        shown = "; ".join(str(finding) for finding in findings[:FINDINGS_SHOWN])
        hidden = len(findings) - FINDINGS_SHOWN
        more = (
            f"; and {hidden} more, which `python -m demo2eval.data.validate` lists"
            if hidden > 0
            else ""
        )
        way_out = (
            ", or leave these trajectories out with demos.on_invalid: skip"
            if all(one.trajectory for one in findings)
            else ""
        )
        raise UserError(f"{shown}{more}. Record or copy the demonstrations again{way_out}.")


def sift(recordings: list[Recording], on_invalid: str) -> list[dict]:
    """Decide what to do about everything that is wrong with some recordings.

    Args:
        on_invalid: "error", or "skip" to go on with the demonstrations that nothing is wrong with.

    Returns:
        what is left out, for the manifest: [{"file": ..., "trajectory": ..., "reason": ...}, ...].

    Raises:
        UserError: lists everything; with "skip" only where a whole file is bad, or no demonstration is left.
    """
    if on_invalid not in ("error", "skip"):
        raise UserError(f"demos.on_invalid is {on_invalid!r}; it may be 'refuse' or 'skip'.")
    findings = [finding for recording in recordings for finding in recording.findings]
    left = any(recording.demonstrations for recording in recordings)
    if not left and not findings:
        findings.append(Finding(recordings[0].file, "", "holds no demonstration"))
    if on_invalid == "error" or not left or not all(finding.trajectory for finding in findings):
        refuse(findings)
    for finding in findings:
        print(f"left out: {finding}", file=sys.stderr)
    return [
        {"file": str(one.file), "trajectory": one.trajectory, "reason": one.reason}
        for one in findings
    ]


def read_demonstrations(file: Path, task: str) -> tuple[list[Demonstration], dict]:
    """Read and check every demonstration of a file.

    Returns:
        (demonstrations in the order of the .json, the .json itself).

    Raises:
        UserError: lists everything that is wrong: the file does not open, is of another task, or trajectories are damaged.
    """
    demonstrations, description, _ = sound_demonstrations(file, task, "error")
    return demonstrations, description


def sound_demonstrations(
    file: Path, task: str, on_invalid: str
) -> tuple[list[Demonstration], dict, list[dict]]:
    """Read and check every demonstration of a file, and leave bad ones out if `on_invalid` is "skip".

    Returns:
        (demonstrations in the order of the .json, the .json without those left out, what was left out as in `sift`).

    Raises:
        UserError: as `sift`.
    """
    find_task(task)
    (recording,) = recordings = examine([file], task)
    skipped = sift(recordings, on_invalid)
    return (
        recording.demonstrations,
        recording.description | {"episodes": recording.episodes},
        skipped,
    )


def examine(
    files: Iterable[Path], task: str | None = None, more: More = nothing_more
) -> list[Recording]:
    """Read and check every demonstration of some files; raises nothing for what is wrong with them.

    A demonstration is repeated if its actions and first state are those of an earlier one, in whichever file.

    Args:
        task: of which all files must be; None: each of any.
        more: what else to check of a trajectory.
    """
    recordings = [read_recording(Path(file), task, more) for file in files]
    seen: dict[str, tuple[int, str]] = {}
    for number, recording in enumerate(recordings):
        repeated = []
        for demonstration in recording.demonstrations:
            first, name = seen.setdefault(digest_of(demonstration), (number, demonstration.name))
            if (first, name) != (number, demonstration.name):
                where = name if first == number else f"{recordings[first].file} {name}"
                repeated.append(Finding(recording.file, demonstration.name, f"repeats {where}"))
        recording.reject(repeated)
    return recordings


def digest_of(demonstration: Demonstration) -> str:
    """Return a hash of a demonstration's actions and first state."""
    first_state = b"".join(
        values[:1].tobytes() for _, values in sorted(demonstration.states.items())
    )
    return hashlib.sha256(demonstration.actions.tobytes() + first_state).hexdigest()


def entry_name(entry) -> str:
    """Return the name of the HDF5 group that an entry of the .json is about."""
    return f"traj_{entry.get('episode_id') if isinstance(entry, dict) else None}"


def read_recording(file: Path, task: str | None, more: More) -> Recording:
    """Read and check one file; see `examine`."""
    import h5py

    if not file.is_file():
        missing = Finding(
            file,
            "",
            "does not exist; give a ManiSkill trajectory file, .h5 with its .json beside it",
        )
        return Recording(file, [], {}, [missing])
    description, findings = read_description(file, task)
    recording = Recording(file, [], description, findings)
    if findings:
        return recording
    try:
        content = h5py.File(file, "r")
    except OSError as error:
        recording.findings.append(
            Finding(
                file,
                "",
                f"cannot be opened ({error}): it is cut off or not HDF5; copy or record it again",
            )
        )
        return recording
    with content:
        try:
            read_trajectories(content, recording, more)
        except UNREADABLE as error:
            recording.findings.append(
                Finding(file, "", f"cannot be read ({error}): a part of the file is damaged")
            )
    return recording


def read_description(file: Path, task: str | None) -> tuple[dict, list[Finding]]:
    """Return the .json beside an .h5 file, or an empty dictionary, and what is wrong with it."""
    beside = file.with_suffix(".json")
    try:
        description = json.loads(beside.read_text(encoding="utf-8"))
        recorded_task, kwargs = (
            description["env_info"]["env_id"],
            description["env_info"].get("env_kwargs") or {},
        )
        if not isinstance(description["episodes"], list) or not isinstance(kwargs, dict):
            raise KeyError("episodes")
    except FileNotFoundError:
        return {}, [
            Finding(
                beside, "", f"does not exist; ManiSkill's trajectories need it beside {file.name}"
            )
        ]
    except UNREADABLE:
        return {}, [
            Finding(
                beside, "", "is not the description of a ManiSkill trajectory file; copy it again"
            )
        ]
    if task is not None and recorded_task != task:
        return description, [
            Finding(
                file,
                "",
                f"holds demonstrations of {recorded_task}, not of {task}; set the run's task, or take the file out",
            )
        ]
    if recorded_task not in TASKS:
        return description, [
            Finding(
                file,
                "",
                f"holds demonstrations of {recorded_task}, which is none of {', '.join(TASKS)}",
            )
        ]
    robot = find_task(recorded_task).robot
    recorded = kwargs.get("robot_uids", robot)
    if recorded not in (robot, [robot]):
        reason = (
            f"says that {recorded_task} was recorded with the robot {recorded}, but it is evaluated with {robot}, "
            f"which starts in another pose; record it with robot_uids={robot!r}"
        )
        return description, [Finding(beside, "", reason)]
    return description, []


def read_trajectories(content, recording: Recording, more: More) -> None:
    """Read all trajectories of an open HDF5 file into a recording."""
    robot = find_task(recording.description["env_info"]["env_id"]).robot
    listed = set()
    for entry in recording.description["episodes"]:
        name = entry_name(entry)
        if name in listed:
            recording.findings.append(Finding(recording.file, name, "is listed twice in the .json"))
            continue
        listed.add(name)
        found, demonstration = read_one(content, recording.file, entry, robot, more)
        recording.findings.extend(found)
        if demonstration is not None:
            recording.demonstrations.append(demonstration)
    for name in sorted(content):
        if name.startswith("traj_") and name not in listed:
            recording.findings.append(
                Finding(recording.file, name, "is in the .h5 but not listed in the .json")
            )


def read_one(
    content, file: Path, entry: dict, robot: str, more: More
) -> tuple[list[Finding], Demonstration | None]:
    """Read one trajectory; return everything that is wrong with it, or the demonstration."""
    name = entry_name(entry)

    def wrong(reason: str) -> tuple[list[Finding], None]:
        return [Finding(file, name, reason)], None

    try:
        seed, control_mode = int(np.ravel(entry["episode_seed"])[0]), entry["control_mode"]
    except (KeyError, TypeError, IndexError, ValueError) as error:
        return wrong(f"its entry in the .json is incomplete ({error!r})")
    if name not in content:
        return wrong("is listed in the .json but missing in the .h5")
    try:
        group = content[name]
        missing = [key for key in ("actions", "env_states", "success") if key not in group]
        if missing:
            return wrong(f"lacks {', '.join(missing)}")
        actions, success = np.asarray(group["actions"][()]), np.asarray(group["success"][()])
        states = dict(datasets(group["env_states"]))
    except UNREADABLE as error:
        return wrong(f"cannot be read ({error}): a part of the file is damaged")
    reasons = list(action_faults(actions, control_mode))
    if actions.ndim == 2:
        reasons += state_faults(states, len(actions), robot)
        reasons += success_faults(success, entry, len(actions))
        reasons += more(group, len(actions))
    if reasons:
        return [Finding(file, name, reason) for reason in reasons], None
    states = {key: values.astype(np.float32) for key, values in states.items()}
    return [], Demonstration(
        name, seed, control_mode, actions, states, success.astype(bool).reshape(-1)
    )


def datasets(group, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yield (path, array) of every dataset below an HDF5 group."""
    for key, item in group.items():
        if hasattr(item, "shape"):
            yield f"{prefix}{key}", np.asarray(item[()])
        else:
            yield from datasets(item, f"{prefix}{key}/")


def first_not_finite(values: np.ndarray) -> int | None:
    """Return the first row of [n, ...] that holds NaN or infinity, or None."""
    bad = ~np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    return int(np.argmax(bad)) if bad.any() else None


def action_faults(actions: np.ndarray, control_mode: str) -> Iterator[str]:
    """Yield what is wrong with the actions of a demonstration, each in a few words."""
    width = ACTION_WIDTH.get(control_mode)
    if width is None:
        yield f"its control mode is {control_mode}, not one of {', '.join(ACTION_WIDTH)}"
    if actions.ndim != 2 or actions.dtype != np.float32:
        yield f"its actions are {actions.dtype} {list(actions.shape)}, not float32 [T, A]"
        return
    if len(actions) < 2:
        yield f"it has {len(actions)} actions; at least 2 are needed"
    if width is not None and actions.shape[1] != width:
        yield f"its actions have {actions.shape[1]} dimensions, but {control_mode} has {width}"
    elif (step := first_not_finite(actions)) is not None:
        yield f"its actions are not finite at step {step}"
    elif control_mode == "pd_joint_pos":
        yield from target_faults(actions)
    elif width is not None and np.abs(actions).max(initial=0) > 1 + TOLERANCE:
        yield f"its actions reach {np.abs(actions).max():.3g}, outside the [-1, 1] of {control_mode}"


def target_faults(actions: np.ndarray) -> Iterator[str]:
    """Yield what is wrong with finite actions of pd_joint_pos: seven joints' targets, radians, and the gripper's."""
    if not actions.any(axis=1).all():
        yield f"its actions are all zero at step {int(np.argmin(actions.any(axis=1)))}: a block of the file was lost"
        return
    targets = actions[:, :7]
    outside = np.argwhere(
        (targets < JOINT_LIMITS[0] - TOLERANCE) | (targets > JOINT_LIMITS[1] + TOLERANCE)
    )
    if len(outside):
        step, joint = outside[0]
        low, high = JOINT_LIMITS[:, joint]
        yield f"its target of joint {joint + 1} is {targets[step, joint]:.3g} rad at step {step}, outside the arm's [{low}, {high}]"
    wide = np.abs(actions[:, 7]) > 1 + TOLERANCE
    if wide.any():
        yield f"its target of the gripper is {actions[np.argmax(wide), 7]:.3g} at step {int(np.argmax(wide))}, outside [-1, 1]"


def state_faults(states: dict[str, np.ndarray], length: int, robot: str) -> Iterator[str]:
    """Yield what is wrong with the recorded states of `length` actions in a task that is played by `robot`."""
    robots = [
        key.removeprefix("articulations/") for key in states if key.startswith("articulations/")
    ]
    if robots != [robot]:
        yield f"its env_states are of the robot {', '.join(robots) or '(none)'}, but the task is evaluated with {robot}"
    for key, values in states.items():
        if values.ndim != 2 or values.dtype.kind != "f":
            yield f"env_states/{key} is {values.dtype} {list(values.shape)}, not floating point [T + 1, n]"
        elif len(values) != length + 1:
            yield f"env_states/{key} has {len(values)} steps for {length} actions; it should have one more than actions"
        elif (step := first_not_finite(values)) is not None:
            yield f"env_states/{key} is not finite at step {step}"
        elif values.shape[1] >= 13:
            # Position, quaternion and velocities of the actor, or of the robot's base, come first.
            lost = np.abs(np.linalg.norm(values[:, 3:7], axis=1) - 1) > TOLERANCE
            if lost.any():
                yield f"env_states/{key} holds no rotation at step {int(np.argmax(lost))}: a block of the file was lost"


def success_faults(success: np.ndarray, entry: dict, length: int) -> Iterator[str]:
    """Yield what is wrong with the success flags of `length` actions, and what the .json says about them."""
    if success.dtype.kind not in "bui" or success.ndim == 0:
        yield f"success is {success.dtype} {list(success.shape)}, not a truth value for every step"
    elif success.size != length:
        yield f"success has {success.size} steps for {length} actions"
    elif length and not success.reshape(-1)[-1]:
        yield "it does not end in success"
    if entry.get("success") is False:
        yield "the .json says that it did not succeed"
    if entry.get("elapsed_steps", length) != length:
        yield f"the .json counts {entry['elapsed_steps']} steps, but it has {length} actions"
