"""The env: ManiSkill's own observations, steps that render nothing, and what renders."""

import gymnasium
import numpy as np
import pytest
from conftest import find_task

from demo2eval.errors import UserError
from demo2eval.maniskill import env as env_module
from demo2eval.maniskill.env import get_observation, get_state, make_env, render_backend

pytestmark = pytest.mark.simulator


def test_an_observation_is_maniskills_own_and_a_step_renders_nothing(monkeypatch):
    """PickCube's goal is hidden from the cameras, and in the state."""
    robot = find_task("PickCube-v1").robot
    options = {"control_mode": "pd_joint_pos", "max_episode_steps": 9}
    ours = make_env("PickCube-v1", robot=robot, cameras=["base_camera"], image_size=48, **options)
    theirs = gymnasium.make(
        "PickCube-v1",
        obs_mode="rgb",
        sim_backend="physx_cpu",
        render_backend=render_backend(),
        sensor_configs={"width": 48, "height": 48},
        robot_uids=robot,
        **options,
    )

    def refuse() -> None:
        raise AssertionError("a step renders")

    for env in (ours, theirs):
        env.reset(seed=5, options={"reconfigure": True})
    action = np.array([0, 0.5, 0, -1.8, 0, 2.3, 0.8, 1], np.float32)
    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(ours.unwrapped, "capture_sensor_data", refuse)
            assert ours.step(action)[0] == {}
            state = get_state(ours)
        expected = theirs.step(action)[0]
        observation = get_observation(ours)
        rgb = expected["sensor_data"]["base_camera"]["rgb"][0].numpy()
        assert rgb.std() > 10
        np.testing.assert_array_equal(observation["images"]["base_camera"], rgb)
        assert list(state) == ["qpos", "tcp_pose", "goal_pos"]
        for name, value in state.items():
            group = expected["agent" if name == "qpos" else "extra"]
            assert value.dtype == np.float32
            np.testing.assert_array_equal(value, group[name][0].numpy())
            np.testing.assert_array_equal(value, observation["state"][name])
    ours.close()
    theirs.close()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"task": "PushCubes-v1"}, r"ManiSkill has no task 'PushCubes-v1'"),
        ({"cameras": ["hand_camera"]}, r"no camera 'hand_camera'; it has base_camera"),
    ],
)
def test_an_unknown_task_or_camera_is_a_sentence(changes, sentence):
    known = {"task": "PushCube-v1", "robot": "panda", "control_mode": "pd_joint_pos"}
    with pytest.raises(UserError, match=sentence):
        make_env(**known | changes)


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that gives this machine a GPU's device file or none, and a driver's program."""
    monkeypatch.delenv(env_module.BACKEND_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    render_backend.cache_clear()

    def make(device: bool, driver: str) -> None:
        if device:
            (tmp_path / "nvidia0").touch()
        monkeypatch.setattr(env_module, "GPU_DEVICES", (str(tmp_path / "nvidia[0-9]*"),))
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho called >> {tmp_path}/called\n{driver}\n")
        program.chmod(0o755)

    yield make
    render_backend.cache_clear()


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        ("echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'", "gpu"),
        ("echo 'No devices found.'", "cpu"),
        ("echo 'NVIDIA-SMI has failed because it could not reach the driver.'; exit 9", "cpu"),
        ("exit 127", "cpu"),
    ],
)
def test_a_driver_is_called_once_and_has_to_answer(machine, tmp_path, driver, expected):
    machine(device=True, driver=driver)
    assert [render_backend(), render_backend()] == [expected, expected]
    assert (tmp_path / "called").read_text() == "called\n"


def test_without_a_device_no_driver_is_called(machine, tmp_path):
    machine(device=False, driver="echo 'GPU 0: NVIDIA H100'")
    assert render_backend() == "cpu"
    assert not (tmp_path / "called").exists()


@pytest.mark.parametrize("backend", ["cpu", "gpu"])
def test_the_user_decides(machine, tmp_path, monkeypatch, backend):
    machine(device=True, driver="echo 'GPU 0: NVIDIA H100'")
    monkeypatch.setenv(env_module.BACKEND_VARIABLE, backend)
    assert render_backend() == backend
    assert not (tmp_path / "called").exists()


def test_what_is_no_backend_is_a_sentence(machine, monkeypatch):
    machine(device=True, driver="exit 1")
    monkeypatch.setenv(env_module.BACKEND_VARIABLE, "cuda")
    with pytest.raises(UserError, match="DEMO2EVAL_RENDER_BACKEND is 'cuda'; set it to cpu or gpu"):
        render_backend()
