"""Validates trajectory files, where demonstrations enter and where the dataset is made.

In:  trajectory files (.h5 with the .json beside it), folders of them, or manifests of demos,
     replays or datasets.
Out: a line per issue; exit status 1 if there is any. Nothing is written.

What is looked for:
- a file that is missing, cut off, damaged, changed since its manifest, of another task or robot
- a trajectory that the .json does not list, lists twice, or that only the .json has
- links, and arrays that lie in other files or take gigabytes
- actions: type, dim, too few, NaN, zeroed blocks, out of the joint limits or of [-1, 1]
- states and observations: type, number of steps, NaN, zeroed blocks, a missing part of the state
- success: missing flags, a demonstration that fails
- things that are far away
- a demonstration, or a seed, that is repeated, also in another file
- images: missing, of another type, number or steps than they should be, black, or all the same
- replays that do not go into one dataset: other task, control mode, cameras, image size, state
"""

import argparse
import hashlib
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from demo2eval.cli import report_errors
from demo2eval.config import MAX_SEED, OnInvalid
from demo2eval.data.trajectory import (
    SENSORS,
    UNREADABLE,
    Demo,
    TrajectoryFile,
    list_cameras,
    read_arrays,
    read_demo,
    read_image_steps,
    read_metadata,
    read_seed,
    state_path,
    trajectory_name,
)
from demo2eval.errors import UserError
from demo2eval.provenance import read_manifest, sha256_file
from demo2eval.robots import ACTION_DIM, ARM_JOINTS, JOINT_LIMITS, Robot

TOLERANCE = 1e-3
ISSUES_SHOWN = 20
MAX_BYTES = 4 * 2**30
"""Of one array: 1000 images of 1024 x 1024 pixels take 3 GiB."""
MAX_DISTANCE = 100.0
"""Meters; ManiSkill's scenes are a few meters large."""
ALL = slice(None)
PIXEL_STRIDE = 61
"""Every 61st pixel tells almost every image from one of a single color."""


@dataclass(frozen=True)
class Issue:
    """What is wrong with a trajectory ("": with the file itself)."""

    file: Path
    trajectory: str
    reason: str

    def __str__(self) -> str:
        return f"{self.file}{' ' + self.trajectory if self.trajectory else ''}: {self.reason}"


@dataclass(frozen=True)
class ValidatedFile(TrajectoryFile):
    """A trajectory file, of whose demos only the valid ones are kept."""

    issues: list[Issue] = field(default_factory=list)

    def reject(self, issues: Iterable[Issue]) -> None:
        """Add issues, and take out the demos that they are about."""
        self.issues.extend(issues)
        invalid = {issue.trajectory for issue in self.issues}
        self.demos[:] = [demo for demo in self.demos if demo.name not in invalid]


class InvalidImages(Exception):
    """Images that are damaged or show nothing."""


# What callers do with the issues.


def raise_issues(issues: Sequence[Issue]) -> None:
    """Raise a UserError that lists the issues, if there are any."""
    if not issues:
        return
    shown = "; ".join(str(issue) for issue in issues[:ISSUES_SHOWN])
    hidden = len(issues) - ISSUES_SHOWN
    if hidden > 0:
        shown += f"; and {hidden} more, which `python -m demo2eval.data.validate` lists"
    skippable = all(issue.trajectory for issue in issues)
    hint = ", or leave these trajectories out with demos.on_invalid: skip" if skippable else ""
    raise UserError(f"{shown}. Record or copy the demonstrations again{hint}.")


def apply_on_invalid(files: Sequence[ValidatedFile], on_invalid: OnInvalid) -> list[dict]:
    """Stop, or go on with the valid demos.

    Returns:
        what is skipped, for the manifest: [{"file": ..., "trajectory": ..., "reason": ...}, ...].

    Raises:
        UserError: lists all issues; with "skip" only if a whole file is invalid or no demo is left.
    """
    issues = [issue for file in files for issue in file.issues]
    demos = [demo for file in files for demo in file.demos]
    if not demos and not issues:
        issues.append(Issue(files[0].path, "", "holds no demonstration"))
    if on_invalid == "error" or not demos or not all(issue.trajectory for issue in issues):
        raise_issues(issues)
    for issue in issues:
        print(f"skipped: {issue}", file=sys.stderr)
    return [
        {"file": str(issue.file), "trajectory": issue.trajectory, "reason": issue.reason}
        for issue in issues
    ]


