"""Stages by the simulator's own state: demonstrations pass them all, an idle arm none, in every task."""

import numpy as np
import pytest

from demo2eval.data.replay import begin
from demo2eval.data.trajectory import read_demonstrations
from demo2eval.maniskill.env import make_environment
from demo2eval.maniskill.milestones import NOTHING, Progress
from demo2eval.maniskill.tasks import TASKS


def passed(task: str, demonstration) -> list[str]:
    """Play a demonstration back and return the furthest stage after each step, without repetitions."""
    environment = make_environment(task, control_mode=demonstration.control_mode)
    begin(environment, demonstration)
    progress = Progress(environment)
    seen = [progress.furthest]
    for action in demonstration.actions:
        progress.see(environment.step(action)[4])
        seen.append(progress.furthest)
    environment.close()
    return [stage for index, stage in enumerate(seen) if index == 0 or stage != seen[index - 1]]


@pytest.mark.parametrize("task", ["PushCube-v1", "StackCube-v1"])
def test_a_demonstration_passes_every_stage_in_order(task, pushcube_demos, stackcube_demos):
    manifest = {"PushCube-v1": pushcube_demos, "StackCube-v1": stackcube_demos}[task]
    demonstration = read_demonstrations(manifest.parent / "trajectory.h5", task)[0][0]
    assert passed(task, demonstration) == [NOTHING, *TASKS[task].stages]


@pytest.mark.parametrize("task", TASKS)
def test_an_arm_that_stays_where_it_is_comes_to_nothing(task):
    environment = make_environment(task, control_mode="pd_joint_pos")
    environment.reset(seed=0)
    rest = np.asarray(environment.unwrapped.agent.robot.get_qpos()[0])
    progress = Progress(environment)
    for _ in range(3):
        progress.see(environment.step(np.append(rest[:7], 1.0).astype(np.float32))[4])
    environment.close()
    assert progress.furthest == NOTHING
    assert TASKS[task].reach < progress.nearest < 1
