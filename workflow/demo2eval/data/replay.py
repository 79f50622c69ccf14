"""Replays one shard of demonstrations in the configured control mode and adds pictures.

In:  the manifest of a shard of demonstrations, with trajectory.h5 and trajectory.json beside it.
Out: the same two files with observations, in ManiSkill's layout: obs/agent/qpos, obs/extra/<part> for every step, and
     obs/sensor_data/<camera>/rgb uint8 [looks, H, W, 3] with obs/sensor_data/<camera>/step int64 [looks], the steps rendered.

Where the control mode stays the same, the recorded states are set one by one and rendered: no physics, and the actions are those of
the demonstration bit for bit. Otherwise ManiSkill's own conversion makes new actions and states first; a demonstration that does not
succeed any more is left out and counted in the manifest.

A demonstration of this control mode that brings observations as ManiSkill records them with obs_mode rgb (pictures uint8 [T + 1, H, W, 3]
of all these cameras in this size, and all parts of the state) is not rendered: its pictures are taken as they are, and the manifest counts
it as `already_rendered`.

With `joint_perturbation` every look is rendered, the arm displaced (`demo2eval.data.perturb`). What obs/ holds of these steps is of
the displaced arm; actions and env_states are the demonstration's.
"""

import functools
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import numpy as np

from demo2eval.cli import option, run, settings_from, stage_parser
from demo2eval.data.perturb import Displacement
from demo2eval.data.trajectory import Demonstration, sound_demonstrations
from demo2eval.errors import UserError
from demo2eval.maniskill.env import limit_threads, look, make_environment, state_parts
from demo2eval.maniskill.tasks import STATE_DIMS, check_cameras, find_task
from demo2eval.provenance import run_stage, write_atomic


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the replayed demonstrations."""

    task: str = option("ManiSkill task, such as PushCube-v1")
    control_mode: str = option("control mode of the actions", "pd_joint_pos")
    cameras: list = option('cameras to render, such as ["base_camera"]')
    image_size: int = option("side of the pictures, pixels", 128)
    image_stride: int = option("render every k-th control step", 1)
    joint_perturbation: float = option(
        "standard deviation, radians, of noise on the arm's joints at each look", 0.0
    )
    on_invalid: str = option("refuse the shard if a demonstration is bad, or skip it", "error")


def look_steps(length: int, image_stride: int, index: int) -> np.ndarray:
    """Return the steps of a demonstration at which it is rendered, int64 [looks].

    Step 0 is always among them. The others are `image_stride` apart from a first one that differs from one demonstration to the next, so
    that a dataset of few looks still shows every phase of the task.

    Args:
        length: number of actions.
        index: number of the demonstration in its shard.
    """
    return np.union1d([0], np.arange(index % image_stride, length + 1, image_stride)).astype(
        np.int64
    )


class ActionRecorder:
    """Stands in for an environment in ManiSkill's conversion and keeps every action and state."""

    def __init__(self, environment):
        self.environment = environment
        self.unwrapped = environment.unwrapped
        self.actions: list[np.ndarray] = []
        self.states = [environment.unwrapped.get_state_dict()]
        self.success: list[bool] = []

    def step(self, action):
        """Step the environment and keep the action and the state after it."""
        result = self.environment.step(action)
        self.actions.append(np.asarray(action, dtype=np.float32).reshape(-1))
        self.states.append(self.unwrapped.get_state_dict())
        self.success.append(bool(result[4]["success"]))
        return result


