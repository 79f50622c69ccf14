"""Replays one shard of demos in the configured control mode and adds images.

In:  the manifest of a shard of demos, with trajectory.h5 and trajectory.json beside it.
Out: the same two files with observations, in ManiSkill's layout (`demo2eval.data.trajectory`):
     obs/agent/qpos and obs/extra/<part> of every step, and the images of the rendered steps.

Where the control mode stays the same, the recorded states are set one by one and rendered: no
physics, and the actions are those of the demo bit for bit. That the states follow from the actions,
and that the last one is a success, is tried at some steps; a demo that contradicts itself is
invalid. Otherwise ManiSkill's own conversion
makes new actions and states first; a demo that does not succeed any more is left out and named in
the manifest.

A demo of this control mode that brings observations as ManiSkill records them with obs_mode rgb,
with images of all these cameras in this size, is not rendered: its observations are taken as they
are, and the manifest counts it as `already_rendered`.

With `joint_perturbation` every image is of a displaced arm (`demo2eval.data.perturb`), and so are
the observed vectors of that step. Actions and env_states are the demo's.
"""

import json
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from demo2eval.cli import run
from demo2eval.config import OnInvalid, Replay
from demo2eval.data.perturb import JointPerturbation
from demo2eval.data.trajectory import (
    SENSORS,
    Demo,
    read_arrays,
    read_trajectory_file,
    state_path,
)
from demo2eval.errors import UserError
from demo2eval.maniskill.env import get_observation, get_state, limit_threads, make_env
from demo2eval.provenance import require_room, run_stage, write_atomic
from demo2eval.robots import Robot

CHECKED_STEPS = 16
MAX_DEVIATION = 0.01
"""Radians (meters, of the fingers)."""

type Observations = tuple[dict[str, np.ndarray], dict[str, np.ndarray]]
"""({part: float32 [T + 1, dim]}, {camera: uint8 [N, H, W, 3]})."""


class InvalidDemo(Exception):
    """What is wrong with a demo, in a few words."""


def replay_demos(
    demos: Path,
    output: Path,
    *,
    task: str,
    robot: Robot,
    object: str,
    replay: Replay = Replay(),
    on_invalid: OnInvalid = "error",
) -> None:
    """Replay one shard of demos.

    Args:
        demos: manifest of a shard of demos.
        output: manifest to write, .../shard-000/manifest.json.
        task: ManiSkill's environment id, such as PushCube-v1.
        robot: ManiSkill's robot.
        object: attribute of the env, the object that is manipulated; moves with a displaced hand.
        replay: control mode and images.
        on_invalid: error: stop if a demo is invalid. skip: leave it out and name it in the
            manifest.

    Raises:
        UserError: if the shard cannot be read, or is of another control mode that cannot be
            converted; if demos were recorded with another version of the task, have actions that do
            not lead to their states, or damaged observations.
    """
    settings = {
        "task": task,
        "robot": robot,
        "object": object,
        "replay": replay,
        "on_invalid": on_invalid,
    }
    with run_stage(
        output, stage="replay", module=__spec__.name, settings=settings, inputs={"demos": demos}
    ) as job:
        if job.reused:
            return
        shard = ShardReplay(demos.parent / "trajectory.h5", task, robot, object, replay)
        counts = shard.write(job.partial, on_invalid)
        job.finish(job.publish("trajectory.h5", "trajectory.json"), **counts)


