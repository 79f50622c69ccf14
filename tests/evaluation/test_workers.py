"""Episodes in real envs: the same whoever runs them, and processes that end when they should."""

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import time

import gymnasium
import numpy as np
import pytest
from conftest import find_task

from demo2eval.data.trajectory import read_trajectory_file
from demo2eval.evaluation import workers
from demo2eval.evaluation.workers import (
    FRAME_SIZE,
    EpisodeSettings,
    make_rollout_env,
    run_episode,
    run_episodes,
)

pytestmark = pytest.mark.simulator

TASK = find_task("PushCube-v1")
SETTINGS = EpisodeSettings(
    task="PushCube-v1",
    robot=TASK.robot,
    control_mode="pd_joint_pos",
    cameras=("base_camera",),
    image_size=64,
    state=("qpos", "tcp_pose"),
    object=TASK.object,
    milestones=TASK.milestones,
    max_episode_steps=84,
    replan_steps=20,
)


class DemoPolicy:
    """Gives the actions of the demonstration with the episode's seed; keeps the observations.

    Cubes are pushed, so that contacts are part of what is compared.
    """

    def __init__(self, demos):
        self.actions = {demo.seed: demo.actions for demo in demos}
        self.observations = {}

    def __call__(self, calls):
        return [self.infer(call) for call in calls]

    def infer(self, call):
        self.observations[call.seed, call.index] = call.observation
        steps = np.arange(SETTINGS.replan_steps) + call.index * SETTINGS.replan_steps
        actions = self.actions[call.seed]
        return actions[np.minimum(steps, len(actions) - 1)]


@pytest.fixture(scope="module")
def demos(pushcube_demos) -> list:
    return read_trajectory_file(pushcube_demos.parent / "trajectory.h5").demos


def run_all(env, demos):
    """Run the demonstrations' episodes in this process; return results and observations."""
    policy = DemoPolicy(demos)
    results = {seed: run_episode(env, SETTINGS, seed, policy) for seed in policy.actions}
    return results, policy.observations


@pytest.fixture(scope="module")
def env():
    return make_rollout_env(dataclasses.replace(SETTINGS, record_frames=True))


@pytest.fixture(scope="module")
def episodes(env, demos):
    return run_all(env, demos)


def test_demonstrations_succeed_when_their_actions_are_executed(episodes, demos):
    results, observations = episodes
    for demo in demos:
        result = results[demo.seed]
        assert result.success_once
        assert result.success_at_end
        assert result.first_success_step == np.argmax(demo.success) + 1
        assert (result.steps, result.policy_calls) == (84, 5)
        assert result.milestone == "place"
    assert {index for _, index in observations} == {0, 1, 2, 3, 4}
    assert observations[demos[0].seed, 0]["state"].shape == (16,)


class LosesSuccess(gymnasium.Wrapper):
    """Says that the task is solved after steps 30 to 39 alone."""

    def reset(self, **kwargs):
        self.steps = 0
        return self.env.reset(**kwargs)

    def step(self, action):
        self.steps += 1
        *rest, info = self.env.step(action)
        return *rest, info | {"success": np.array([30 <= self.steps < 40])}


def test_success_that_is_lost_again_is_not_success_at_end(env, demos):
    result = run_episode(LosesSuccess(env), SETTINGS, demos[0].seed, DemoPolicy(demos))
    assert result.success_once
    assert not result.success_at_end
    assert result.first_success_step == 30


def test_an_episode_does_not_depend_on_what_ran_before(episodes, env, demos):
    results, observations = episodes
    results_again, observations_again = run_all(env, [*reversed(demos)])
    assert results_again == results
    assert observations_again.keys() == observations.keys()
    for key, observation in observations.items():
        again = observations_again[key]
        np.testing.assert_array_equal(again["state"], observation["state"])
        np.testing.assert_array_equal(
            again["images"]["base_camera"], observation["images"]["base_camera"]
        )


def test_frames_are_of_the_same_episode(episodes, env, demos):
    seed, (results, observations) = demos[0].seed, episodes
    policy = DemoPolicy(demos)
    recorded = run_episode(env, dataclasses.replace(SETTINGS, record_frames=True), seed, policy)
    plain = dataclasses.replace(recorded, frames=None, success_so_far=None)
    assert plain == results[seed]
    for key, observation in policy.observations.items():
        np.testing.assert_array_equal(
            observation["images"]["base_camera"], observations[key]["images"]["base_camera"]
        )
    assert recorded.frames.shape == (85, FRAME_SIZE, FRAME_SIZE, 3)
    assert np.abs(recorded.frames[0].astype(float) - recorded.frames[-1]).max() > 100
    assert np.argmax(recorded.success_so_far) == recorded.first_success_step
    assert recorded.success_so_far[-1]


def test_a_process_that_cannot_start_says_why(demos):
    settings = dataclasses.replace(SETTINGS, control_mode="pd_nothing")
    with pytest.raises(
        RuntimeError, match=r"(?s)simulator process 0 failed while it started.*pd_nothing"
    ):
        list(run_episodes(settings, [0], 1, lambda: DemoPolicy(demos)))
    assert not multiprocessing.active_children()


def test_a_process_that_hangs_is_replaced(episodes, demos, monkeypatch):
    policy, replace, stopped = DemoPolicy(demos), workers.Worker.replace, []

    def replace_patiently(self, settings):
        monkeypatch.setattr(workers, "SILENCE_S", 600.0)
        return replace(self, settings)

    def infer(calls):
        if not stopped and calls[0].index == 2:
            (process,) = multiprocessing.active_children()
            os.kill(process.pid, signal.SIGSTOP)
            stopped.append(process.pid)
            monkeypatch.setattr(workers, "SILENCE_S", 1.0)
        return policy(calls)

    monkeypatch.setattr(workers.Worker, "replace", replace_patiently)
    results = list(run_episodes(SETTINGS, [demos[0].seed], 1, lambda: infer))
    assert results == [episodes[0][demos[0].seed]]
    assert not is_running(stopped[0])


KILLED_PARENT = """
import multiprocessing, time
from test_workers import SETTINGS, run_episodes

def load_policy():
    return wait_for_the_kill

def wait_for_the_kill(calls):
    print(multiprocessing.active_children()[0].pid, flush=True)
    time.sleep(600)

if __name__ == "__main__":
    list(run_episodes(SETTINGS, [0], 1, load_policy))
"""


def test_a_process_ends_with_its_parent(tmp_path):
    (tmp_path / "parent.py").write_text(KILLED_PARENT)
    path = os.pathsep.join([os.path.dirname(__file__), *sys.path])
    with subprocess.Popen(
        [sys.executable, tmp_path / "parent.py"],
        env=os.environ | {"PYTHONPATH": path},
        stdout=subprocess.PIPE,
        text=True,
    ) as parent:
        pid = int(parent.stdout.readline())
        assert is_running(pid)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 30
    while is_running(pid):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False
