"""Importing and downloading demos: the first valid ones, exactly; else a sentence and nothing."""

import json
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest

from demo2eval.data.download_demos import download, find_archive, unpack
from demo2eval.data.import_demos import import_demos
from demo2eval.data.sources import select_shard
from demo2eval.data.trajectory import read_trajectory_file
from demo2eval.errors import UserError
from demo2eval.provenance import read_manifest


@pytest.fixture
def source(pushcube_demos, tmp_path) -> Path:
    """A copy of a valid .h5, with its .json beside it, to be damaged."""
    for name in ("trajectory.h5", "trajectory.json"):
        shutil.copy(pushcube_demos.with_name(name), tmp_path)
    return tmp_path / "trajectory.h5"


@pytest.fixture
def output(tmp_path) -> Path:
    return tmp_path / "shard-000" / "manifest.json"


def import_pushcube(source: Path, output: Path, **options) -> dict:
    """Import two demos of PushCube and return the manifest's metadata."""
    options = {"num_demos": 2} | options
    import_demos([source], output, task="PushCube-v1", robot="panda", **options)
    return read_manifest(output)["metadata"]


def spoil_actions(source: Path, trajectory: str) -> None:
    with h5py.File(source, "r+") as file:
        file[f"{trajectory}/actions"][5, 2] = np.nan


def test_the_first_demos_are_taken_exactly(source, output):
    metadata = import_pushcube(source, output)
    assert (metadata["demos"], metadata["skipped"]) == (2, [])
    copies = read_trajectory_file(output.with_name("trajectory.h5")).demos
    originals = read_trajectory_file(source).demos[:2]
    assert metadata["seeds"] == [demo.seed for demo in originals]
    for copy, original in zip(copies, originals, strict=True):
        np.testing.assert_array_equal(copy.actions, original.actions)


def test_shards_go_on_from_file_to_file(source, output, pushcube_demos):
    """Two files of three demos each, other seeds in the second: the second shard has both."""
    second = source.with_name("second.h5")
    shutil.copy(source, second)
    metadata = json.loads(source.with_suffix(".json").read_text())
    with h5py.File(second, "r+") as file:
        for episode in metadata["episodes"]:
            episode["episode_seed"] += 1000
            file[f"traj_{episode['episode_id']}/actions"][0] *= 0.999
    second.with_suffix(".json").write_text(json.dumps(metadata))
    files, first = select_shard([source, second], 2, 2)
    assert (files, first) == ([source, second], 2)
    assert select_shard([source, second], 4, 2) == ([second], 1)
    import_demos(files, output, task="PushCube-v1", robot="panda", first_demo=first, num_demos=2)
    facts = read_manifest(output)["metadata"]
    seeds = [episode["episode_seed"] for episode in metadata["episodes"]]
    assert facts["seeds"] == [seeds[2] - 1000, seeds[0]]
    assert facts["trajectories"] == {str(source): ["traj_2"], str(second): ["traj_0"]}
    demos = read_trajectory_file(output.with_name("trajectory.h5")).demos
    assert [demo.name for demo in demos] == ["traj_0", "traj_1"]
    originals = [read_trajectory_file(source).demos[2], read_trajectory_file(second).demos[0]]
    for demo, original in zip(demos, originals, strict=True):
        np.testing.assert_array_equal(demo.actions, original.actions)


def test_more_demos_than_there_are_is_a_sentence(source, output):
    with pytest.raises(UserError, match=r"there are 3 demonstrations.* lower demos.num_demos"):
        import_pushcube(source, output, num_demos=4)


def test_a_damaged_file_ends_with_a_sentence_and_nothing_is_written(source, output):
    source.write_bytes(source.read_bytes()[:20_000])
    options = {
        "sources": source,
        "output": output,
        "task": "PushCube-v1",
        "robot": "panda",
        "num_demos": 2,
    }
    words = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", "demo2eval.data.import_demos", *words]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert str(source) in result.stderr
    assert "Traceback" not in result.stderr
    assert not output.exists()


def test_invalid_demos_are_skipped_on_request(source, output):
    spoil_actions(source, "traj_1")
    with pytest.raises(
        UserError, match=r"not finite.*or leave these trajectories out with demos.on_invalid: skip"
    ):
        import_pushcube(source, output, num_demos=3)
    assert not output.exists()
    metadata = import_pushcube(source, output, on_invalid="skip", num_demos=3)
    reason = "its actions are not finite at step 5"
    assert metadata["skipped"] == [{"file": str(source), "trajectory": "traj_1", "reason": reason}]
    kept = read_trajectory_file(output.with_name("trajectory.h5"))
    assert metadata["trajectories"] == {str(source): ["traj_0", "traj_2"]}
    assert metadata["seeds"] == [demo.seed for demo in kept.demos]


def test_nothing_left_is_an_error(source, output):
    metadata = json.loads(source.with_suffix(".json").read_text())
    for entry in metadata["episodes"]:
        entry["success"] = False
    source.with_suffix(".json").write_text(json.dumps(metadata))
    with pytest.raises(UserError, match=r"traj_0: the .json says .* traj_2: the .json says"):
        import_pushcube(source, output, on_invalid="skip", num_demos=3)


def test_published_demos_up_to_the_network(source, tmp_path):
    assert find_archive("StackCube-v1").endswith("StackCube-v1.zip?download=true")
    with pytest.raises(UserError, match="PlaceSphere"):
        find_archive("PlaceSphere-v1")
    # The archive as ManiSkill packs it, served from a file.
    with zipfile.ZipFile(tmp_path / "served.zip", "w") as archive:
        for suffix in (".h5", ".json"):
            name = f"demos/PushCube-v1/motionplanning/trajectory{suffix}"
            archive.write(source.with_suffix(suffix), name)
        archive.writestr("demos/PushCube-v1/teleop/other.h5", b"")
    download((tmp_path / "served.zip").as_uri(), tmp_path / "archive.zip")
    unpacked = unpack(tmp_path / "archive.zip", tmp_path / "unpacked")
    assert len(read_trajectory_file(unpacked).demos) == 3
    with pytest.raises(UserError, match="cannot be downloaded"):
        download((tmp_path / "missing.zip").as_uri(), tmp_path / "archive.zip")
    (tmp_path / "archive.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="damaged"):
        unpack(tmp_path / "archive.zip", tmp_path / "unpacked")
