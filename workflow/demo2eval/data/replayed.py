"""Checks of what replay adds to demonstrations: observations, and pictures. The messages are in docs/checks.md."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from demo2eval.data.trajectory import UNREADABLE, Finding, datasets, first_not_finite
from demo2eval.maniskill.tasks import STATE_DIMS

SENSORS = "obs/sensor_data"
# Enough pixels to tell almost every picture from one of a single colour without looking at them all.
STRIDE = 61


class UnfitPictures(Exception):
    """Pictures that are damaged or show nothing; `picture_findings` lists all of a file."""


def replayed_faults(
    group, length: int, cameras: Sequence[str], state: Sequence[str] = ()
) -> Iterator[str]:
    """Yield what is wrong with the observations of a trajectory of `length` actions; pictures are not decoded.

    Args:
        cameras: ManiSkill's names of cameras that must be there.
        state: parts of the state vector that must be there.
    """
    try:
        yield from observation_faults(group, length, state)
        yield from camera_faults(group, length, cameras)
    except UNREADABLE as error:
        yield f"its observations cannot be read ({error}): a part of the file is damaged"


def observation_faults(group, length: int, state: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with the observed numbers."""
    found = {}
    for kind in ("agent", "extra"):
        found |= dict(datasets(group[f"obs/{kind}"], f"{kind}/")) if f"obs/{kind}" in group else {}
    for part in state:
        if not {f"agent/{part}", f"extra/{part}"} & found.keys():
            yield f"has no obs/agent/{part} or obs/extra/{part}"
    for name, values in found.items():
        dim = STATE_DIMS.get(name.split("/")[-1])
        if dim is not None and (
            values.ndim != 2 or values.shape[1] != dim or values.dtype.kind != "f"
        ):
            yield f"obs/{name} is {values.dtype} {list(values.shape)}, not floating point [T + 1, {dim}]"
        elif values.ndim == 0 or len(values) != length + 1:
            yield f"obs/{name} has {len(values) if values.ndim else 0} steps for {length} actions; it should have one more"
        elif values.dtype.kind == "f" and (step := first_not_finite(values)) is not None:
            yield f"obs/{name} is not finite at step {step}"


def camera_faults(group, length: int, cameras: Sequence[str]) -> Iterator[str]:
    """Yield what is wrong with the pictures' number, shape and steps."""
    first = None
    for camera in cameras:
        place = f"{SENSORS}/{camera}"
        missing = [f"{place}/{part}" for part in ("rgb", "step") if f"{place}/{part}" not in group]
        if missing:
            yield f"has no {', '.join(missing)}"
            continue
        pictures, steps = group[f"{place}/rgb"], np.asarray(group[f"{place}/step"][()])
        if (
            pictures.dtype != np.uint8
            or pictures.ndim != 4
            or pictures.shape[3] != 3
            or 0 in pictures.shape[1:]
        ):
            yield f"its pictures of {camera} are {pictures.dtype} {list(pictures.shape)}, not uint8 [looks, height, width, 3]"
        elif len(pictures) != steps.size:
            yield f"it has {len(pictures)} pictures of {camera} for {steps.size} rendered steps"
        first = steps if first is None else first
        if (
            steps.ndim != 1
            or steps.dtype.kind not in "iu"
            or not len(steps)
            or steps[0] != 0
            or (np.diff(steps) <= 0).any()
        ):
            yield f"the rendered steps of {camera} do not rise from 0"
        elif steps[-1] > length:
            yield f"the rendered steps of {camera} reach {steps[-1]}, beyond its {length} actions"
        elif not np.array_equal(first, steps):
            yield f"{camera} was rendered at other steps than {cameras[0]}"


def read_pictures(group, camera: str) -> np.ndarray:
    """Return a camera's pictures of a trajectory, uint8 [looks, height, width, 3].

    Raises:
        UnfitPictures: in a few words, if they are damaged or show nothing.
    """
    try:
        pictures = group[f"{SENSORS}/{camera}/rgb"][()]
    except UNREADABLE as error:
        raise UnfitPictures(
            f"its pictures of {camera} cannot be read ({error}): a part of the file is damaged"
        ) from error
    for reason in picture_faults(pictures, camera):
        raise UnfitPictures(reason)
    return pictures


def picture_faults(pictures: np.ndarray, camera: str) -> Iterator[str]:
    """Yield what pictures, uint8 [looks, height, width, 3], show that no camera sees.

    Some pictures of one colour are no fault unless they are black: PegInsertionSide's hand can fill base_camera for a second.
    """
    pixels = pictures.reshape(len(pictures), -1, 3)
    plain = [
        look
        for look, one in enumerate(pixels)
        if (one[::STRIDE] == one[0]).all() and (one == one[0]).all()
    ]
    black = [look for look in plain if not pixels[look, 0].any()]
    if black or len(plain) > len(pixels) / 2:
        shown = black or plain
        colour = pixels[shown[0], 0].tolist()
        yield f"{len(shown)} of its {len(pixels)} pictures of {camera} show nothing: number {shown[0]} has the one colour {colour}"
    elif len(pixels) > 1 and all(np.array_equal(one, pixels[0]) for one in pixels[1:]):
        yield f"all {len(pixels)} pictures of {camera} are the same"


def picture_findings(
    source: Path, trajectories: Sequence[str], cameras: Sequence[str]
) -> list[Finding]:
    """Decode all pictures of some trajectories of a replayed file, and return what is wrong with them."""
    import h5py

    findings = []
    with h5py.File(source, "r") as file:
        for name in trajectories:
            for camera in cameras:
                try:
                    read_pictures(file[name], camera)
                except UnfitPictures as unfit:
                    findings.append(Finding(source, name, str(unfit)))
    return findings
