"""Curves in TensorBoard and Weights & Biases go on after a kill."""

import pytest
from tensorboardX.proto.event_pb2 import Event

from demo2eval.errors import UserError
from demo2eval.training.tracker import open_tracker


def read_events(folder) -> list[Event]:
    """Return the events of all files, in the order of their writing."""
    events = []
    for path in sorted(folder.iterdir()):
        content = path.read_bytes()
        while content:
            size = int.from_bytes(content[:8], "little")
            events.append(Event.FromString(content[12 : 12 + size]))
            content = content[16 + size :]
    return events


def test_tensorboard_gets_every_step_and_forgets_those_after_the_last_save(tmp_path):
    for first, last in ((0, 5), (3, 7)):
        tracker = open_tracker("tensorboard", tmp_path, {}, first)
        for step in range(first + 1, last + 1):
            tracker.log(step, {"loss": 1 / step})
        tracker.close()
    steps = {}
    for event in read_events(tmp_path / "tensorboard"):
        if event.HasField("session_log"):  # as TensorBoard reads it
            steps = {step: value for step, value in steps.items() if step < event.step}
        for value in event.summary.value:
            assert value.tag == "loss"
            assert event.step not in steps
            steps[event.step] = value.simple_value
    assert steps == pytest.approx({step: 1 / step for step in range(1, 8)})


def test_wandb_writes_a_run_of_its_own(tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    tracker = open_tracker("wandb", tmp_path / "stackcube", {"batch_size": 4}, 0)
    tracker.log(1, {"loss": 0.5})
    tracker.close()
    (path,) = (tmp_path / "stackcube").rglob("run-*.wandb")
    assert b"loss" in path.read_bytes()


def test_a_tracker_that_is_not_installed_is_a_sentence(tmp_path, monkeypatch):
    monkeypatch.setattr(
        "demo2eval.training.tracker.import_module", lambda name: __import__("no_such_package")
    )
    with pytest.raises(UserError, match="uv sync --inexact --extra wandb"):
        open_tracker("wandb", tmp_path, {}, 0)


def test_without_a_tracker_nothing_is_written(tmp_path):
    open_tracker(None, tmp_path, {}, 0).log(1, {"loss": 1.0})
    assert not list(tmp_path.iterdir())
