"""Replay: the actions of the demonstrations, and the pictures that a robot doing them would have seen."""

import dataclasses
import resource
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest

from demo2eval.data.import_demos import Settings as ImportSettings
from demo2eval.data.import_demos import import_demos
from demo2eval.data.replay import (
    Settings,
    check_states,
    converted,
    flatten_state,
    look_steps,
    observe,
    replay,
)
from demo2eval.data.trajectory import read_demonstrations
from demo2eval.errors import UserError
from demo2eval.evaluation.workers import EpisodeSettings, make_simulator, play_episode
from demo2eval.maniskill.env import look, make_environment, render_backend
from demo2eval.provenance import read_manifest


def qpos_of(demonstration) -> np.ndarray:
    """Return the joints that were recorded, [T + 1, 9]; pose and velocity of the base, 13 numbers, come before them."""
    (states,) = [
        values for name, values in demonstration.states.items() if name.startswith("articulations/")
    ]
    return states[:, 13:22]


def test_actions_are_bit_for_bit_those_of_the_demonstrations(pushcube_demos, pushcube_replay):
    with (
        h5py.File(pushcube_demos.parent / "trajectory.h5") as demos,
        h5py.File(pushcube_replay.parent / "trajectory.h5") as replayed,
    ):
        assert sorted(demos) == sorted(replayed)
        for name in demos:
            assert demos[name]["actions"].dtype == replayed[name]["actions"].dtype == np.float32
            np.testing.assert_array_equal(demos[name]["actions"][()], replayed[name]["actions"][()])


def test_pictures_and_state_are_those_of_the_running_simulator(pushcube_demos, pushcube_replay):
    demonstrations, _ = read_demonstrations(pushcube_demos.parent / "trajectory.h5", "PushCube-v1")
    environment = make_environment(
        "PushCube-v1", control_mode="pd_joint_pos", cameras=["base_camera"], max_episode_steps=400
    )
    environment.reset(seed=demonstrations[0].seed)
    with h5py.File(pushcube_replay.parent / "trajectory.h5") as file:
        group = file["traj_0"]
        steps = group["obs/sensor_data/base_camera/step"][()].tolist()
        for step, action in enumerate(demonstrations[0].actions):
            if step in steps[:4]:
                seen = look(environment)
                recorded = group["obs/sensor_data/base_camera/rgb"][steps.index(step)]
                assert recorded.std() > 10
                np.testing.assert_array_equal(seen["images"]["base_camera"], recorded)
                np.testing.assert_array_equal(seen["state"]["qpos"], group["obs/agent/qpos"][step])
                np.testing.assert_allclose(
                    seen["state"]["tcp_pose"], group["obs/extra/tcp_pose"][step], atol=1e-6
                )
            environment.step(action)


def test_looks_cover_every_phase():
    for length, every in [(10, 1), (75, 6), (3, 6)]:
        steps = [look_steps(length, every, index) for index in range(every)]
        assert all(taken[0] == 0 and taken[-1] <= length for taken in steps)
        assert set(np.concatenate(steps)) == set(range(length + 1))


def test_the_robot_is_the_tasks_whatever_cameras_are_asked_for(stackcube_demos):
    """StackCube's robot has a camera on its hand and starts with its last joint turned, also where nobody uses that camera."""
    demonstrations, _ = read_demonstrations(
        stackcube_demos.parent / "trajectory.h5", "StackCube-v1"
    )
    settings = EpisodeSettings(
        task="StackCube-v1",
        control_mode="pd_joint_delta_pos",
        cameras=("base_camera",),
        image_size=32,
        state=("qpos",),
        max_episode_steps=2,
        replan_steps=2,
    )
    simulator = make_simulator(settings)
    for demonstration in demonstrations:
        parts, images = observe(simulator, demonstration, np.array([0, 50]))
        np.testing.assert_array_equal(parts["qpos"], qpos_of(demonstration))
        assert {camera: frames.shape for camera, frames in images.items()} == {
            "base_camera": (2, 32, 32, 3)
        }

    def ask(look, seen):
        starts.append(seen["state"])
        return np.zeros((2, 8), np.float32)

    starts = []
    for seed in [*(demonstration.seed for demonstration in demonstrations), 0, 1]:
        play_episode(simulator, settings, seed, ask)
    for start, demonstration in zip(starts, demonstrations, strict=False):
        np.testing.assert_array_equal(start, qpos_of(demonstration)[0])
    # The task's noise is 0.02 rad of standard deviation; the other Panda's last joint is 1.57 rad away.
    for start in starts:
        assert np.abs(start - qpos_of(demonstrations[0])[0]).max() < 0.15


