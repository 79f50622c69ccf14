"""The metrics of all segments are one table and one picture."""

import pandas as pd
import pytest

from demo2eval.errors import UserError
from demo2eval.training.loss_curve import make_loss_curve
from demo2eval.training.trainer import COLUMNS, Metrics


def write_segment(path, steps) -> str:
    """Write metrics of steps as training does; return the rows as text."""
    metrics = Metrics(path, steps[0] - 1)
    metrics.write([dict.fromkeys(COLUMNS, 0.1 + 0.2) | {"step": step} for step in steps])
    metrics.close()
    return path.read_text()


def join(tmp_path, *segments):
    """Write segments and make their table and curve."""
    paths = [tmp_path / f"{steps[-1]}.csv" for steps in segments]
    texts = [write_segment(path, steps) for path, steps in zip(paths, segments, strict=True)]
    table, curve = tmp_path / "metrics.csv", tmp_path / "loss.png"
    make_loss_curve("run", paths, table=table, curve=curve)
    return texts, table, curve


def test_segments_are_joined_as_they_were_written(tmp_path):
    texts, table, curve = join(tmp_path, range(1, 4), range(4, 7))
    assert table.read_text() == texts[0] + texts[1].split("\n", 1)[1]
    assert pd.read_csv(table).step.tolist() == [1, 2, 3, 4, 5, 6]
    assert curve.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("second", [range(5, 8), range(3, 7)], ids=["missing", "twice"])
def test_steps_that_are_missing_or_come_twice_are_refused(tmp_path, second):
    with pytest.raises(UserError, match=f"do not go on from step to step at {second[0]}"):
        join(tmp_path, range(1, 4), second)


def test_a_kill_before_the_first_new_row_loses_none(tmp_path):
    path = tmp_path / "metrics.csv"
    text = write_segment(path, range(1, 8))
    Metrics(path, 5)  # killed: never written to, never closed
    assert path.read_text() == "".join(text.splitlines(keepends=True)[:6])


def test_a_row_that_a_kill_cut_short_is_dropped(tmp_path):
    path = tmp_path / "metrics.csv"
    text = write_segment(path, range(1, 11))
    path.write_text(text + "1")  # of "11,..."
    Metrics(path, 10).close()
    assert path.read_text() == text