class ShardReplay:
    """The replay of one trajectory file."""

    def __init__(self, path: Path, task: str, robot: Robot, object_name: str, settings: Replay):
        """Read the file; see `replay_demos` for the arguments and errors."""
        self._file = read_trajectory_file(path)
        self._task, self._object_name = task, object_name
        self._robot: Robot = robot
        self._settings = settings
        self._cameras = sorted(set(settings.cameras.values()))
        self._recorded_mode = self._find_control_mode()
        self._envs: dict[str, Any] = {}

    def _find_control_mode(self) -> str:
        path, target = self._file.path, self._settings.control_mode
        modes = sorted({demo.control_mode for demo in self._file.demos})
        if len(modes) != 1:
            raise UserError(
                f"{path} mixes the control modes {', '.join(modes)}; split it into a file for each."
            )
        if modes[0] not in (target, "pd_joint_pos"):
            raise UserError(
                f"{path} was recorded in {modes[0]}, which cannot be converted to {target}; set "
                f"replay.control_mode to {modes[0]}."
            )
        return modes[0]

    def _env(self, control_mode: str):
        # Made when first needed: it takes seconds.
        if control_mode not in self._envs:
            rendered = control_mode == self._settings.control_mode
            self._envs[control_mode] = make_env(
                self._task,
                robot=self._robot,
                control_mode=control_mode,
                cameras=self._cameras if rendered else (),
                image_size=self._settings.image_size,
            )
        return self._envs[control_mode]

    def write(self, folder: Path, on_invalid: OnInvalid) -> dict:
        """Write trajectory.{h5,json} into `folder`; return what was kept and lost."""
        import h5py
        from tqdm import tqdm

        episodes, lost, skipped, already_rendered = [], [], [], 0
        require_room(folder, 0)
        bar = tqdm(self._file.demos, unit="demo", mininterval=2, desc=f"replaying {self._task}")
        with (
            h5py.File(self._file.path, "r") as content,
            h5py.File(folder / "trajectory.h5", "w") as file,
        ):
            for recorded in bar:
                try:
                    demo = self._convert(recorded)
                    if demo is None:
                        lost.append(recorded.seed)
                        continue
                    steps = rendered_steps(
                        len(demo.actions), self._settings.image_stride, len(episodes)
                    )
                    observations = self._read_observations(content[demo.name], steps)
                except InvalidDemo as error:
                    skipped.append({"trajectory": recorded.name, "reason": str(error)})
                    continue
                already_rendered += observations is not None
                if observations is None:
                    observations = self._observe(demo, steps)
                group = file.create_group(f"traj_{len(episodes)}")
                write_demo(group, demo, observations, steps)
                episodes.append(describe_episode(len(episodes), demo))
        sentences = [f"{item['trajectory']} {item['reason']}" for item in skipped]
        if skipped and (on_invalid == "error" or not episodes):
            hint = ", or leave them out with demos.on_invalid: skip" if episodes else ""
            raise UserError(
                f"{self._file.path}: {'; '.join(sentences)}. Record these demonstrations "
                f"again{hint}."
            )
        for sentence in sentences:
            print(f"skipped: {self._file.path} {sentence}", file=sys.stderr)
        if already_rendered:
            print(
                f"{self._file.path}: {already_rendered} of {len(episodes)} demos bring their "
                "images, which are taken as they are.",
                file=sys.stderr,
            )
        self._write_metadata(folder / "trajectory.json", episodes)
        return {
            "demos": len(episodes),
            "seeds": [episode["episode_seed"] for episode in episodes],
            "lost_in_conversion": lost,
            "already_rendered": already_rendered,
            "skipped": skipped,
        }

    def _convert(self, demo: Demo) -> Demo | None:
        """Return the demo in the configured control mode, or None if it does not succeed there."""
        source, target = self._env(self._recorded_mode), self._env(self._settings.control_mode)
        check_env_states(source, demo)
        if source is not target:
            return convert_demo(demo, source, target)
        if reason := find_contradiction(source, demo):
            raise InvalidDemo(reason)
        return demo

    def _read_observations(self, group, steps: np.ndarray) -> Observations | None:
        """Return what the recorded demo itself brings, or None if it has to be rendered."""
        converted = self._recorded_mode != self._settings.control_mode
        if converted or self._settings.joint_perturbation:
            return None
        try:
            return read_observations(group, self._cameras, self._settings.image_size, steps)
        except OSError as error:
            raise InvalidDemo(f"has observations that are damaged ({error})") from error

    def _observe(self, demo: Demo, steps: np.ndarray) -> Observations:
        env, std = self._env(self._settings.control_mode), self._settings.joint_perturbation
        return observe_demo(env, demo, steps, std, self._object_name)

    def _write_metadata(self, path: Path, episodes: list[dict]) -> None:
        content: dict[str, Any] = self._file.metadata | {"episodes": episodes}
        kwargs = content["env_info"].get("env_kwargs") or {}
        changed = {"obs_mode": "rgb", "control_mode": self._settings.control_mode}
        content["env_info"]["env_kwargs"] = kwargs | changed
        write_atomic(path, json.dumps(content, indent=1))


def rendered_steps(length: int, image_stride: int, index: int) -> np.ndarray:
    """Return the steps of a demo at which it is rendered, int64 [N].

    Step 0 is always among them. The others are `image_stride` apart from a first one that differs
    from one demo to the next, so that a dataset of few images still shows every phase of the task.

    Args:
        length: number of actions.
        index: number of the demo in its shard.
    """
    steps = np.arange(index % image_stride, length + 1, image_stride)
    return np.union1d([0], steps).astype(np.int64)


