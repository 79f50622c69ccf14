"""Manifests: finished work is reused, half-done work never is."""

import contextlib
import errno
import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest

from demo2eval.config import Training
from demo2eval.errors import UserError
from demo2eval.provenance import input_digest, read_manifest, run_stage

MODULE = "demo2eval.checkpoints.policy_metadata"


def make(output, settings=None, inputs=None, text="content"):
    """Run a stage that writes one file; return whether it had to."""
    with run_stage(
        output, stage="test", module=MODULE, settings=settings or {"a": 1}, inputs=inputs
    ) as job:
        if job.reused:
            return False
        (job.partial / "output.txt").write_text(text)
        job.finish(job.publish("output.txt"), count=1)
    return True


def test_a_manifest_says_what_made_the_outputs(tmp_path):
    source = tmp_path / "source.txt"
    source.write_text("source")
    output = tmp_path / "out" / "manifest.json"
    assert make(output, inputs={"source": source})
    manifest = read_manifest(output)
    assert manifest["settings"] == {"a": 1}
    assert manifest["inputs"]["source"] == [{"path": str(source), "digest": input_digest(source)}]
    assert manifest["outputs"]["output.txt"]["bytes"] == len("content")
    assert manifest["metadata"] == {"count": 1}
    assert "python" in manifest["versions"]


def test_equal_work_is_reused_when_its_manifest_was_removed(tmp_path):
    output = tmp_path / "manifest.json"
    make(output)
    before = output.read_text()
    output.unlink()
    assert not make(output)
    assert output.read_text() == before


@pytest.mark.parametrize("damage", ["settings", "input", "content"])
def test_other_work_is_not_reused(tmp_path, damage):
    source, output = tmp_path / "source.txt", tmp_path / "out" / "manifest.json"
    source.write_text("source")
    make(output, inputs={"source": source})
    if damage == "input":
        source.write_text("changed")
    if damage == "content":
        (output.parent / "output.txt").write_text("CONTENT")
    assert make(output, settings={"a": 2 if damage == "settings" else 1}, inputs={"source": source})


def test_the_digest_is_of_the_content_alone(tmp_path):
    for name, settings in (("one", {"a": 1}), ("two", {"a": 2})):
        make(tmp_path / name / "manifest.json", settings)
    make(tmp_path / "three" / "manifest.json", text="other")
    one, two, three = (
        input_digest(tmp_path / name / "manifest.json") for name in ("one", "two", "three")
    )
    assert one == two
    assert one != three


def test_partial_files_survive_until_other_work_is_published(tmp_path):
    output = tmp_path / "manifest.json"
    with run_stage(output, stage="test", module=MODULE, settings={"a": 1}) as job:
        (job.partial / "half").write_text("half")
    with run_stage(output, stage="test", module=MODULE, settings={"a": 2}) as job:
        assert list(job.partial.iterdir()) == []
    with run_stage(output, stage="test", module=MODULE, settings={"a": 1}) as job:
        assert (job.partial / "half").read_text() == "half"
    assert make(output, {"a": 2})
    assert not list(tmp_path.glob(".manifest.partial-*"))


def test_a_mistaken_job_that_is_killed_loses_no_finished_work(tmp_path):
    output = tmp_path / "manifest.json"
    make(output, {"a": 1})
    output.unlink()  # Snakemake does so before it starts the mistaken job
    with (
        contextlib.suppress(KeyboardInterrupt),
        run_stage(output, stage="test", module=MODULE, settings={"a": 2}) as job,
    ):
        (job.partial / "output.txt").write_text("half")
        raise KeyboardInterrupt
    assert not make(output, {"a": 1})
    assert (tmp_path / "output.txt").read_text() == "content"


def test_the_manifest_of_other_work_is_gone_before_its_outputs_are_replaced(tmp_path):
    output = tmp_path / "manifest.json"
    make(output, {"a": 1})
    with (
        contextlib.suppress(KeyboardInterrupt),
        run_stage(output, stage="test", module=MODULE, settings={"a": 2}) as job,
    ):
        (job.partial / "output.txt").write_text("CONTENT")
        job.publish("output.txt")
        raise KeyboardInterrupt
    assert not list(output.parent.glob(".manifest.done*"))
    assert not output.exists()
    # The new output is as long as the old one, and still nobody takes it for that.
    assert make(output, {"a": 1})
    assert (tmp_path / "output.txt").read_text() == "content"