# Files.


def validate_files(
    paths: Iterable[Path],
    *,
    task: str | None = None,
    robot: Robot | None = None,
    state: Sequence[str] | None = None,
    entries: Sequence[slice] | None = None,
) -> list[ValidatedFile]:
    """Read and validate everything in some files but what the images show; raises nothing.

    Args:
        paths: .h5 files.
        task: which all must be of; None: any.
        robot: with which all must be recorded; None: any.
        state: parts of the state that must be there, and with them images; None: neither need be.
        entries: those of each file's .json to read, if not all.
    """
    paths = list(map(Path, paths))
    files = [
        validate_file(path, task, robot, state, part)
        for path, part in zip(paths, entries or [ALL] * len(paths), strict=True)
    ]
    first_of: dict[str | int, tuple[Path, str]] = {}
    for file in files:
        repeated = []
        for demo in file.demos:
            for key, verb in ((_hash_demo(demo), "repeats"), (demo.seed, "has the seed of")):
                path, name = first_of.setdefault(key, (file.path, demo.name))
                if (path, name) != (file.path, demo.name):
                    first = name if path == file.path else f"{path} {name}"
                    repeated.append(Issue(file.path, demo.name, f"{verb} {first}"))
                    break
        file.reject(repeated)
    return files


def validate_replays(
    paths: Iterable[Path], state: Sequence[str], *, decode_images: bool
) -> list[ValidatedFile]:
    """Read and validate the replayed files of one dataset; raises nothing.

    Args:
        state: parts of the dataset's state.
        decode_images: look at the images as well. Without, that is left to who reads them, with
            `read_valid_images`, unless there are other issues already.
    """
    files = validate_files(paths, state=state)
    reject_unlike(files, state)
    if decode_images or any(file.issues for file in files):
        reject_invalid_images(files)
    return files


def _hash_demo(demo: Demo) -> str:
    first_state = b"".join(values[0].tobytes() for _, values in sorted(demo.states.items()))
    return hashlib.sha256(demo.actions.tobytes() + first_state).hexdigest()


def validate_file(
    path: Path,
    task: str | None,
    robot: Robot | None,
    state: Sequence[str] | None,
    entries: slice = ALL,
) -> ValidatedFile:
    """Read and validate one file; see `validate_files`."""
    import h5py

    if not path.is_file():
        reason = "does not exist; give a ManiSkill trajectory file, .h5 with its .json beside it"
        return ValidatedFile(path, {}, [], [Issue(path, "", reason)])
    metadata, issues = validate_metadata(path, task, robot)
    file = ValidatedFile(path, metadata, [], issues)
    if issues:
        return file
    try:
        with h5py.File(path, "r") as content:
            validate_trajectories(content, file, robot, state, entries)
    except UNREADABLE as error:
        reason = (
            f"cannot be read ({error}): it is cut off, damaged or not HDF5; copy or record it again"
        )
        file.reject([Issue(path, "", reason)])
    return file


def validate_metadata(
    path: Path, task: str | None, robot: Robot | None
) -> tuple[dict, list[Issue]]:
    """Return the .json beside an .h5, empty if it cannot be read, and what is wrong with it."""
    beside = path.with_suffix(".json")
    try:
        metadata = read_metadata(path)
    except FileNotFoundError:
        reason = f"does not exist; ManiSkill's trajectories need it beside {path.name}"
        return {}, [Issue(beside, "", reason)]
    except UNREADABLE:
        reason = "is not the .json of a ManiSkill trajectory file; copy it again"
        return {}, [Issue(beside, "", reason)]
    issues = []
    recorded_task = metadata["env_info"]["env_id"]
    if task is not None and recorded_task != task:
        reason = (
            f"has demonstrations of {recorded_task}, not of {task}; set the run's task, or take "
            "the file out"
        )
        issues.append(Issue(path, "", reason))
    recorded_robot = (metadata["env_info"].get("env_kwargs") or {}).get("robot_uids", robot)
    if robot is not None and recorded_robot not in (robot, [robot]):
        reason = (
            f"says that the robot is {recorded_robot}, but {recorded_task} is evaluated with "
            f"{robot}, which starts in another pose; record it with robot_uids={robot!r}"
        )
        issues.append(Issue(beside, "", reason))
    return metadata, issues