# States.


def flatten_state(state: dict, prefix: str = "") -> Iterator[tuple[str, np.ndarray]]:
    """Yield ("actors/cube", float32 [dim]) for every array of a state dictionary of one env."""
    for key, value in state.items():
        if isinstance(value, dict):
            yield from flatten_state(value, f"{prefix}{key}/")
        else:
            yield f"{prefix}{key}", np.asarray(value, dtype=np.float32).reshape(-1)


def nest_state(states: dict[str, np.ndarray], step: int) -> dict:
    """Return a step's state dictionary, [1, dim] each, from {"actors/cube": [T + 1, dim]}."""
    nested: dict = {}
    for name, values in states.items():
        group, key = name.split("/")
        nested.setdefault(group, {})[key] = values[step : step + 1]
    return nested


def reset_to_start(env, demo: Demo) -> None:
    """Bring an env into the first state of a demo, as an episode of evaluation begins."""
    # A used scene keeps contacts in its solver: the same actions then end elsewhere.
    env.reset(seed=demo.seed, options={"reconfigure": True})
    state = dict(flatten_state(env.unwrapped.get_state_dict()))
    # Setting a state rounds it, which contacts turn into millimeters. Mostly the seed alone gives
    # the recorded state; on another processor it may differ in its last bits.
    if any((state[name] != values[0]).any() for name, values in demo.states.items()):
        env.unwrapped.set_state_dict(nest_state(demo.states, 0))


def check_env_states(env, demo: Demo) -> None:
    """Raise InvalidDemo if the things that were recorded are not those in the env.

    One that was not recorded would silently stay where the seed put it.
    """
    state = flatten_state(env.unwrapped.get_state_dict())
    simulated = {name: len(values) for name, values in state}
    recorded = {name: values.shape[1] for name, values in demo.states.items()}
    if recorded != simulated:
        name = min(simulated.items() ^ recorded.items())[0]
        raise InvalidDemo(
            f"has {recorded.get(name, 0)} numbers per step of env_states/{name}, and "
            f"mani_skill {metadata.version('mani_skill')} has {simulated.get(name, 0)}"
        )


