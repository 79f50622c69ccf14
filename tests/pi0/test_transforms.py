"""Padding and differences from the state. openpi's own numbers are in test_openpi_parity.py."""

import numpy as np

from demo2eval.pi0.transforms import absolute_actions, delta_actions, pad


def test_padding_is_zeros_behind_the_values():
    np.testing.assert_array_equal(pad(np.ones((2, 3)), 5), [[1, 1, 1, 0, 0]] * 2)
    values = np.ones((2, 3))
    assert pad(values, 3) is values


def test_deltas_are_of_the_masked_dimensions_alone():
    actions, state = np.arange(8.0).reshape(1, 2, 4), np.array([[10.0, 20.0, 30.0]])
    deltas = delta_actions(actions, state, [True, False])
    np.testing.assert_array_equal(deltas, [[[-10, 1, 2, 3], [-6, 5, 6, 7]]])
    np.testing.assert_array_equal(absolute_actions(deltas, state, [True, False]), actions)
