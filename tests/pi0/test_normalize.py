"""Norm stats in their file. The numbers themselves are compared in test_openpi_parity.py."""

import numpy as np
import pytest

from demo2eval.errors import UserError
from demo2eval.pi0.normalize import exact_stats, load_norm_stats, save_norm_stats


def test_norm_stats_file(tmp_path):
    values = np.random.default_rng(0).normal(size=(100, 3))
    file = tmp_path / "norm_stats.json"
    save_norm_stats(file, {"state": exact_stats(values), "actions": exact_stats(values)})
    loaded = load_norm_stats(file)
    np.testing.assert_array_equal(loaded["state"].q99, exact_stats(values).q99)


def test_a_missing_and_another_file_are_a_sentence(tmp_path):
    file = tmp_path / "norm_stats.json"
    with pytest.raises(
        UserError, match=f"^{file} does not exist; a checkpoint keeps it in assets/<asset id>/"
    ):
        load_norm_stats(file)
    for content in ("", "[]", "{}", '{"norm_stats": {"state": {"mean": [0]}}}'):
        file.write_text(content)
        with pytest.raises(
            UserError, match=rf"^{file} is not a norm_stats.json \(.*\); make the norm stats again."
        ):
            load_norm_stats(file)
