"""The state vector and the names of its dimensions."""

import numpy as np

from demo2eval.maniskill.observation import state_names, state_vector


def test_known_parts_have_names_and_others_numbers():
    dims = {"tcp_pose": 7, "goal_pos": 3, "qpos": 9, "speed": 2, "odd_pos": 2}
    names = state_names(["qpos", "tcp_pose", "goal_pos"], dims)
    assert (names[0], names[8], names[9], names[12]) == (
        "panda_joint1",
        "panda_finger_joint2",
        "tcp_x",
        "tcp_qw",
    )
    assert names[-3:] == ["goal_x", "goal_y", "goal_z"]
    assert len(set(names)) == 19
    assert state_names(["odd_pos", "speed"], dims) == [
        "odd_pos_0",
        "odd_pos_1",
        "speed_0",
        "speed_1",
    ]


def test_the_state_vector_has_the_parts_in_the_order_asked_for():
    parts = {"qpos": np.arange(9.0), "goal_pos": np.array([20.0, 21.0, 22.0])}
    state = state_vector(["goal_pos", "qpos"], parts)
    assert state.dtype == np.float32
    assert state.tolist() == [20, 21, 22, *range(9)]
