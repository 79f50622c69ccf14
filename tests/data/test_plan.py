"""Planning: exactly so many successful demos, the same again from the same seeds."""

import os
import subprocess
from pathlib import Path

import h5py
import numpy as np
import pytest
from conftest import find_task

from demo2eval.data.trajectory import read_trajectory_file
from demo2eval.data.validate import validate_files
from demo2eval.provenance import read_manifest

pytestmark = pytest.mark.simulator

ROOT = Path(__file__).resolve().parents[2]
PLANNING_PYTHON = ROOT / "envs/planning/.venv/bin/python"


def plan(output: Path, **options: str) -> subprocess.CompletedProcess:
    """Run the stage in the planning environment."""
    options = {"robot": "panda", "output": str(output)} | options
    words = [word for name, value in options.items() for word in (f"--{name}", value)]
    return subprocess.run(
        [str(PLANNING_PYTHON), "-m", "demo2eval.data.plan", *words],
        env=os.environ | {"PYTHONPATH": str(ROOT / "workflow")},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def planned(tmp_path_factory) -> Path:
    """Manifest of three planned demos."""
    output = tmp_path_factory.mktemp("plan") / "shard-000" / "manifest.json"
    result = plan(output, task="PushCube-v1", num_demos="3", first_seed="1000000")
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
    return output


def test_a_shard_holds_the_demos_that_were_asked_for(planned):
    path = planned.parent / "trajectory.h5"
    demos, metadata = read_trajectory_file(path).demos, read_manifest(planned)["metadata"]
    assert len(demos) == metadata["demos"] == 3
    assert metadata["seeds"] == [demo.seed for demo in demos]
    assert metadata["attempts"] == 3 + len(metadata["failures"])
    assert all(demo.success[-1] for demo in demos)
    assert {demo.control_mode for demo in demos} == {"pd_joint_pos"}
    robot = find_task("PushCube-v1").robot
    (file,) = validate_files([path], task="PushCube-v1", robot=robot)
    assert not file.issues


def test_the_same_seeds_give_the_demos_of_the_fixture(planned, pushcube_demos):
    with (
        h5py.File(planned.parent / "trajectory.h5") as new,
        h5py.File(pushcube_demos.parent / "trajectory.h5") as kept,
    ):
        for name in kept:
            np.testing.assert_array_equal(new[name]["actions"][()], kept[name]["actions"][()])


def test_a_task_without_a_planner_is_one_sentence(tmp_path):
    result = plan(tmp_path / "manifest.json", task="PushCub-v1", num_demos="1")
    assert result.returncode == 1
    assert "no motion planner for 'PushCub-v1'" in result.stderr
    assert "PushCube-v1" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (tmp_path / "manifest.json").exists()
