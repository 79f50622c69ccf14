"""Manifests: finished work is adopted, half-done work never is."""

import contextlib
import json
import multiprocessing
import os
import signal
import time

import pytest

from demo2eval.errors import UserError
from demo2eval.provenance import input_digest, run_stage, read_manifest

MODULE = "demo2eval.checkpoints.policy_metadata"


def make(output, settings=None, inputs=None, text="payload"):
    """Run a stage that writes one file; return whether it had to."""
    with run_stage(
        output, stage="test", module=MODULE, settings=settings or {"a": 1}, inputs=inputs
    ) as job:
        if job.reused:
            return False
        (job.folder / "payload.txt").write_text(text)
        job.finish([job.folder / "payload.txt"], count=1)
    return True


def test_a_manifest_tells_what_made_the_payload(tmp_path):
    source = tmp_path / "source.txt"
    source.write_text("source")
    output = tmp_path / "out" / "manifest.json"
    assert make(output, inputs={"source": source})
    manifest = read_manifest(output)
    assert manifest["settings"] == {"a": 1}
    assert manifest["inputs"]["source"] == [{"path": str(source), "digest": input_digest(source)}]
    assert manifest["outputs"]["payload.txt"]["bytes"] == len("payload")
    assert manifest["metadata"] == {"count": 1}
    assert "python" in manifest["versions"]


def test_equal_work_is_adopted_when_its_manifest_was_removed(tmp_path):
    output = tmp_path / "manifest.json"
    make(output)
    before = output.read_text()
    output.unlink()
    assert not make(output)
    assert output.read_text() == before


@pytest.mark.parametrize("damage", ["settings", "input", "payload"])
def test_other_work_is_not_adopted(tmp_path, damage):
    source, output = tmp_path / "source.txt", tmp_path / "out" / "manifest.json"
    source.write_text("source")
    make(output, inputs={"source": source})
    if damage == "input":
        source.write_text("changed")
    if damage == "payload":
        (output.parent / "payload.txt").write_text("cut")
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


def test_partial_files_survive_and_those_of_other_settings_are_removed(tmp_path):
    output = tmp_path / "manifest.json"
    with run_stage(output, stage="test", module=MODULE, settings={"a": 1}) as job:
        (job.partial / "half").write_text("half")
    with run_stage(output, stage="test", module=MODULE, settings={"a": 1}) as job:
        assert (job.partial / "half").read_text() == "half"
    with run_stage(output, stage="test", module=MODULE, settings={"a": 2}) as job:
        assert list(job.partial.iterdir()) == []
    assert len(list(tmp_path.glob(".manifest.partial-*"))) == 1


def test_the_manifest_of_other_work_is_gone_before_its_payload_is_touched(tmp_path):
    output = tmp_path / "manifest.json"
    make(output, {"a": 1})
    with (
        contextlib.suppress(KeyboardInterrupt),
        run_stage(output, stage="test", module=MODULE, settings={"a": 2}) as work,
    ):
        assert not output.exists()
        assert not work.done_file.exists()
        (job.partial / "payload.txt").write_text("PAYLOAD")
        (job.partial / "payload.txt").replace(job.folder / "payload.txt")
        raise KeyboardInterrupt
    assert not output.exists()
    # The new payload is as long as the old one, and still nobody takes it for that.
    assert make(output, {"a": 1})
    assert (tmp_path / "payload.txt").read_text() == "payload"


def _killed(output):
    with run_stage(output, stage="test", module=MODULE, settings={"a": 2}) as job:
        (job.folder / "payload.txt").write_text("PAYLOAD")
        os.kill(os.getpid(), signal.SIGKILL)


def test_a_kill_while_other_work_is_replaced_leaves_no_manifest(tmp_path):
    output = tmp_path / "manifest.json"
    make(output, {"a": 1})
    process = multiprocessing.get_context("spawn").Process(target=_killed, args=(output,))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "payload.txt").read_text() == "PAYLOAD"
    assert not output.exists()
    assert make(output, {"a": 1})
    assert (tmp_path / "payload.txt").read_text() == "payload"


def test_a_refusal_leaves_other_work_as_it_was(tmp_path):
    output = tmp_path / "manifest.json"
    make(output, {"a": 1})
    before = output.read_bytes(), output.stat().st_mtime_ns
    with pytest.raises(UserError), run_stage(output, stage="test", module=MODULE, settings={"a": 2}):
        raise UserError("these settings are refused.")
    assert (output.read_bytes(), output.stat().st_mtime_ns) == before
    assert not make(output, {"a": 1})


def _slow(output, started):
    with run_stage(output, stage="test", module=MODULE, settings={"a": 1}) as job:
        started.set()
        time.sleep(1.0)
        (job.folder / "payload.txt").write_text("payload")
        job.finish([job.folder / "payload.txt"])


def test_a_duplicate_waits_and_adopts(tmp_path):
    output = tmp_path / "manifest.json"
    context = multiprocessing.get_context("spawn")
    started = context.Event()
    process = context.Process(target=_slow, args=(output, started))
    process.start()
    assert started.wait(60)
    assert not make(output)
    process.join()
    assert process.exitcode == 0


@pytest.mark.parametrize("content", [None, "{", json.dumps({"no": "digest"})])
def test_a_missing_or_broken_manifest_is_a_sentence(tmp_path, content):
    path = tmp_path / "manifest.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(UserError, match=str(path)):
        read_manifest(path)
