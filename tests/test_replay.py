"""Replay: the actions of the demonstrations, and the pictures that a robot doing them would have seen."""

import h5py
import numpy as np
import pytest

from demo2eval.demonstrations import read_demonstrations
from demo2eval.errors import UserError
from demo2eval.manifest import read_manifest
from demo2eval.maniskill.environment import look, make_environment
from demo2eval.replay import Settings, look_steps, replay


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
    environment = make_environment("PushCube-v1", control_mode="pd_joint_pos", cameras=["base_camera"], max_episode_steps=400)
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
                np.testing.assert_allclose(seen["state"]["tcp_pose"], group["obs/extra/tcp_pose"][step], atol=1e-6)
            environment.step(action)


def test_looks_cover_every_phase():
    for length, every in [(10, 1), (75, 6), (3, 6)]:
        steps = [look_steps(length, every, index) for index in range(every)]
        assert all(taken[0] == 0 and taken[-1] <= length for taken in steps)
        assert set(np.concatenate(steps)) == set(range(length + 1))


def test_another_control_mode_is_converted_and_succeeds(pushcube_demos, tmp_path):
    output = tmp_path / "shard-000" / "manifest.json"
    settings = Settings(
        task="PushCube-v1", cameras=["base_camera"], render_every=60, control_mode="pd_ee_delta_pose", image_size=32
    )
    replay(settings, pushcube_demos, output)
    facts = read_manifest(output)["facts"]
    assert facts["demonstrations"] + len(facts["lost_in_conversion"]) == 3
    assert facts["demonstrations"] >= 2
    demonstrations, _ = read_demonstrations(output.parent / "trajectory.h5", "PushCube-v1")
    assert all(demonstration.actions.shape[1] == 7 and demonstration.success[-1] for demonstration in demonstrations)
    # What was written is what happens: the new actions, executed, end in success.
    environment = make_environment("PushCube-v1", control_mode="pd_ee_delta_pose", max_episode_steps=400)
    environment.reset(seed=demonstrations[0].seed)
    for action in demonstrations[0].actions:
        information = environment.step(action)[4]
    assert bool(information["success"])


def test_demonstrations_in_another_mode_cannot_be_converted_back(pushcube_demos, tmp_path):
    converted = tmp_path / "converted" / "manifest.json"
    settings = {"task": "PushCube-v1", "cameras": ["base_camera"], "render_every": 100, "image_size": 32}
    replay(Settings(control_mode="pd_joint_delta_pos", **settings), pushcube_demos, converted)
    with pytest.raises(UserError, match="pd_joint_delta_pos"):
        replay(Settings(control_mode="pd_joint_pos", **settings), converted, tmp_path / "back" / "manifest.json")