def flatten_state(state, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yield ("actors/cube", float32 [dim]) for every array of a state dictionary of one environment."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from flatten_state(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", np.asarray(value, dtype=np.float32).reshape(-1)


def nest_state(states: dict[str, np.ndarray], step: int) -> dict:
    """Return the state dictionary of one step, shapes [1, dim], from {"actors/cube": [T + 1, dim]}."""
    nested: dict = {}
    for name, values in states.items():
        group, key = name.split("/")
        nested.setdefault(group, {})[key] = values[step : step + 1]
    return nested


def begin(environment, demonstration: Demonstration) -> None:
    """Bring an environment into the first state of a demonstration, as an episode of evaluation begins."""
    # A scene that was used before keeps contacts in its solver, and the same actions then end elsewhere.
    environment.reset(seed=demonstration.seed, options={"reconfigure": True})
    there = dict(flatten_state(environment.unwrapped.get_state_dict()))
    # Setting a state rounds it, which contacts turn into millimetres; mostly the seed alone gives the state that was recorded.
    if any((there[name] != values[0]).any() for name, values in demonstration.states.items()):
        environment.unwrapped.set_state_dict(nest_state(demonstration.states, 0))


def converted(demonstration: Demonstration, source, target) -> Demonstration | None:
    """Return a demonstration in the control mode of `target`, or None if it does not succeed there.

    Args:
        source: an environment in the demonstration's own control mode.
        target: an environment in the wanted one.
    """
    from mani_skill.trajectory.utils.actions import conversion

    for environment in (source, target):
        begin(environment, demonstration)
    recorder = ActionRecorder(target)
    conversion.from_pd_joint_pos(
        target.unwrapped.control_mode, demonstration.actions, source, recorder
    )
    if not recorder.success[-1]:
        return None
    flat = [dict(flatten_state(state)) for state in recorder.states]
    return Demonstration(
        name=demonstration.name,
        seed=demonstration.seed,
        control_mode=target.unwrapped.control_mode,
        actions=np.stack(recorder.actions),
        states={name: np.stack([state[name] for state in flat]) for name in flat[0]},
        success=np.array(recorder.success),
    )


def check_states(environment, demonstration: Demonstration, file: Path) -> None:
    """Raise a UserError if what was recorded is not what the environment consists of.

    A part that was not recorded would silently stay where the seed put it.
    """
    wanted = {
        name: len(values) for name, values in flatten_state(environment.unwrapped.get_state_dict())
    }
    found = {name: values.shape[1] for name, values in demonstration.states.items()}
    if found != wanted:
        name = min(wanted.items() ^ found.items())[0]
        raise UserError(
            f"{file} {demonstration.name}: env_states/{name} has {found.get(name, 0)} numbers a step and in the simulator "
            f"{wanted.get(name, 0)}; record the demonstrations again with mani_skill {metadata.version('mani_skill')}."
        )


def observe(
    environment, demonstration: Demonstration, looks: np.ndarray, joint_perturbation: float = 0.0
) -> tuple[dict, dict]:
    """Set each recorded state and observe it; at looks, the arm displaced by `joint_perturbation` if there is any.

    Returns:
        ({part: float32 [T + 1, dim]}, {camera: uint8 [looks, H, W, 3]}).
    """
    environment.reset(seed=demonstration.seed)
    environment.unwrapped.set_state_dict(nest_state(demonstration.states, 0))
    displacement = (
        Displacement(environment, demonstration, joint_perturbation) if joint_perturbation else None
    )
    parts, images, rendered = [], [], set(looks.tolist())
    for step in range(len(demonstration.actions) + 1):
        environment.unwrapped.set_state_dict(nest_state(demonstration.states, step))
        if step in rendered:
            if displacement:
                displacement.at(step)
            observation = look(environment)
            images.append(observation["images"])
            parts.append(observation["state"])
        else:
            parts.append(state_parts(environment))
    stacked_parts = {key: np.stack([part[key] for part in parts]) for key in parts[0]}
    return stacked_parts, {
        camera: np.stack([image[camera] for image in images]) for camera in images[0]
    }


def part_place(part: str) -> str:
    """Return where ManiSkill's layout has a part of the state, below a demonstration's group."""
    return "obs/agent/qpos" if part == "qpos" else f"obs/extra/{part}"


def recorded(group, settings: Settings, length: int, looks: np.ndarray) -> tuple[dict, dict] | None:
    """Return what `observe` would from the observations that a demonstration of `length` actions brings in its HDF5 group.

    Returns:
        ({part: float32 [T + 1, dim]}, {camera: uint8 [looks, H, W, 3]}), or None if something is missing or of another size,
        or looks shall show a displaced arm.

    Raises:
        UserError: if they are there but cannot be read, or the state holds NaN or infinity.
    """
    if settings.joint_perturbation:
        return None
    picture = (np.uint8, (length + 1, settings.image_size, settings.image_size, 3))
    cameras = {camera: f"obs/sensor_data/{camera}/rgb" for camera in settings.cameras}
    parts = {part: part_place(part) for part in find_task(settings.task).state_parts}
    wanted = dict.fromkeys(cameras.values(), picture)
    wanted |= {place: (np.float32, (length + 1, STATE_DIMS[part])) for part, place in parts.items()}
    if any(
        place not in group or (group[place].dtype, group[place].shape) != kind
        for place, kind in wanted.items()
    ):
        return None
    where = f"{group.file.filename} {group.name.strip('/')}"
    try:
        states = {part: group[place][()] for part, place in parts.items()}
        images = {camera: group[place][()][looks] for camera, place in cameras.items()}
    except OSError as error:
        raise UserError(
            f"{where}: its observations are damaged ({error}); copy or record the file again."
        ) from error
    for part, values in states.items():
        if not np.isfinite(values).all():
            raise UserError(
                f"{where}: {parts[part]} holds NaN or infinity; record it again, or leave it out."
            )
    return states, images


def write_demonstration(
    group, demonstration: Demonstration, parts: dict, images: dict, looks: np.ndarray
) -> None:
    """Write one replayed demonstration into its HDF5 group."""
    group["actions"] = demonstration.actions
    group["success"] = demonstration.success
    group["terminated"] = demonstration.success
    group["truncated"] = np.zeros(len(demonstration.actions), dtype=bool)
    for name, values in demonstration.states.items():
        group.create_dataset(
            f"env_states/{name}", data=values, compression="gzip", compression_opts=1
        )
    for name, values in parts.items():
        group[part_place(name)] = values
    for camera, frames in images.items():
        sensor = group.create_group(f"obs/sensor_data/{camera}")
        sensor.create_dataset(
            "rgb",
            data=frames,
            chunks=(1, *frames.shape[1:]),
            compression="gzip",
            compression_opts=1,
        )
        sensor["step"] = looks


def check_source(settings: Settings, demonstrations: list[Demonstration], file: Path) -> str:
    """Return the control mode of the demonstrations.

    Raises:
        UserError: if they are of several, or cannot be converted to the wanted one.
    """
    modes = {demonstration.control_mode for demonstration in demonstrations}
    if len(modes) != 1:
        raise UserError(
            f"{file} mixes the control modes {', '.join(sorted(modes))}; split it into one file for each."
        )
    mode = modes.pop()
    if mode not in (settings.control_mode, "pd_joint_pos"):
        raise UserError(
            f"{file} was recorded in {mode}, which cannot be converted to {settings.control_mode}; set replay.control_mode to {mode}."
        )
    return mode


def replay_shard(settings: Settings, source: Path, folder: Path) -> dict:
    """Replay source/trajectory.{h5,json} into `folder` and return what was kept and lost."""
    import h5py
    from tqdm import tqdm

    from demo2eval.data.hdf5 import NewFile

    demonstrations, description, skipped = sound_demonstrations(
        source / "trajectory.h5", settings.task, settings.on_invalid
    )
    mode = check_source(settings, demonstrations, source / "trajectory.h5")

    @functools.cache
    def simulator(control_mode: str):
        # Made when first needed: it takes seconds, and a file that brings its pictures needs none.
        rendering = {"cameras": settings.cameras, "image_size": settings.image_size}
        return make_environment(
            settings.task,
            control_mode=control_mode,
            **(rendering if control_mode == settings.control_mode else {}),
        )

    check_cameras(settings.task, settings.cameras)
    episodes, lost, already = [], [], 0
    with (
        h5py.File(source / "trajectory.h5", "r") as content,
        NewFile(folder / "trajectory.h5") as file,
    ):
        for demonstration in tqdm(
            demonstrations, unit="demo", mininterval=2, desc=f"replaying {settings.task}"
        ):
            kept = demonstration
            if mode != settings.control_mode:
                check_states(simulator(mode), demonstration, source / "trajectory.h5")
                kept = converted(demonstration, simulator(mode), simulator(settings.control_mode))
            if kept is None:
                lost.append(demonstration.seed)
                continue
            looks = look_steps(len(kept.actions), settings.image_stride, len(episodes))
            seen = (
                recorded(content[kept.name], settings, len(kept.actions), looks)
                if kept is demonstration
                else None
            )
            already += seen is not None
            if seen is None:
                check_states(simulator(settings.control_mode), kept, source / "trajectory.h5")
                seen = observe(
                    simulator(settings.control_mode), kept, looks, settings.joint_perturbation
                )
            write_demonstration(file.create_group(f"traj_{len(episodes)}"), kept, *seen, looks)
            file.check()
            episodes.append(episode_entry(len(episodes), kept))
    if already:
        print(
            f"{source}: {already} of {len(episodes)} demonstrations bring their pictures, which are taken as they are."
        )
    before = description["env_info"].get("env_kwargs") or {}
    description["env_info"]["env_kwargs"] = before | {
        "obs_mode": "rgb",
        "control_mode": settings.control_mode,
    }
    write_atomic(
        folder / "trajectory.json", json.dumps(description | {"episodes": episodes}, indent=1)
    )
    seeds = [episode["episode_seed"] for episode in episodes]
    return {
        "demonstrations": len(seeds),
        "seeds": seeds,
        "lost_in_conversion": lost,
        "skipped": skipped,
        "already_rendered": already,
    }


def episode_entry(index: int, demonstration: Demonstration) -> dict:
    """Return a demonstration's entry in ManiSkill's trajectory.json."""
    return {
        "episode_id": index,
        "episode_seed": demonstration.seed,
        "control_mode": demonstration.control_mode,
        "elapsed_steps": len(demonstration.actions),
        "reset_kwargs": {"seed": demonstration.seed},
        "success": bool(demonstration.success[-1]),
    }


def replay(settings: Settings, demos: Path, output: Path) -> None:
    """Replay the shard of manifest `demos` and write the manifest `output`."""
    find_task(settings.task)
    with run_stage(
        output, stage="replay", module=__spec__.name, settings=settings, inputs={"demos": demos}
    ) as job:
        if job.reused:
            return
        facts = replay_shard(settings, demos.parent, job.partial)
        for name in ("trajectory.h5", "trajectory.json"):
            (job.partial / name).replace(job.folder / name)
        job.finish([job.folder / "trajectory.h5", job.folder / "trajectory.json"], **facts)


def main() -> None:
    """Run the stage from the command line."""
    limit_threads()
    parser = stage_parser(__doc__, Settings)
    parser.add_argument(
        "--input", type=Path, required=True, help="manifest of a shard of demonstrations"
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="manifest to write, .../shard-<number>/manifest.json",
    )
    arguments = parser.parse_args()
    replay(settings_from(arguments, Settings), arguments.input, arguments.output)


if __name__ == "__main__":
    run(main)