def test_a_camera_that_the_robot_lacks_is_a_sentence(pushcube_demos, tmp_path):
    settings = Settings(task="PushCube-v1", cameras=["hand_camera"])
    with pytest.raises(UserError, match=r"PushCube-v1 holds 'hand_camera'.*it has base_camera"):
        replay(settings, pushcube_demos, tmp_path / "shard-000" / "manifest.json")


def test_states_of_other_things_are_a_sentence(pushcube_demos):
    demonstrations, _ = read_demonstrations(pushcube_demos.parent / "trajectory.h5", "PushCube-v1")
    environment = make_environment("PushCube-v1", control_mode="pd_joint_pos")
    check_states(environment, demonstrations[0], Path("a.h5"))
    states = dict(demonstrations[0].states)
    cube = states.pop("actors/cube")
    for changed in (
        states,
        states | {"actors/cube": cube[:, :7]},
        states | {"actors/cube": cube, "actors/cubeA": cube},
    ):
        with pytest.raises(
            UserError,
            match=r"a.h5 traj_0: env_states/actors/cube.* record the demonstrations again",
        ):
            check_states(
                environment, dataclasses.replace(demonstrations[0], states=changed), Path("a.h5")
            )


def test_arm_noise_displaces_looks_alone(stackcube_demos):
    demonstrations, _ = read_demonstrations(
        stackcube_demos.parent / "trajectory.h5", "StackCube-v1"
    )
    cameras = ["base_camera", "hand_camera"]
    environment = make_environment(
        "StackCube-v1", control_mode="pd_joint_pos", cameras=cameras, image_size=64
    )
    # At the start, on the way to the cube, and on the way with it.
    looks = np.array([0, 15, 75])
    (parts, images), (moved, seen) = (
        observe(environment, demonstrations[0], looks, noise) for noise in (0.0, 0.03)
    )
    others = np.setdiff1d(np.arange(len(parts["qpos"])), looks)
    for part in parts:
        np.testing.assert_array_equal(moved[part][others], parts[part][others])
    for number, step in enumerate(looks):
        assert (moved["qpos"][step, :7] != parts["qpos"][step, :7]).all()
        assert np.abs(moved["tcp_pose"][step] - parts["tcp_pose"][step]).max() > 1e-3
        for camera in cameras:
            assert (seen[camera][number] != images[camera][number]).any()


@pytest.mark.parametrize("mode", ["pd_joint_delta_pos", "pd_ee_delta_pose"])
def test_a_conversion_does_not_depend_on_the_one_before(stackcube_demos, mode):
    first, second = read_demonstrations(stackcube_demos.parent / "trajectory.h5", "StackCube-v1")[0]

    def environments():
        return [
            make_environment("StackCube-v1", control_mode=one, max_episode_steps=400)
            for one in ("pd_joint_pos", mode)
        ]

    alone = converted(second, *environments())
    source, target = environments()
    converted(first, source, target)
    after = converted(second, source, target)
    assert alone is not None
    np.testing.assert_array_equal(after.actions, alone.actions)
    assert after.states.keys() == alone.states.keys() == second.states.keys()
    for name, values in alone.states.items():
        np.testing.assert_array_equal(after.states[name], values)
    # What was written is what an episode of evaluation is.
    target.reset(seed=second.seed, options={"reconfigure": True})
    for action in alone.actions:
        target.step(action)
    for name, values in flatten_state(target.unwrapped.get_state_dict()):
        np.testing.assert_array_equal(values, alone.states[name][-1])