# Trajectories. The functions below yield what is wrong, in a few words each.


def validate_trajectories(
    content,
    file: ValidatedFile,
    robot: Robot | None,
    state: Sequence[str] | None,
    entries: slice = ALL,
) -> None:
    """Read the trajectories of the open .h5 into `file`; see `validate_files`."""
    episodes = file.metadata["episodes"]
    position: dict[str, int] = {}
    for number, entry in enumerate(episodes):
        position.setdefault(trajectory_name(entry), number)
    for number in range(len(episodes))[entries]:
        entry = episodes[number]
        name = trajectory_name(entry)
        try:
            reasons = list(find_issues(content, entry, robot, state))
        except UNREADABLE as error:
            reasons = [f"cannot be read ({error}): a part of the file is damaged"]
        if position[name] != number:
            reasons = ["is listed twice in the .json"]
        if reasons:
            file.reject(Issue(file.path, name, reason) for reason in reasons)
        else:
            file.demos.append(read_demo(content, entry))
    if not entries.start:
        unlisted = sorted(name for name in content if name.startswith("traj_"))
        file.reject(
            Issue(file.path, name, "is in the .h5 but not listed in the .json")
            for name in unlisted
            if name not in position
        )


def find_issues(
    content, entry: dict, robot: Robot | None, state: Sequence[str] | None
) -> Iterator[str]:
    """Yield what is wrong with the trajectory of an entry of the .json; see `validate_files`."""
    name = trajectory_name(entry)
    try:
        seed, control_mode = read_seed(entry), entry["control_mode"]
    except UNREADABLE as error:
        yield f"its entry in the .json is incomplete ({error!r})"
        return
    if not 0 <= seed <= MAX_SEED:
        yield f"its episode_seed is {seed}, not between 0 and {MAX_SEED}"
    if name not in content:
        yield "is listed in the .json but missing in the .h5"
        return
    if reasons := list(find_storage_issues(content, name)):
        yield from reasons
        return
    group = content[name]
    missing = [key for key in ("actions", "env_states", "success") if key not in group]
    if missing:
        yield f"has no {', '.join(missing)}"
        return
    actions = group["actions"][()]
    yield from _action_issues(actions, control_mode)
    if actions.ndim == 2:
        yield from _env_state_issues(dict(read_arrays(group["env_states"])), len(actions), robot)
        yield from _success_issues(group["success"][()], entry, len(actions))
        yield from _observation_issues(group, len(actions), state or ())
        yield from _camera_issues(group, len(actions), required=state is not None)


def find_storage_issues(parent, name: str) -> Iterator[str]:
    """Yield what below a name in an HDF5 group is no data of this very file, or too much of it.

    Nothing is read: external storage and links lead to any other file of the machine, and a shape
    that takes all memory costs no byte of the file.
    """
    import h5py

    if not isinstance(parent.get(name, getlink=True), h5py.HardLink):
        yield f"{name} is a link; copy into this file what it leads to"
        return
    item: Any = parent[name]
    if isinstance(item, h5py.Group):
        for key in item:
            yield from find_storage_issues(item, str(key))
    elif not isinstance(item, h5py.Dataset) or item.shape is None or item.dtype.hasobject:
        yield f"{name} holds no numbers"
    elif item.is_virtual or item.external:
        yield f"{name} lies in another file; copy its values into this one"
    elif item.nbytes > MAX_BYTES:
        yield f"{name} has the shape {list(item.shape)}, {item.nbytes / 2**30:.0f} GiB"


def _first_not_finite(values: np.ndarray) -> int | None:
    """Return the first row of [n, ...] that holds NaN or infinity, or None."""
    invalid = ~np.isfinite(values).all(axis=tuple(range(1, values.ndim)))
    return int(np.argmax(invalid)) if invalid.any() else None


