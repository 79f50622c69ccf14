"""Replay: the actions of the demos, and the images that a robot doing them would have seen."""

import dataclasses
import shutil
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from conftest import find_task

from demo2eval.config import Replay
from demo2eval.data.import_demos import import_demos
from demo2eval.data.replay import (
    InvalidDemo,
    check_env_states,
    convert_demo,
    find_contradiction,
    flatten_state,
    observe_demo,
    rendered_steps,
    replay_demos,
    reset_to_start,
)
from demo2eval.data.trajectory import Demo, read_trajectory_file
from demo2eval.errors import UserError
from demo2eval.maniskill.env import get_observation, get_state, make_env, render_backend
from demo2eval.provenance import read_manifest

pytestmark = pytest.mark.simulator


def read_demos(manifest: Path) -> list[Demo]:
    return read_trajectory_file(manifest.with_name("trajectory.h5")).demos


def make_task_env(task: str, control_mode: str = "pd_joint_pos", **options):
    return make_env(task, robot=find_task(task).robot, control_mode=control_mode, **options)


def replay_pushcube(demos: Path, output: Path, on_invalid="error", **settings) -> dict:
    """Replay demos of PushCube and return the manifest's metadata."""
    task = find_task("PushCube-v1")
    replay_demos(
        demos,
        output,
        task="PushCube-v1",
        robot=task.robot,
        object=task.object,
        replay=Replay.model_validate(settings),
        on_invalid=on_invalid,
    )
    return read_manifest(output)["metadata"]


def read_qpos(demo: Demo) -> np.ndarray:
    """Return the recorded joints, [T + 1, 9]; 13 numbers of the robot's base come before them."""
    (states,) = [
        values for name, values in demo.states.items() if name.startswith("articulations/")
    ]
    return states[:, 13:22]


def test_actions_are_bit_for_bit_those_of_the_demos(pushcube_demos, pushcube_replay):
    demos, replayed = read_demos(pushcube_demos), read_demos(pushcube_replay)
    for demo, replayed_demo in zip(demos, replayed, strict=True):
        assert demo.actions.dtype == replayed_demo.actions.dtype == np.float32
        np.testing.assert_array_equal(demo.actions, replayed_demo.actions)


def test_images_and_state_are_those_of_the_running_env(pushcube_demos, pushcube_replay):
    demo = read_demos(pushcube_demos)[0]
    env = make_task_env("PushCube-v1", cameras=["base_camera"], max_episode_steps=400)
    env.reset(seed=demo.seed)
    with h5py.File(pushcube_replay.parent / "trajectory.h5") as file:
        group = file["traj_0"]
        steps = group["obs/sensor_data/base_camera/step"][()].tolist()
        for step, action in enumerate(demo.actions):
            if step in steps[:4]:
                observation = get_observation(env)
                images, state = observation["images"], observation["state"]
                replayed = group["obs/sensor_data/base_camera/rgb"][steps.index(step)]
                assert replayed.std() > 10
                np.testing.assert_array_equal(images["base_camera"], replayed)
                np.testing.assert_array_equal(state["qpos"], group["obs/agent/qpos"][step])
                np.testing.assert_allclose(
                    state["tcp_pose"], group["obs/extra/tcp_pose"][step], atol=1e-6
                )
            env.step(action)


def test_every_vector_that_the_env_observes_is_recorded(pushcube_replay):
    env = make_task_env("PushCube-v1")
    env.reset(seed=0)
    parts = set(get_state(env))
    assert {"qpos", "tcp_pose"} <= parts
    with h5py.File(pushcube_replay.parent / "trajectory.h5") as file:
        group = file["traj_0"]
        assert set(group["obs/agent"]) | set(group["obs/extra"]) == parts


def test_rendered_steps_cover_every_phase():
    for length, image_stride in [(10, 1), (75, 6), (3, 6)]:
        steps = [rendered_steps(length, image_stride, index) for index in range(image_stride)]
        assert all(rendered[0] == 0 and rendered[-1] <= length for rendered in steps)
        assert set(np.concatenate(steps)) == set(range(length + 1))


