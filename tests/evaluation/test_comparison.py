"""Runs compared on the same seeds."""

from pathlib import Path

import pandas as pd
import pytest
from test_success_table import FAILED, SOLVED, write_rollouts

from demo2eval.errors import UserError
from demo2eval.evaluation.comparison import compare_runs
from demo2eval.evaluation.regression import check_regression


@pytest.fixture
def compare(tmp_path):
    """A function that compares rollouts and returns the table."""

    def make(rollouts: list[Path]) -> pd.DataFrame:
        compare_runs(rollouts, table=tmp_path / "table.csv", figure=tmp_path / "figure.png")
        assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")
        return pd.read_csv(tmp_path / "table.csv")

    return make


def test_last_checkpoints_are_paired_with_each_other_and_with_their_own_earlier_ones(
    compare, tmp_path, capsys
):
    rollouts = [
        write_rollouts(tmp_path / "old", 100, [FAILED, SOLVED, FAILED, FAILED]),
        write_rollouts(tmp_path / "old", 0, [FAILED, FAILED, FAILED, FAILED]),
        write_rollouts(tmp_path / "new", 50, [SOLVED, FAILED, SOLVED, FAILED]),
    ]
    table = compare(rollouts)
    names = ["run", "step", "other_run", "other_step"]
    assert table[names].values.tolist() == [["old", 100, "new", 50], ["old", 100, "old", 0]]
    assert table[["n11", "n10", "n01", "n00"]].values.tolist() == [[0, 1, 2, 1], [0, 1, 0, 3]]
    assert table.difference.tolist() == [-0.25, 0.25]
    # Two places against the first seed's: one more and two fewer came to the last milestone.
    assert table[["further_10", "further_01"]].values[0].tolist() == [1, 2]
    assert "old 100 against new 50: -25 points" in capsys.readouterr().out


def test_other_settings_and_other_tasks_are_not_compared(compare, tmp_path):
    one = write_rollouts(tmp_path / "one", 10, [SOLVED] * 4)
    longer = write_rollouts(tmp_path / "longer", 10, [SOLVED] * 4, max_episode_steps=60)
    with pytest.raises(UserError, match="under different settings"):
        compare([one, longer])
    with pytest.raises(UserError, match="no two of them"):
        compare([one])


def test_a_regression_fails_only_where_it_is_beyond_chance(tmp_path):
    good = write_rollouts(tmp_path / "good", 10, [SOLVED] * 40)
    worse = write_rollouts(tmp_path / "worse", 10, [SOLVED] * 30 + [FAILED] * 10)
    similar = write_rollouts(tmp_path / "similar", 10, [SOLVED] * 39 + [FAILED])
    check_regression(similar, good)
    check_regression(good, worse)
    with pytest.raises(UserError, match="does worse than"):
        check_regression(worse, good)
    check_regression(worse, good, margin=0.2)