def _action_issues(actions: np.ndarray, control_mode: str) -> Iterator[str]:
    dim = ACTION_DIM.get(control_mode)
    if dim is None:
        yield f"its control mode is {control_mode}, not one of {', '.join(ACTION_DIM)}"
    if actions.ndim != 2 or actions.dtype != np.float32:
        yield f"its actions are {actions.dtype} {list(actions.shape)}, not float32 [T, A]"
        return
    if len(actions) < 2:
        yield f"it has {len(actions)} actions; at least 2 are needed"
    if dim is not None and actions.shape[1] != dim:
        yield f"its actions have {actions.shape[1]} dimensions, but {control_mode} has {dim}"
    elif (step := _first_not_finite(actions)) is not None:
        yield f"its actions are not finite at step {step}"
    elif control_mode == "pd_joint_pos":
        yield from _joint_target_issues(actions)
    elif dim is not None and (largest := np.abs(actions).max(initial=0)) > 1 + TOLERANCE:
        yield f"its actions reach {largest:.3g}, outside the [-1, 1] of {control_mode}"


def _joint_target_issues(actions: np.ndarray) -> Iterator[str]:
    """Yield what is wrong with finite targets [T, 8] of the joints, radians, and the gripper."""
    if not actions.any(axis=1).all():
        step = int(np.argmin(actions.any(axis=1)))
        yield f"its actions are all zero at step {step}: a block of the file was lost"
        return
    low, high = JOINT_LIMITS
    targets = actions[:, :ARM_JOINTS]
    outside = np.argwhere((targets < low - TOLERANCE) | (targets > high + TOLERANCE))
    if len(outside):
        step, joint = outside[0]
        yield (
            f"its target of joint {joint + 1} is {targets[step, joint]:.3g} rad at step {step}, "
            f"outside the arm's [{low[joint]}, {high[joint]}]"
        )
    gripper = actions[:, ARM_JOINTS]
    outside = np.flatnonzero(np.abs(gripper) > 1 + TOLERANCE)
    if len(outside):
        step = outside[0]
        yield f"its target of the gripper is {gripper[step]:.3g} at step {step}, outside [-1, 1]"


def _env_state_issues(
    states: dict[str, np.ndarray], length: int, robot: Robot | None
) -> Iterator[str]:
    prefix = "articulations/"
    robots = [key.removeprefix(prefix) for key in states if key.startswith(prefix)]
    if robot is not None and robots != [robot]:
        recorded = ", ".join(robots) or "(none)"
        yield f"its env_states are of the robot {recorded}, but the task is evaluated with {robot}"
    for key, values in states.items():
        if values.ndim != 2 or values.dtype.kind != "f":
            kind = f"{values.dtype} {list(values.shape)}"
            yield f"env_states/{key} is {kind}, not floating point [T + 1, n]"
        elif len(values) != length + 1:
            yield (
                f"env_states/{key} has {len(values)} steps for {length} actions; it should have "
                "one more than actions"
            )
        elif (step := _first_not_finite(values)) is not None:
            yield f"env_states/{key} is not finite at step {step}"
        elif values.shape[1] >= 13:
            # Position, quaternion and velocities of the actor, or of the robot's base, come first.
            if (far := np.abs(values[:, :3]).max(initial=0)) > MAX_DISTANCE:
                yield f"env_states/{key} is {far:.3g} m from the origin"
            lost = np.abs(np.linalg.norm(values[:, 3:7], axis=1) - 1) > TOLERANCE
            if lost.any():
                step = int(np.argmax(lost))
                yield f"env_states/{key} holds no rotation at step {step}: a block was lost"


def _success_issues(success: np.ndarray, entry: dict, length: int) -> Iterator[str]:
    if success.dtype.kind not in "bui" or success.ndim == 0:
        kind = f"{success.dtype} {list(success.shape)}"
        yield f"success is {kind}, not a truth value per step"
    elif success.size != length:
        yield f"success has {success.size} steps for {length} actions"
    elif length and not success.reshape(-1)[-1]:
        yield "it does not end in success"
    if entry.get("success") is False:
        yield "the .json says that it did not succeed"
    if entry.get("elapsed_steps", length) != length:
        yield f"the .json counts {entry['elapsed_steps']} steps, but it has {length} actions"


