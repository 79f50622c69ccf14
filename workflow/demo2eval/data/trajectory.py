"""Demonstrations in ManiSkill's trajectory format: `<name>.h5`, with `<name>.json` beside it.

The .h5 has a group `traj_<episode_id>` per trajectory of T control steps:

    actions                        float32 [T, A]
    success                        bool [T]
    env_states/<kind>/<name>       float32 [T + 1, n], before the first and after every action
    obs/agent/qpos                 float32 [T + 1, 9], where there are observations
    obs/extra/<part>               float32 [T + 1, n]
    obs/sensor_data/<camera>/rgb   uint8 [N, H, W, 3]
    obs/sensor_data/<camera>/step  int64 [N], the rendered steps; written by `replay`, else all are

The .json has `env_info` and an entry per trajectory in `episodes`.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demo2eval.errors import UserError

SENSORS = "obs/sensor_data"
UNREADABLE = (OSError, RuntimeError, LookupError, ValueError, TypeError, AttributeError)
"""What h5py and json raise where a file is damaged, depending on what the damage hit."""


@dataclass(frozen=True)
class Demo:
    """A trajectory of T control steps.

    Attributes:
        name: its group in the file, such as "traj_0".
        seed: with which the env was reset.
        actions: float32 [T, A].
        states: states of the env, {"actors/cube": float32 [T + 1, 13], ...}.
        success: of every step, bool [T].
    """

    name: str
    seed: int
    control_mode: str
    actions: np.ndarray
    states: dict[str, np.ndarray]
    success: np.ndarray


@dataclass(frozen=True)
class TrajectoryFile:
    """A trajectory file.

    Attributes:
        path: the .h5.
        metadata: the .json.
        demos: in the order of the .json.
    """

    path: Path
    metadata: dict[str, Any]
    demos: list[Demo]

    @property
    def episodes(self) -> list[dict]:
        """The entries of the .json that belong to the demos."""
        names = {demo.name for demo in self.demos}
        return [entry for entry in self.metadata["episodes"] if trajectory_name(entry) in names]


def read_trajectory_file(path: Path) -> TrajectoryFile:
    """Read a trajectory file whose demos were validated before.

    Raises:
        UserError: if the .h5 or the .json is missing, cut off or damaged.
    """
    import h5py

    try:
        metadata = read_metadata(path)
        with h5py.File(path, "r") as content:
            demos = [read_demo(content, entry) for entry in metadata["episodes"]]
    except UNREADABLE as error:
        raise UserError(
            f"{path} cannot be read with its .json ({error}): one of them is missing, cut off or "
            "damaged; delete the manifest beside them and run the rule again."
        ) from error
    return TrajectoryFile(path, metadata, demos)


def read_metadata(path: Path) -> dict[str, Any]:
    """Return the .json beside an .h5; raises one of `UNREADABLE` if it is none."""
    metadata = json.loads(path.with_suffix(".json").read_text(encoding="utf-8"))
    kwargs = metadata["env_info"].get("env_kwargs") or {}
    if not (
        isinstance(metadata["env_info"]["env_id"], str)
        and isinstance(metadata["episodes"], list)
        and all(isinstance(entry, dict) for entry in metadata["episodes"])
        and isinstance(kwargs, dict)
    ):
        raise ValueError("env_info or episodes are of another type")
    return metadata


def trajectory_name(entry: dict) -> str:
    """Return the name of the HDF5 group that an entry of the .json is about."""
    return f"traj_{entry.get('episode_id')}"


def read_seed(entry: dict) -> int:
    """Return the seed of an entry of the .json, where it is a number or a list of one."""
    return int(np.ravel(entry["episode_seed"])[0])


def read_demo(content, entry: dict) -> Demo:
    """Read the trajectory of an entry of the .json from the open .h5."""
    name = trajectory_name(entry)
    group = content[name]
    states = read_arrays(group["env_states"])
    return Demo(
        name=name,
        seed=read_seed(entry),
        control_mode=entry["control_mode"],
        actions=group["actions"][()],
        states={key: values.astype(np.float32) for key, values in states},
        success=group["success"][()].astype(bool).reshape(-1),
    )


def read_arrays(group, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yield (path, array) of every dataset below an HDF5 group."""
    for key, item in group.items():
        if hasattr(item, "shape"):
            yield f"{prefix}{key}", np.asarray(item[()])
        else:
            yield from read_arrays(item, f"{prefix}{key}/")


def state_path(part: str) -> str:
    """Return where a part of the state lies below the group of a trajectory."""
    return "obs/agent/qpos" if part == "qpos" else f"obs/extra/{part}"


def list_cameras(group) -> list[str]:
    """Return the cameras whose images the group of a trajectory has, sorted."""
    sensors = group.get(SENSORS, {})
    return [camera for camera in sorted(sensors) if "rgb" in sensors[camera]]


def read_image_steps(group, camera: str) -> np.ndarray:
    """Return the step of each image of a camera, int64 [N]."""
    path = f"{SENSORS}/{camera}/step"
    return group[path][()] if path in group else np.arange(len(group["actions"]) + 1)