def test_the_robot_is_the_tasks_whatever_cameras_are_asked_for(stackcube_demos):
    """StackCube's robot has a wrist camera and starts with its last joint turned, also if the
    camera is not used."""
    demos = read_demos(stackcube_demos)
    env = make_task_env(
        "StackCube-v1", "pd_joint_delta_pos", cameras=["base_camera"], image_size=32
    )
    for demo in demos:
        states, images = observe_demo(env, demo, np.array([0, 50]))
        np.testing.assert_array_equal(states["qpos"], read_qpos(demo))
        shapes = {camera: frames.shape for camera, frames in images.items()}
        assert shapes == {"base_camera": (2, 32, 32, 3)}
    starts = []
    for seed in [*(demo.seed for demo in demos), 0, 1]:
        env.reset(seed=seed, options={"reconfigure": True})
        starts.append(get_state(env)["qpos"])
    for start, demo in zip(starts, demos, strict=False):
        np.testing.assert_array_equal(start, read_qpos(demo)[0])
    # The task's noise is 0.02 rad of standard deviation; the other Panda's last joint is 1.57 rad
    # away.
    for start in starts:
        assert np.abs(start - read_qpos(demos[0])[0]).max() < 0.15


def test_a_camera_that_the_robot_lacks_is_a_sentence(pushcube_demos, tmp_path):
    with pytest.raises(UserError, match=r"panda has no camera 'hand_camera'; it has base_camera"):
        replay_pushcube(
            pushcube_demos, tmp_path / "manifest.json", cameras={"base_0_rgb": "hand_camera"}
        )