def _observation_issues(group, length: int, state: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with the observed vectors; `state` are the parts that must be there."""
    for part in state:
        if state_path(part) not in group:
            yield f"has no {state_path(part)}"
    for parent in ("obs/agent", "obs/extra"):
        for name, values in read_arrays(group[parent]) if parent in group else ():
            path = f"{parent}/{name}"
            needed = path in map(state_path, state)
            if needed and (values.ndim != 2 or values.dtype.kind != "f"):
                kind = f"{values.dtype} {list(values.shape)}"
                yield f"{path} is {kind}, not floating point [T + 1, n]"
            elif values.ndim == 0 or len(values) != length + 1:
                steps = len(values) if values.ndim else 0
                yield f"{path} has {steps} steps for {length} actions; it should have one more"
            elif values.dtype.kind == "f" and (step := _first_not_finite(values)) is not None:
                yield f"{path} is not finite at step {step}"


def _camera_issues(group, length: int, *, required: bool) -> Iterator[str]:
    """Yield what is wrong with the number, shape and steps of the images, which are not decoded."""
    cameras = list_cameras(group)
    if required and not cameras:
        yield "has no images"
    all_steps = {camera: np.asarray(read_image_steps(group, camera)) for camera in cameras}
    for camera, steps in all_steps.items():
        images = group[f"{SENSORS}/{camera}/rgb"]
        if images.ndim != 4 or images.dtype != np.uint8 or images.shape[3] != 3 or not images.size:
            kind = f"{images.dtype} {list(images.shape)}"
            yield f"its images of {camera} are {kind}, not uint8 [N, height, width, 3]"
        elif len(images) != steps.size:
            yield f"it has {len(images)} images of {camera} for {steps.size} rendered steps"
        if not _rise_from_zero(steps):
            yield f"the rendered steps of {camera} do not rise from 0"
        elif steps[-1] > length:
            yield f"the rendered steps of {camera} reach {steps[-1]}, beyond its {length} actions"
        elif not np.array_equal(all_steps[cameras[0]], steps):
            yield f"{camera} was rendered at other steps than {cameras[0]}"


def _rise_from_zero(steps: np.ndarray) -> bool:
    numbers = steps.ndim == 1 and steps.dtype.kind in "iu" and len(steps) > 0
    return bool(numbers and steps[0] == 0 and (np.diff(steps) > 0).all())


# Images.


def read_valid_images(group, camera: str) -> np.ndarray:
    """Return the images of a camera, uint8 [N, height, width, 3], from the group of a trajectory.

    Raises:
        InvalidImages: in a few words, if they are damaged or show nothing.
    """
    try:
        images = group[f"{SENSORS}/{camera}/rgb"][()]
    except UNREADABLE as error:
        raise InvalidImages(
            f"its images of {camera} cannot be read ({error}): a part of the file is damaged"
        ) from error
    if reason := find_image_issue(images):
        raise InvalidImages(f"of its images of {camera} {reason}")
    return images


def find_image_issue(images: np.ndarray) -> str | None:
    """Return what images, uint8 [N, height, width, 3], show that no camera sees, or None.

    Some images of one color are no issue unless they are black: the hand can fill base_camera of
    PegInsertionSide for a second.
    """
    pixels = images.reshape(len(images), -1, 3)
    plain = [
        number
        for number, image in enumerate(pixels)
        if (image[::PIXEL_STRIDE] == image[0]).all() and (image == image[0]).all()
    ]
    black = [number for number in plain if not pixels[number, 0].any()]
    if black or len(plain) > len(pixels) / 2:
        empty = black or plain
        color = pixels[empty[0], 0].tolist()
        return f"{len(empty)} of {len(pixels)} show nothing: number {empty[0]} is all {color}"
    if len(pixels) > 1 and all(np.array_equal(image, pixels[0]) for image in pixels[1:]):
        return f"all {len(pixels)} are the same"
    return None


def find_image_issues(path: Path, trajectories: Iterable[str]) -> list[Issue]:
    """Decode all images of some trajectories of a file, and return what is wrong with them."""
    import h5py

    issues = []
    with h5py.File(path, "r") as file:
        for name in trajectories:
            for camera in list_cameras(file[name]):
                try:
                    read_valid_images(file[name], camera)
                except InvalidImages as error:
                    issues.append(Issue(path, name, str(error)))
    return issues


def reject_invalid_images(files: Sequence[ValidatedFile]) -> None:
    """Decode the images of all demos, and take out those that have invalid ones."""
    from tqdm import tqdm

    for file in tqdm(files, unit="file", mininterval=2, desc="validating images"):
        if file.demos:
            file.reject(find_image_issues(file.path, [demo.name for demo in file.demos]))


# What goes into one dataset.


def reject_unlike(files: Sequence[ValidatedFile], state: Sequence[str]) -> None:
    """Take out the demos that do not go into one dataset with the first of all."""
    import h5py

    first: tuple[str, dict[str, str]] | None = None
    for file in files:
        issues = []
        if file.demos:
            with h5py.File(file.path, "r") as content:
                for demo in file.demos:
                    kind = _describe_kind(file, demo, content[demo.name], state)
                    first = first or (f"{file.path} {demo.name}", kind)
                    issues += [
                        Issue(
                            file.path,
                            demo.name,
                            f"has the {key} {value}, but {first[0]} has {first[1][key]}",
                        )
                        for key, value in kind.items()
                        if value != first[1][key]
                    ]
        file.reject(issues)


def _describe_kind(file: ValidatedFile, demo: Demo, group, state: Sequence[str]) -> dict[str, str]:
    """Return, in words, what all demos of a dataset have in common."""
    cameras = []
    for camera in list_cameras(group):
        height, width = group[f"{SENSORS}/{camera}/rgb"].shape[1:3]
        cameras.append(f"{camera} of {width} x {height} pixels")
    return {
        "task": file.metadata["env_info"]["env_id"],
        "control mode": demo.control_mode,
        "cameras": ", ".join(cameras),
        "state": ", ".join(f"{part} [{group[state_path(part)].shape[1]}]" for part in state),
    }


# The command.


def list_trajectory_files(path: Path) -> tuple[list[Path], list[Issue]]:
    """Return the .h5 files that a path stands for, and what was changed since its manifest.

    Raises:
        UserError: if it is the manifest of something that has no trajectories.
    """
    if path.is_dir():
        return sorted(path.glob("*.h5")) or [path / "*.h5"], []
    if path.suffix != ".json":
        return [path], []
    manifest = read_manifest(path)
    if "replays" in manifest["inputs"]:
        found = [
            list_trajectory_files(Path(item["path"])) for item in manifest["inputs"]["replays"]
        ]
        files, issues = zip(*found, strict=True)
        return list(chain(*files)), list(chain(*issues))
    if "trajectory.h5" not in manifest["outputs"]:
        raise UserError(
            f"{path} is the manifest of {manifest['stage']}, which has no trajectories; give one "
            "of demos, replays or a dataset."
        )
    reason = f"was changed or damaged since {path.name} beside it was written; make it again"
    issues = [
        Issue(path.parent / name, "", reason)
        for name, output in manifest["outputs"].items()
        if (path.parent / name).is_file() and sha256_file(path.parent / name) != output["sha256"]
    ]
    return [path.parent / "trajectory.h5"], issues


def validate_paths(paths: Iterable[Path]) -> tuple[list[Issue], list[ValidatedFile]]:
    """Validate everything in some trajectory files or manifests, images too."""
    listed = [list_trajectory_files(path) for path in paths]
    files = validate_files(path for paths, _ in listed for path in paths)
    reject_invalid_images(files)
    changed = [issue for _, issues in listed for issue in issues]
    return changed + [issue for file in files for issue in file.issues], files


def main() -> None:
    """Print a line per issue."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "files", type=Path, nargs="+", help="trajectory.h5, a folder, or manifest.json"
    )
    with report_errors():
        issues, files = validate_paths(parser.parse_args().files)
    for issue in issues:
        print(issue)
    valid = sum(len(file.demos) for file in files)
    print(f"{len(issues)} issues; {valid} valid demos in {len(files)} files", file=sys.stderr)
    sys.exit(1 if issues else 0)


if __name__ == "__main__":
    main()
