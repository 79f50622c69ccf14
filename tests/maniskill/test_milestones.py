"""Milestones: demonstrations pass them all in order, an idle arm passes none, in every task."""

from itertools import groupby

import numpy as np
import pytest
from conftest import TASKS, find_task

from demo2eval.data.replay import reset_to_start
from demo2eval.data.trajectory import read_trajectory_file
from demo2eval.maniskill.env import make_env
from demo2eval.maniskill.milestones import NOTHING, MilestoneTracker

pytestmark = pytest.mark.simulator


def passed_milestones(task_name: str, demo) -> list[str]:
    """Execute a demonstration; return the furthest milestones, without repetition."""
    task = find_task(task_name)
    env = make_env(task_name, robot=task.robot, control_mode=demo.control_mode)
    reset_to_start(env, demo)
    tracker = MilestoneTracker(env, task.object, task.milestones)
    furthest = [tracker.furthest]
    for action in demo.actions:
        tracker.update(env.step(action)[4])
        furthest.append(tracker.furthest)
    env.close()
    return [name for name, _ in groupby(furthest)]


@pytest.mark.parametrize("task", ["PushCube-v1", "StackCube-v1"])
def test_a_demonstration_passes_every_milestone_in_order(task, pushcube_demos, stackcube_demos):
    manifest = {"PushCube-v1": pushcube_demos, "StackCube-v1": stackcube_demos}[task]
    demo = read_trajectory_file(manifest.parent / "trajectory.h5").demos[0]
    assert passed_milestones(task, demo) == [NOTHING, *find_task(task).milestones.names]


@pytest.mark.parametrize("name", TASKS)
def test_an_arm_that_stays_where_it_is_passes_nothing(name):
    task = find_task(name)
    env = make_env(name, robot=task.robot, control_mode="pd_joint_pos")
    env.reset(seed=0)
    rest = np.asarray(env.unwrapped.agent.robot.get_qpos()[0])
    tracker = MilestoneTracker(env, task.object, task.milestones)
    for _ in range(3):
        tracker.update(env.step(np.append(rest[:7], 1.0).astype(np.float32))[4])
    env.close()
    assert tracker.furthest == NOTHING
    assert task.milestones.reach_distance < tracker.nearest < 1