@pytest.fixture(scope="module")
def converted_shard(pushcube_demos, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("converted") / "shard-000" / "manifest.json"
    settings = Settings(
        task="PushCube-v1",
        cameras=["base_camera"],
        image_stride=60,
        control_mode="pd_ee_delta_pose",
        image_size=32,
    )
    replay(settings, pushcube_demos, output)
    return output


def test_another_control_mode_is_converted_and_succeeds(converted_shard):
    facts = read_manifest(converted_shard)["metadata"]
    assert facts["demonstrations"] + len(facts["lost_in_conversion"]) == 3
    assert facts["demonstrations"] >= 2
    demonstrations, _ = read_demonstrations(converted_shard.parent / "trajectory.h5", "PushCube-v1")
    assert all(
        demonstration.actions.shape[1] == 7 and demonstration.success[-1]
        for demonstration in demonstrations
    )
    # What was written is what happens: the new actions, executed, end in success.
    environment = make_environment(
        "PushCube-v1", control_mode="pd_ee_delta_pose", max_episode_steps=400
    )
    environment.reset(seed=demonstrations[0].seed)
    for action in demonstrations[0].actions:
        information = environment.step(action)[4]
    assert bool(information["success"])


def test_demonstrations_in_another_mode_cannot_be_converted_back(converted_shard, tmp_path):
    settings = Settings(task="PushCube-v1", cameras=["base_camera"], control_mode="pd_joint_pos")
    with pytest.raises(UserError, match="pd_ee_delta_pose"):
        replay(settings, converted_shard, tmp_path / "back" / "manifest.json")


RENDERED_SIZE = 32


@pytest.fixture(scope="module")
def rendered_file(pushcube_demos, tmp_path_factory) -> Path:
    """A file that ManiSkill itself recorded with pictures: two demonstrations, played again in its rgb mode."""
    import gymnasium
    import mani_skill.envs  # noqa: F401  (registers the tasks)
    from mani_skill.utils.wrappers.record import RecordEpisode

    folder = tmp_path_factory.mktemp("rendered")
    environment = gymnasium.make(
        "PushCube-v1",
        obs_mode="rgb",
        control_mode="pd_joint_pos",
        sim_backend="physx_cpu",
        render_backend=render_backend(),
        sensor_configs={"width": RENDERED_SIZE, "height": RENDERED_SIZE},
        max_episode_steps=400,
    )
    environment = RecordEpisode(
        environment, str(folder), trajectory_name="rendered", save_video=False
    )
    for demonstration in read_demonstrations(
        pushcube_demos.parent / "trajectory.h5", "PushCube-v1"
    )[0][:2]:
        environment.reset(seed=demonstration.seed, options={"reconfigure": True})
        for action in demonstration.actions:
            environment.step(action)
    environment.close()
    return folder / "rendered.h5"


@pytest.fixture
def imported(rendered_file, tmp_path) -> Path:
    """Manifest of these demonstrations, taken from the file as a user's are."""
    output = tmp_path / "imported" / "shard-000" / "manifest.json"
    import_demos(ImportSettings(task="PushCube-v1", count=2), rendered_file, output)
    return output


def rendered_settings(**changes) -> Settings:
    return Settings(
        **(
            {"task": "PushCube-v1", "cameras": ["base_camera"], "image_size": RENDERED_SIZE}
            | changes
        )
    )


@pytest.mark.parametrize("image_stride", [1, 5])
def test_pictures_that_are_there_are_taken_as_they_are(
    imported, rendered_file, tmp_path, monkeypatch, image_stride
):
    def refuse(*_, **__):
        raise AssertionError("no simulator is needed")

    monkeypatch.setattr("demo2eval.data.replay.make_environment", refuse)
    output = tmp_path / "shard-000" / "manifest.json"
    replay(rendered_settings(image_stride=image_stride), imported, output)
    facts = read_manifest(output)["metadata"]
    assert facts["already_rendered"] == facts["demonstrations"] == 2
    with (
        h5py.File(rendered_file) as recorded,
        h5py.File(output.parent / "trajectory.h5") as replayed,
    ):
        for index, name in enumerate(recorded):
            before, after = recorded[name], replayed[name]
            looks = look_steps(len(before["actions"]), image_stride, index)
            pictures = before["obs/sensor_data/base_camera/rgb"][()]
            assert pictures.std() > 10
            np.testing.assert_array_equal(after["obs/sensor_data/base_camera/step"], looks)
            np.testing.assert_array_equal(after["obs/sensor_data/base_camera/rgb"], pictures[looks])
            for place in ("actions", "obs/agent/qpos", "obs/extra/tcp_pose"):
                np.testing.assert_array_equal(after[place], before[place])


def test_pictures_of_another_size_are_rendered_and_look_alike(imported, rendered_file, tmp_path):
    output = tmp_path / "shard-000" / "manifest.json"
    replay(rendered_settings(image_size=2 * RENDERED_SIZE, image_stride=60), imported, output)
    assert read_manifest(output)["metadata"]["already_rendered"] == 0
    with (
        h5py.File(rendered_file) as recorded,
        h5py.File(output.parent / "trajectory.h5") as replayed,
    ):
        new = replayed["traj_0/obs/sensor_data/base_camera"]
        smaller = (
            new["rgb"][()].reshape(-1, RENDERED_SIZE, 2, RENDERED_SIZE, 2, 3).mean(axis=(2, 4))
        )
        old = recorded["traj_0/obs/sensor_data/base_camera/rgb"][()][new["step"][()]]
        # Without anti-aliasing edges differ; the same upside down is another picture.
        assert np.abs(smaller - old).mean() < np.abs(smaller - old[:, ::-1]).mean() / 3


def test_another_control_mode_does_not_take_the_pictures(imported, tmp_path):
    output = tmp_path / "shard-000" / "manifest.json"
    replay(rendered_settings(control_mode="pd_joint_delta_pos", image_stride=60), imported, output)
    facts = read_manifest(output)["metadata"]
    assert facts["demonstrations"] > 0
    assert facts["already_rendered"] == 0


def test_a_recorded_state_that_is_not_finite_is_a_sentence(imported, tmp_path):
    with h5py.File(imported.parent / "trajectory.h5", "r+") as file:
        file["traj_1/obs/agent/qpos"][3, 2] = np.nan
    with pytest.raises(UserError, match=r"trajectory.h5 traj_1: obs/agent/qpos holds NaN"):
        replay(rendered_settings(), imported, tmp_path / "shard-000" / "manifest.json")


def test_a_full_disk_is_one_sentence_and_nothing_is_finished(imported, tmp_path):
    output = tmp_path / "shard-000" / "manifest.json"
    words = [
        "--task",
        "PushCube-v1",
        "--cameras",
        '["base_camera"]',
        "--image-size",
        str(RENDERED_SIZE),
    ]
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "demo2eval.data.replay",
            *words,
            "--input",
            str(imported),
            "--output",
            str(output),
        ],
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (50_000,) * 2),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1, result.stderr
    assert f"{output.parent} cannot be written, the disk is full" in result.stderr
    assert "trajectory.h5" in result.stderr
    assert "Traceback" not in result.stderr
    assert not output.exists()
    assert not (output.parent / "trajectory.h5").exists()
    replay(rendered_settings(), imported, output)
    assert read_manifest(output)["metadata"]["demonstrations"] == 2