def test_a_shard_that_was_damaged_is_a_sentence(pushcube_demos, tmp_path):
    for name in ("manifest.json", "trajectory.json"):
        (tmp_path / name).write_bytes(pushcube_demos.with_name(name).read_bytes())
    content = pushcube_demos.with_name("trajectory.h5").read_bytes()
    (tmp_path / "trajectory.h5").write_bytes(content[: len(content) // 2])
    output = tmp_path / "out" / "manifest.json"
    with pytest.raises(UserError, match=r"trajectory.h5 is not what .*manifest.json describes"):
        replay_pushcube(tmp_path / "manifest.json", output)
    assert not output.exists()


def test_states_of_other_things_are_found(pushcube_demos):
    demo = read_demos(pushcube_demos)[0]
    env = make_task_env("PushCube-v1")
    check_env_states(env, demo)
    states = dict(demo.states)
    cube = states.pop("actors/cube")
    for changed in (
        states,
        states | {"actors/cube": cube[:, :7]},
        states | {"actors/cube": cube, "actors/cubeA": cube},
    ):
        with pytest.raises(InvalidDemo, match=r"numbers per step of env_states/actors/cube"):
            check_env_states(env, dataclasses.replace(demo, states=changed))


@pytest.mark.parametrize(
    ("spoil", "sentence"),
    [
        (lambda demo, _: {"actions": demo.actions[::-1]}, "contradicts itself at step 0"),
        (lambda demo, other: {"actions": other.actions}, "contradicts itself at step"),
        (lambda demo, _: {"states": last_moved_away(demo.states)}, "is no success"),
        (lambda demo, _: {}, None),
    ],
    ids=["reversed", "of another demo", "without success", "as recorded"],
)
def test_actions_that_do_not_lead_to_the_states_are_found(pushcube_demos, spoil, sentence):
    demo, other, _ = sorted(read_demos(pushcube_demos), key=lambda demo: len(demo.actions))
    env = make_task_env("PushCube-v1")
    reason = find_contradiction(env, dataclasses.replace(demo, **spoil(demo, other)))
    assert reason is None if sentence is None else sentence in reason


def test_a_demo_that_contradicts_itself_is_skipped_on_request(pushcube_demos, tmp_path):
    source = tmp_path / "own.h5"
    for suffix in (".h5", ".json"):
        shutil.copy(pushcube_demos.with_name(f"trajectory{suffix}"), source.with_suffix(suffix))
    with h5py.File(source, "r+") as file:
        file["traj_1/actions"][:] = file["traj_1/actions"][()][::-1]
    demos, output = tmp_path / "demos/manifest.json", tmp_path / "replay/manifest.json"
    import_demos([source], demos, task="PushCube-v1", robot="panda", num_demos=3)
    rendered = {"image_size": 32, "image_stride": 60}
    with pytest.raises(UserError, match=r"h5: traj_1 contradicts .* demos.on_invalid: skip"):
        replay_pushcube(demos, output, **rendered)
    assert not output.exists()
    metadata = replay_pushcube(demos, output, on_invalid="skip", **rendered)
    assert [item["trajectory"] for item in metadata["skipped"]] == ["traj_1"]
    kept = [demo.seed for demo in read_demos(demos) if demo.name != "traj_1"]
    assert kept == metadata["seeds"] == [demo.seed for demo in read_demos(output)]


def last_moved_away(states):
    """Return states of which the last ones have the cube elsewhere, as another task might."""
    cube = states["actors/cube"].copy()
    cube[-3:, 1] += 0.5
    return states | {"actors/cube": cube}


def test_joint_perturbation_displaces_rendered_steps_alone(stackcube_demos):
    demo = read_demos(stackcube_demos)[0]
    cameras = ["base_camera", "hand_camera"]
    env = make_task_env("StackCube-v1", cameras=cameras, image_size=64)
    # At the start, on the way to the cube, and on the way with it.
    steps = np.array([0, 15, 75])
    object_name = find_task("StackCube-v1").object
    (states, images), (moved, moved_images) = (
        observe_demo(env, demo, steps, std, object_name) for std in (0.0, 0.03)
    )
    others = np.setdiff1d(np.arange(len(states["qpos"])), steps)
    for part in states:
        np.testing.assert_array_equal(moved[part][others], states[part][others])
    for number, step in enumerate(steps):
        assert (moved["qpos"][step, :7] != states["qpos"][step, :7]).all()
        assert np.abs(moved["tcp_pose"][step] - states["tcp_pose"][step]).max() > 1e-3
        for camera in cameras:
            assert (moved_images[camera][number] != images[camera][number]).any()


@pytest.mark.parametrize("mode", ["pd_joint_delta_pos", "pd_ee_delta_pose"])
def test_a_conversion_does_not_depend_on_the_one_before(stackcube_demos, mode):
    first, second = read_demos(stackcube_demos)

    def make_envs():
        return [
            make_task_env("StackCube-v1", control_mode, max_episode_steps=400)
            for control_mode in ("pd_joint_pos", mode)
        ]

    alone = convert_demo(second, *make_envs())
    source, target = make_envs()
    convert_demo(first, source, target)
    after = convert_demo(second, source, target)
    assert alone is not None
    assert after is not None
    np.testing.assert_array_equal(after.actions, alone.actions)
    assert after.states.keys() == alone.states.keys() == second.states.keys()
    for name, values in alone.states.items():
        np.testing.assert_array_equal(after.states[name], values)
    # What was written is what an episode of evaluation is. On another processor than the fixture's
    # the seed alone gives the first state but for its last bits, and the end may be millimeters
    # away.
    reset_to_start(target, second)
    for action in alone.actions:
        target.step(action)
    for name, values in flatten_state(target.unwrapped.get_state_dict()):
        np.testing.assert_array_equal(values, alone.states[name][-1])


@pytest.fixture(scope="module")
def converted_shard(pushcube_demos, tmp_path_factory) -> Path:
    """Manifest of demos that were replayed in another control mode."""
    output = tmp_path_factory.mktemp("converted") / "shard-000" / "manifest.json"
    replay_pushcube(
        pushcube_demos, output, control_mode="pd_ee_delta_pose", image_stride=60, image_size=32
    )
    return output


def test_another_control_mode_is_converted_and_succeeds(converted_shard):
    metadata = read_manifest(converted_shard)["metadata"]
    assert metadata["demos"] + len(metadata["lost_in_conversion"]) == 3
    assert metadata["demos"] >= 2
    demos = read_demos(converted_shard)
    assert all(demo.actions.shape[1] == 7 and demo.success[-1] for demo in demos)
    # What was written is what happens: the new actions, executed, end in success.
    env = make_task_env("PushCube-v1", "pd_ee_delta_pose", max_episode_steps=400)
    env.reset(seed=demos[0].seed)
    info: dict[str, Any] = {}
    for action in demos[0].actions:
        info = env.step(action)[4]
    assert bool(info["success"])


def test_demos_in_another_mode_cannot_be_converted_back(converted_shard, tmp_path):
    with pytest.raises(UserError, match="pd_ee_delta_pose"):
        replay_pushcube(
            converted_shard, tmp_path / "back" / "manifest.json", control_mode="pd_joint_pos"
        )


RENDERED_SIZE = 32


@pytest.fixture(scope="module")
def rendered_file(pushcube_demos, tmp_path_factory) -> Path:
    """A file that ManiSkill itself recorded with images: two demos, executed in its rgb mode."""
    import gymnasium
    import mani_skill.envs  # noqa: F401  (registers the tasks)
    from mani_skill.utils.wrappers.record import RecordEpisode

    folder = tmp_path_factory.mktemp("rendered")
    env = gymnasium.make(
        "PushCube-v1",
        obs_mode="rgb",
        control_mode="pd_joint_pos",
        sim_backend="physx_cpu",
        render_backend=render_backend(),
        sensor_configs={"width": RENDERED_SIZE, "height": RENDERED_SIZE},
        max_episode_steps=400,
    )
    env = RecordEpisode(env, str(folder), trajectory_name="rendered", save_video=False)
    for demo in read_demos(pushcube_demos)[:2]:
        env.reset(seed=demo.seed, options={"reconfigure": True})
        for action in demo.actions:
            env.step(action)
    env.close()
    return folder / "rendered.h5"


@pytest.fixture
def imported(rendered_file, tmp_path) -> Path:
    """Manifest of these demos, imported from the file as a user's are."""
    output = tmp_path / "imported" / "shard-000" / "manifest.json"
    import_demos([rendered_file], output, task="PushCube-v1", robot="panda", num_demos=2)
    return output


@pytest.mark.parametrize("image_stride", [1, 5])
def test_images_that_exist_are_taken_as_they_are(
    imported, rendered_file, tmp_path, monkeypatch, image_stride
):
    def fail(*_, **__):
        raise AssertionError("nothing is rendered")

    monkeypatch.setattr("demo2eval.data.replay.get_observation", fail)
    output = tmp_path / "shard-000" / "manifest.json"
    metadata = replay_pushcube(
        imported, output, image_size=RENDERED_SIZE, image_stride=image_stride
    )
    assert metadata["already_rendered"] == metadata["demos"] == 2
    with (
        h5py.File(rendered_file) as recorded,
        h5py.File(output.parent / "trajectory.h5") as replayed,
    ):
        for index, name in enumerate(recorded):
            before, after = recorded[name], replayed[name]
            steps = rendered_steps(len(before["actions"]), image_stride, index)
            images = before["obs/sensor_data/base_camera/rgb"][()]
            assert images.std() > 10
            np.testing.assert_array_equal(after["obs/sensor_data/base_camera/step"], steps)
            np.testing.assert_array_equal(after["obs/sensor_data/base_camera/rgb"], images[steps])
            for path in ("actions", "obs/agent/qpos", "obs/extra/tcp_pose"):
                np.testing.assert_array_equal(after[path], before[path])


def test_images_of_another_size_are_rendered_and_look_alike(imported, rendered_file, tmp_path):
    output = tmp_path / "shard-000" / "manifest.json"
    metadata = replay_pushcube(imported, output, image_size=2 * RENDERED_SIZE, image_stride=60)
    assert metadata["already_rendered"] == 0
    with (
        h5py.File(rendered_file) as recorded,
        h5py.File(output.parent / "trajectory.h5") as replayed,
    ):
        new = replayed["traj_0/obs/sensor_data/base_camera"]
        smaller = (
            new["rgb"][()].reshape(-1, RENDERED_SIZE, 2, RENDERED_SIZE, 2, 3).mean(axis=(2, 4))
        )
        old = recorded["traj_0/obs/sensor_data/base_camera/rgb"][()][new["step"][()]]
        # Without anti-aliasing edges differ; the same upside down is another image.
        assert np.abs(smaller - old).mean() < np.abs(smaller - old[:, ::-1]).mean() / 3


def test_another_control_mode_does_not_take_the_images(imported, tmp_path):
    metadata = replay_pushcube(
        imported,
        tmp_path / "shard-000" / "manifest.json",
        control_mode="pd_joint_delta_pos",
        image_size=RENDERED_SIZE,
        image_stride=60,
    )
    assert metadata["demos"] > 0
    assert metadata["already_rendered"] == 0


def test_an_observed_state_that_is_not_finite_is_a_sentence(rendered_file, tmp_path):
    for suffix in (".h5", ".json"):
        copy = (tmp_path / "copy").with_suffix(suffix)
        copy.write_bytes(rendered_file.with_suffix(suffix).read_bytes())
    with h5py.File(tmp_path / "copy.h5", "r+") as file:
        file["traj_1/obs/agent/qpos"][3, 2] = np.nan
    output = tmp_path / "shard-000" / "manifest.json"
    with pytest.raises(UserError, match=r"copy.h5 traj_1: obs/agent/qpos is not finite at step 3"):
        import_demos([tmp_path / "copy.h5"], output, task="PushCube-v1", robot="panda", num_demos=2)
    assert not output.exists()
