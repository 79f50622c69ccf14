"""Looks beside the path: where the arm may be displaced, and what moves with it."""

import numpy as np
import pytest

from demo2eval.data.perturb import NEAR, RISEN, Displacement, gripper_phases
from demo2eval.data.replay import nest_state
from demo2eval.data.trajectory import read_demonstrations
from demo2eval.maniskill.env import make_environment


def gripper(*commands) -> np.ndarray:
    """Return actions of which only the gripper's command matters, from (command, times) pairs."""
    last = np.concatenate([np.full(times, command) for command, times in commands])
    return np.stack([np.zeros_like(last), last], axis=1)


def test_there_is_room_away_from_the_grippers_changes_and_none_at_them():
    room, held = gripper_phases(gripper((1.0, 30), (-1.0, 40), (1.0, 5)))
    assert len(room) == len(held) == 76
    assert room[30] == room[70] == 0.0
    assert room[29] == room[31] == room[69] == 1 / NEAR
    assert room[75] == 5 / NEAR
    assert (room[:21] == 1).all()
    assert (room[40:61] == 1).all()
    # At state 30 the closing is about to be said, at 70 the opening.
    assert np.flatnonzero(held).tolist() == list(range(31, 71))


@pytest.mark.parametrize("command", [-1.0, 1.0])
def test_a_gripper_that_does_not_change_holds_nothing(command):
    room, held = gripper_phases(gripper((command, 20)))
    assert (room == 1).all()
    assert not held.any()


@pytest.fixture(scope="module")
def stack(stackcube_demos):
    """An environment of StackCube and the first of the planned demonstrations."""
    demonstrations, _ = read_demonstrations(
        stackcube_demos.parent / "trajectory.h5", "StackCube-v1"
    )
    environment = make_environment("StackCube-v1", control_mode="pd_joint_pos")
    environment.reset(seed=demonstrations[0].seed)
    environment.unwrapped.set_state_dict(nest_state(demonstrations[0].states, 0))
    return environment, demonstrations[0]


def displaced(stack, step: int, noise: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return how far the joints, the hand and the cube are from where they are without displacement: [9], [3], [3]."""
    environment, demonstration = stack
    base = environment.unwrapped
    base.set_state_dict(nest_state(demonstration.states, 0))
    displacement = Displacement(environment, demonstration, noise)

    def where():
        # A copy: these are views of what the simulator changes.
        values = (base.agent.robot.get_qpos()[0], base.agent.tcp.pose.p[0], base.cubeA.pose.p[0])
        return [np.asarray(value).astype(np.float64) for value in values]

    base.set_state_dict(nest_state(demonstration.states, step))
    before = where()
    displacement.at(step)
    return tuple(after - old for after, old in zip(where(), before, strict=True))


def phases(demonstration) -> tuple[int, int, int]:
    """Return a step of the approach, one at which the closed hand has not lifted the cube yet, and one at which it carries it."""
    closed = int(np.argmax(demonstration.actions[:, -1] < 0))
    height = demonstration.states["actors/cubeA"][:, 2]
    carried = int(np.argmax(height > height[0] + 0.08))
    lying = closed + 4
    assert height[lying] < height[0] + RISEN
    return closed - 2 * NEAR, lying, carried


def test_before_the_grasp_the_arm_is_displaced_and_the_cube_is_not(stack):
    approach, _, _ = phases(stack[1])
    joints, hand, cube = displaced(stack, approach, 0.03)
    assert (joints[:7] != 0).all()
    assert np.abs(joints[:7]).max() < 5 * 0.03
    np.testing.assert_array_equal(joints[7:], 0)
    assert np.linalg.norm(hand) > 0.002
    np.testing.assert_array_equal(cube, 0)


def test_a_closed_hand_stays_until_the_cube_is_lifted(stack):
    _, lying, _ = phases(stack[1])
    for change in displaced(stack, lying, 0.03):
        np.testing.assert_array_equal(change, 0)


def test_what_is_carried_moves_with_the_hand(stack):
    environment, demonstration = stack
    _, _, carried = phases(demonstration)
    base = environment.unwrapped

    def held_at():
        pose = base.agent.tcp.pose.inv() * base.cubeA.pose
        return np.concatenate([np.asarray(pose.p[0]), np.asarray(pose.q[0])])

    base.set_state_dict(nest_state(demonstration.states, carried))
    before = held_at()
    _, hand, cube = displaced(stack, carried, 0.03)
    assert np.linalg.norm(hand) > 0.002
    assert np.linalg.norm(cube) > 0.002
    np.testing.assert_allclose(held_at(), before, atol=1e-5)


def test_the_displacement_follows_from_seed_and_step_and_is_of_the_size_asked_for(stack):
    approach, _, _ = phases(stack[1])
    once, again = (displaced(stack, approach, 0.03)[0] for _ in range(2))
    np.testing.assert_array_equal(once, again)
    np.testing.assert_allclose(displaced(stack, approach, 0.015)[0][:7], once[:7] / 2, atol=1e-6)
    steps = np.concatenate([displaced(stack, step, 0.03)[0][:7] for step in range(approach)])
    assert 0.8 * 0.03 < steps.std() < 1.2 * 0.03
    assert abs(steps.mean()) < 4 * 0.03 / np.sqrt(len(steps))
