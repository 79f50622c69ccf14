"""The metrics of all segments are one table and one figure, and so is their throughput."""

import pandas as pd
import pytest

from demo2eval.errors import UserError
from demo2eval.provenance import run_stage
from demo2eval.training.loss_curve import make_loss_curve
from demo2eval.training.trainer import COLUMNS, Metrics


def write_segment(path, steps) -> str:
    """Write metrics of steps as training does; return the rows as text."""
    metrics = Metrics(path, steps[0] - 1)
    metrics.write([dict.fromkeys(COLUMNS, 0.1 + 0.2) | {"step": step} for step in steps])
    metrics.close()
    return path.read_text()


def join(tmp_path, *segments):
    """Write segments and their manifests, and make their tables and curves."""
    checkpoints = [tmp_path / f"{steps[-1]}.json" for steps in segments]
    texts = []
    for output, steps in zip(checkpoints, segments, strict=True):
        with run_stage(
            output, stage="train", module="demo2eval.training.train", settings={}
        ) as job:
            metrics = output.with_suffix("") / "metrics.csv"
            metrics.parent.mkdir()
            texts.append(write_segment(metrics, steps))
            rate = {"samples_per_s": 2.5, "training_time_s": 60.0}
            job.finish([metrics], step=steps[-1], **rate, device="cpu", num_devices=1)
    outputs = {
        "table": tmp_path / "metrics.csv",
        "curve": tmp_path / "loss.png",
        "throughput_table": tmp_path / "throughput.csv",
        "throughput": tmp_path / "throughput.png",
    }
    make_loss_curve("run", checkpoints, **outputs)
    return texts, outputs


def test_segments_are_joined_as_they_were_written(tmp_path):
    texts, outputs = join(tmp_path, range(1, 4), range(4, 7))
    assert outputs["table"].read_text() == texts[0] + texts[1].split("\n", 1)[1]
    assert pd.read_csv(outputs["table"]).step.tolist() == [1, 2, 3, 4, 5, 6]
    assert pd.read_csv(outputs["throughput_table"]).step.tolist() == [3, 6]
    for name in ("curve", "throughput"):
        assert outputs[name].read_bytes().startswith(b"\x89PNG")


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
