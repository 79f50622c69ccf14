"""Facts about the robots, against ManiSkill's own robot."""

import numpy as np
import pytest

from demo2eval.maniskill.env import make_env
from demo2eval.robots import (
    ACTION_DIM,
    ACTION_NAMES,
    ARM_JOINTS,
    JOINT_LIMITS,
    JOINTS,
    delta_action_mask,
)

pytestmark = pytest.mark.simulator


def test_differences_are_of_the_arm_and_not_of_the_gripper():
    assert delta_action_mask("pd_joint_pos", True) == [True] * 7 + [False]
    assert delta_action_mask("pd_joint_pos", False) is None


@pytest.mark.parametrize("control_mode", ACTION_DIM)
def test_dims_names_and_limits_are_those_of_maniskill(control_mode):
    env = make_env("PushCube-v1", robot="panda", control_mode=control_mode)
    robot = env.unwrapped.agent.robot
    assert env.action_space.shape == (ACTION_DIM[control_mode],)
    assert len(ACTION_NAMES[control_mode]) == ACTION_DIM[control_mode]
    assert [joint.name for joint in robot.active_joints] == JOINTS
    limits = np.asarray(robot.get_qlimits()[0])[:ARM_JOINTS].T
    np.testing.assert_allclose(JOINT_LIMITS, limits, atol=1e-4)
    env.close()
