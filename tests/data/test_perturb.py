"""Joint perturbation: where the arm may be displaced, and what moves with it."""

import numpy as np
import pytest
from conftest import find_task

from demo2eval.data.perturb import NEAR, RISEN, JointPerturbation, gripper_phases
from demo2eval.data.replay import nest_state
from demo2eval.data.trajectory import Demo, read_trajectory_file
from demo2eval.maniskill.env import make_env


def gripper(*commands) -> np.ndarray:
    """Return actions of which only the gripper's command matters, from (command, times) pairs."""
    last = np.concatenate([np.full(times, command) for command, times in commands])
    return np.stack([np.zeros_like(last), last], axis=1)


def test_the_scale_is_0_where_the_command_changes_and_1_away_from_it():
    scale, closed = gripper_phases(gripper((1.0, 30), (-1.0, 40), (1.0, 5)))
    assert len(scale) == len(closed) == 76
    assert scale[30] == scale[70] == 0.0
    assert scale[29] == scale[31] == scale[69] == 1 / NEAR
    assert scale[75] == 5 / NEAR
    assert (scale[:21] == 1).all()
    assert (scale[40:61] == 1).all()
    # At state 30 the closing is about to be commanded, at 70 the opening.
    assert np.flatnonzero(closed).tolist() == list(range(31, 71))


@pytest.mark.parametrize("command", [-1.0, 1.0])
def test_a_gripper_that_does_not_change_holds_nothing(command):
    scale, closed = gripper_phases(gripper((command, 20)))
    assert (scale == 1).all()
    assert not closed.any()


@pytest.fixture(scope="module")
def stack(stackcube_demos):
    """An env of StackCube and the first of the planned demos."""
    demo = read_trajectory_file(stackcube_demos.parent / "trajectory.h5").demos[0]
    robot = find_task("StackCube-v1").robot
    env = make_env("StackCube-v1", robot=robot, control_mode="pd_joint_pos")
    env.reset(seed=demo.seed)
    env.unwrapped.set_state_dict(nest_state(demo.states, 0))
    return env, demo


def displace(stack, step: int, std: float) -> list[np.ndarray]:
    """Return how far joints [9], hand [3] and cube [3] are from where they are undisturbed."""
    env, demo = stack
    base = env.unwrapped
    base.set_state_dict(nest_state(demo.states, 0))
    perturbation = JointPerturbation(env, demo, std, find_task("StackCube-v1").object)

    def read_positions():
        # A copy: these are views of what the simulator changes.
        values = (base.agent.robot.get_qpos()[0], base.agent.tcp.pose.p[0], base.cubeA.pose.p[0])
        return [np.asarray(value).astype(np.float64) for value in values]

    base.set_state_dict(nest_state(demo.states, step))
    before = read_positions()
    perturbation.apply(step)
    return [after - old for after, old in zip(read_positions(), before, strict=True)]


def find_phases(demo: Demo) -> tuple[int, int, int]:
    """Return a step of the approach, one of the closed hand on the lying cube, one of the lift."""
    closed = int(np.argmax(demo.actions[:, -1] < 0))
    height = demo.states["actors/cubeA"][:, 2]
    carried = int(np.argmax(height > height[0] + 0.08))
    lying = closed + 4
    assert height[lying] < height[0] + RISEN
    return closed - 2 * NEAR, lying, carried


def test_before_the_grasp_the_arm_is_displaced_and_the_cube_is_not(stack):
    approach, _, _ = find_phases(stack[1])
    joints, hand, cube = displace(stack, approach, 0.03)
    assert (joints[:7] != 0).all()
    assert np.abs(joints[:7]).max() < 5 * 0.03
    np.testing.assert_array_equal(joints[7:], 0)
    assert np.linalg.norm(hand) > 0.002
    np.testing.assert_array_equal(cube, 0)


def test_a_closed_hand_stays_until_the_cube_is_lifted(stack):
    _, lying, _ = find_phases(stack[1])
    for change in displace(stack, lying, 0.03):
        np.testing.assert_array_equal(change, 0)


def test_what_is_carried_moves_with_the_hand(stack):
    env, demo = stack
    _, _, carried = find_phases(demo)
    base = env.unwrapped

    def read_grip():
        pose = base.agent.tcp.pose.inv() * base.cubeA.pose
        return np.concatenate([np.asarray(pose.p[0]), np.asarray(pose.q[0])])

    base.set_state_dict(nest_state(demo.states, carried))
    before = read_grip()
    _, hand, cube = displace(stack, carried, 0.03)
    assert np.linalg.norm(hand) > 0.002
    assert np.linalg.norm(cube) > 0.002
    np.testing.assert_allclose(read_grip(), before, atol=1e-5)


def test_the_perturbation_follows_from_seed_and_step_and_has_the_given_std(stack):
    approach, _, _ = find_phases(stack[1])
    once, again = (displace(stack, approach, 0.03)[0] for _ in range(2))
    np.testing.assert_array_equal(once, again)
    np.testing.assert_allclose(displace(stack, approach, 0.015)[0][:7], once[:7] / 2, atol=1e-6)
    steps = np.concatenate([displace(stack, step, 0.03)[0][:7] for step in range(approach)])
    assert 0.8 * 0.03 < steps.std() < 1.2 * 0.03
    assert abs(steps.mean()) < 4 * 0.03 / np.sqrt(len(steps))
