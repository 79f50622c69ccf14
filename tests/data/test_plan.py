"""Planning: exactly so many successful demonstrations, the same again from the same seeds, in its own environment."""

import os
import resource
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest

from demo2eval.data.trajectory import read_demonstrations
from demo2eval.provenance import read_manifest

ROOT = Path(__file__).resolve().parents[2]
PLANNING_PYTHON = ROOT / "envs/planning/.venv/bin/python"


def plan(
    output: Path, *options: str, largest_file: int | None = None
) -> subprocess.CompletedProcess:
    command = [str(PLANNING_PYTHON), "-m", "demo2eval.data.plan", *options, "--output", str(output)]
    environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow")}
    limit = (
        None
        if largest_file is None
        else (lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (largest_file,) * 2))
    )
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, preexec_fn=limit
    )


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("plan") / "shard-000" / "manifest.json"
    result = plan(output, "--task", "PushCube-v1", "--count", "3", "--first-seed", "1000000")
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    return output


def test_a_shard_holds_the_demonstrations_that_were_asked_for(planned):
    demonstrations, _ = read_demonstrations(planned.parent / "trajectory.h5", "PushCube-v1")
    facts = read_manifest(planned)["metadata"]
    assert len(demonstrations) == facts["demonstrations"] == 3
    assert facts["seeds"] == [demonstration.seed for demonstration in demonstrations]
    assert facts["attempts"] == 3 + len(facts["failures"])
    assert all(demonstration.success[-1] for demonstration in demonstrations)
    assert {demonstration.control_mode for demonstration in demonstrations} == {"pd_joint_pos"}


def test_the_same_seeds_give_the_demonstrations_of_the_fixture(planned, pushcube_demos):
    with (
        h5py.File(planned.parent / "trajectory.h5") as new,
        h5py.File(pushcube_demos.parent / "trajectory.h5") as kept,
    ):
        for name in kept:
            np.testing.assert_array_equal(new[name]["actions"][()], kept[name]["actions"][()])


@pytest.mark.parametrize("bytes_there", [1_000, 40_000])
def test_a_full_disk_is_one_sentence_and_nothing_is_finished(tmp_path, bytes_there):
    output = tmp_path / "shard-000" / "manifest.json"
    result = plan(
        output,
        "--task",
        "PushCube-v1",
        "--count",
        "2",
        "--first-seed",
        "1000000",
        largest_file=bytes_there,
    )
    assert result.returncode == 1, result.stderr
    assert f"{output.parent} cannot be written, the disk is full" in result.stderr
    assert "run the same command again" in result.stderr
    assert "Traceback" not in result.stderr
    assert not output.exists()
    assert not (output.parent / "trajectory.h5").exists()


def test_an_unknown_task_is_one_sentence(tmp_path):
    result = plan(tmp_path / "manifest.json", "--task", "PushCub-v1", "--count", "1")
    assert result.returncode == 1
    assert "'PushCube-v1'" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "manifest.json").exists()