def _killed(output):
    with run_stage(output, stage="test", module=MODULE, settings={"a": 2}) as job:
        (job.partial / "output.txt").write_text("CONTENT")
        job.publish("output.txt")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_while_other_work_is_replaced_leaves_no_manifest(tmp_path):
    output = tmp_path / "manifest.json"
    make(output, {"a": 1})
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(output,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "output.txt").read_text() == "CONTENT"
    assert not output.exists()
    assert make(output, {"a": 1})
    assert (tmp_path / "output.txt").read_text() == "content"


def _slow(output, started):
    with run_stage(output, stage="test", module=MODULE, settings={"a": 1}) as job:
        started.set()
        time.sleep(1.0)
        (job.partial / "output.txt").write_text("content")
        job.finish(job.publish("output.txt"))


def test_a_duplicate_waits_and_reuses(tmp_path):
    output = tmp_path / "manifest.json"
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=_slow, args=(output, started))
    process.start()
    assert started.wait(60)
    assert not make(output)
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)),
        ValueError("RESOURCE_EXHAUSTED: Error writing an array: No space left on device"),
        OSError("1648 requested and 992 written"),
    ],
    ids=["Python", "TensorStore", "numpy"],
)
def test_a_full_disk_is_a_sentence_whatever_a_library_says(tmp_path, error):
    """The three ways in which it was seen."""
    output = tmp_path / "manifest.json"
    with (
        pytest.raises(UserError, match=r"the disk is full .*the same command again"),
        run_stage(output, stage="test", module=MODULE, settings={"a": 1}),
    ):
        raise error


def test_files_that_were_changed_are_not_reused_nor_read(tmp_path):
    """They are as long as they were."""
    source = tmp_path / "in" / "manifest.json"
    make(source)
    (source.parent / "output.txt").write_text("CONTENT")
    with pytest.raises(UserError, match=r"output.txt is not what .*in/manifest.json describes"):
        make(tmp_path / "out" / "manifest.json", inputs={"source": source})
    source.unlink()
    assert make(source)
    assert make(tmp_path / "out" / "manifest.json", inputs={"source": source})


@pytest.mark.parametrize("content", [None, "{", json.dumps({"no": "digest"})])
def test_a_missing_or_broken_manifest_is_a_sentence(tmp_path, content):
    path = tmp_path / "manifest.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=str(path)):
        read_manifest(path)


@pytest.mark.parametrize("damage", [Path.unlink, lambda path: path.write_text("step,lost\n")])
def test_a_kept_output_that_was_deleted_or_damaged_comes_back(tmp_path, damage):
    output, table = tmp_path / "0.json", tmp_path / "0" / "metrics.csv"

    def work() -> bool:
        with run_stage(output, stage="test", module=MODULE, settings={"a": 1}) as job:
            if not job.reused:
                (job.partial / "0").mkdir()
                (job.partial / "0/metrics.csv").write_text("step,loss\n")
                job.finish(job.publish("0"), kept=[table])
            return job.reused

    assert not work()
    output.unlink()
    damage(table)
    assert work()
    assert table.read_text() == "step,loss\n"


def test_settings_that_only_schedule_are_not_among_those_that_count(tmp_path):
    def work(training: Training) -> bool:
        output, settings = tmp_path / "manifest.json", {"training": training}
        with run_stage(output, stage="test", module=MODULE, settings=settings) as job:
            if not job.reused:
                job.finish([])
            return job.reused

    assert not work(Training())
    assert work(Training(num_train_steps=60_000, save_interval=500))
    assert not work(Training(batch_size=64))
    recorded = read_manifest(tmp_path / "manifest.json")["settings"]["training"]
    assert recorded["batch_size"] == 64
    assert "num_train_steps" not in recorded