def find_contradiction(env, demo: Demo) -> str | None:
    """Execute some actions from their states; return what contradicts the record, or None.

    Over 24 planned demos of six tasks, and 12 of PushCube in three other control modes, no joint
    deviated by more than 0.006 rad. With shuffled actions, or those of another demo, some step
    deviated by 0.015 rad at least.
    """
    env.reset(seed=demo.seed)
    robot = f"articulations/{env.unwrapped.agent.robot.name}"
    info: dict = {}
    for step in np.unique(np.linspace(0, len(demo.actions) - 1, CHECKED_STEPS).astype(int)):
        env.unwrapped.set_state_dict(nest_state(demo.states, step))
        info = env.step(demo.actions[step])[4]
        state = dict(flatten_state(env.unwrapped.get_state_dict()))[robot]
        # Pose and velocity of the base come first, velocities of the joints last.
        joints = slice(13, 13 + (len(state) - 13) // 2)
        deviation = np.abs(state - demo.states[robot][step + 1])[joints].max()
        if deviation > MAX_DEVIATION:
            return (
                f"contradicts itself at step {step}: its action leads to a state whose joints are "
                f"{deviation:.2g} rad from the recorded next one"
            )
    return (
        None if bool(info["success"]) else "is no success: its last action does not solve the task"
    )


# Conversion to another control mode.


class ActionRecorder:
    """Stands in for an env in ManiSkill's conversion and keeps every action and state."""

    def __init__(self, env):
        self.env = env
        self.unwrapped = env.unwrapped
        self.actions: list[np.ndarray] = []
        self.states = [env.unwrapped.get_state_dict()]
        self.success: list[bool] = []

    def step(self, action):
        """Step the env and keep the action and the state after it."""
        result = self.env.step(action)
        self.actions.append(np.asarray(action, dtype=np.float32).reshape(-1))
        self.states.append(self.unwrapped.get_state_dict())
        self.success.append(bool(result[4]["success"]))
        return result


def convert_demo(demo: Demo, source, target) -> Demo | None:
    """Return a demo in the control mode of the env `target`, or None if it does not succeed there.

    Args:
        source: an env in the demo's own control mode, pd_joint_pos.
    """
    from mani_skill.trajectory.utils.actions import conversion

    for env in (source, target):
        reset_to_start(env, demo)
    recorder: Any = ActionRecorder(target)
    control_mode = target.unwrapped.control_mode
    conversion.from_pd_joint_pos(control_mode, demo.actions, source, recorder)
    if not recorder.success[-1]:
        return None
    states = [dict(flatten_state(state)) for state in recorder.states]
    return Demo(
        name=demo.name,
        seed=demo.seed,
        control_mode=control_mode,
        actions=np.stack(recorder.actions),
        states={name: np.stack([state[name] for state in states]) for name in states[0]},
        success=np.array(recorder.success),
    )


# Observations.


def observe_demo(
    env,
    demo: Demo,
    steps: np.ndarray,
    joint_perturbation: float = 0.0,
    object_name: str = "",
) -> Observations:
    """Set each recorded state and observe it.

    Args:
        steps: those to render, with the arm displaced by `joint_perturbation`, radians.
        object_name: attribute of the env, the object that a displaced hand takes along.
    """
    env.reset(seed=demo.seed)
    env.unwrapped.set_state_dict(nest_state(demo.states, 0))
    perturbation = None
    if joint_perturbation:
        perturbation = JointPerturbation(env, demo, joint_perturbation, object_name)
    states, images, rendered = [], [], set(steps.tolist())
    for step in range(len(demo.actions) + 1):
        env.unwrapped.set_state_dict(nest_state(demo.states, step))
        if step in rendered:
            if perturbation:
                perturbation.apply(step)
            observation = get_observation(env)
            images.append(observation["images"])
            states.append(observation["state"])
        else:
            states.append(get_state(env))
    return _stack(states), _stack(images)


def _stack(items: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {key: np.stack([item[key] for item in items]) for key in items[0]}


def read_observations(
    group, cameras: list[str], image_size: int, steps: np.ndarray
) -> Observations | None:
    """Return what `observe_demo` would from the observations in the group of a demo.

    Returns:
        None if some are missing, or the images are of another size.
    """
    length = len(group["actions"])
    images = {camera: f"{SENSORS}/{camera}/rgb" for camera in cameras}
    shape = (length + 1, image_size, image_size, 3)
    if any(path not in group or group[path].shape != shape for path in images.values()):
        return None
    if state_path("qpos") not in group or "obs/extra" not in group:
        return None
    extra = dict(read_arrays(group["obs/extra"]))
    states = {"qpos": group[state_path("qpos")][()]} | {
        part: values
        for part, values in extra.items()
        if values.ndim == 2 and values.dtype.kind == "f"
    }
    return (
        {part: values.astype(np.float32) for part, values in states.items()},
        {camera: group[path][()][steps] for camera, path in images.items()},
    )


# What is written.


def write_demo(group, demo: Demo, observations: Observations, steps: np.ndarray) -> None:
    """Write a replayed demo into its HDF5 group.

    Raises:
        OSError: if the disk has no room for it; then nothing of it is written.
    """
    arrays = [demo.actions, *demo.states.values(), *observations[0].values()]
    size = sum(array.nbytes for array in [*arrays, *observations[1].values()])
    require_room(Path(group.file.filename).parent, size)
    gzip = {"compression": "gzip", "compression_opts": 1}
    group["actions"] = demo.actions
    group["success"] = demo.success
    group["terminated"] = demo.success
    group["truncated"] = np.zeros(len(demo.actions), dtype=bool)
    for name, values in demo.states.items():
        group.create_dataset(f"env_states/{name}", data=values, **gzip)
    states, images = observations
    for part, values in states.items():
        group[state_path(part)] = values
    for camera, frames in images.items():
        sensor = group.create_group(f"{SENSORS}/{camera}")
        sensor.create_dataset("rgb", data=frames, chunks=(1, *frames.shape[1:]), **gzip)
        sensor["step"] = steps
    group.file.flush()


def describe_episode(index: int, demo: Demo) -> dict:
    """Return a demo's entry in ManiSkill's trajectory.json."""
    return {
        "episode_id": index,
        "episode_seed": demo.seed,
        "control_mode": demo.control_mode,
        "elapsed_steps": len(demo.actions),
        "reset_kwargs": {"seed": demo.seed},
        "success": bool(demo.success[-1]),
    }


if __name__ == "__main__":
    limit_threads()
    run(replay_demos)
