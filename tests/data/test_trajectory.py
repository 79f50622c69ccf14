"""Bad demonstration files: each a sentence that names the file, the trajectory and what is wrong."""

import json
import shutil
import subprocess
import sys
import zipfile

import h5py
import numpy as np
import pytest

from demo2eval.data.download_demos import archive_address, download, unpack
from demo2eval.data.import_demos import Settings, import_demos
from demo2eval.data.trajectory import read_demonstrations
from demo2eval.errors import UserError
from demo2eval.provenance import read_manifest


@pytest.fixture
def pair(pushcube_demos, tmp_path):
    """A copy of a good .h5, with its .json beside it, to be damaged."""
    for name in ("trajectory.h5", "trajectory.json"):
        shutil.copy(pushcube_demos.parent / name, tmp_path)
    return tmp_path / "trajectory.h5"


def refused(file, task="PushCube-v1") -> str:
    with pytest.raises(UserError) as caught:
        read_demonstrations(file, task)
    assert str(file.with_suffix("")) in str(caught.value)
    return str(caught.value)


def replace(file, name, change):
    """Replace a dataset of the file by what `change` makes of it."""
    with h5py.File(file, "a") as content:
        values = content[name][()]
        del content[name]
        content[name] = change(values)


def set_at(index, value):
    def change(values):
        values = values.copy()
        values[index] = value
        return values

    return change


def test_a_good_file_is_read(pair):
    demonstrations, description = read_demonstrations(pair, "PushCube-v1")
    assert len(demonstrations) == len(description["episodes"]) == 3


def test_a_file_cut_in_half(pair):
    content = pair.read_bytes()
    pair.write_bytes(content[: len(content) // 2])
    assert "cut off" in refused(pair)


def test_a_zeroed_block_of_actions(pair):
    with h5py.File(pair) as content:
        offset = content["traj_1/actions"].id.get_offset()
    content = bytearray(pair.read_bytes())
    content[offset + 320 : offset + 640] = bytes(320)
    pair.write_bytes(content)
    assert "traj_1: its actions are all zero at step 10" in refused(pair)


def test_a_zeroed_block_of_compressed_states(pair):
    with h5py.File(pair, "a") as content:
        states = content["traj_1/env_states/actors/cube"][()]
        del content["traj_1/env_states/actors/cube"]
        content.create_dataset("traj_1/env_states/actors/cube", data=states, compression="gzip")
        content.flush()
        chunk = content["traj_1/env_states/actors/cube"].id.get_chunk_info(0)
        offset, size = chunk.byte_offset, chunk.size
    content = bytearray(pair.read_bytes())
    content[offset : offset + size] = bytes(size)
    pair.write_bytes(content)
    said = refused(pair)
    assert "traj_1: cannot be read" in said
    assert "damaged" in said


@pytest.mark.parametrize(
    ("name", "change", "expected"),
    [
        ("traj_1/actions", set_at((5, 2), np.nan), "not finite at step 5"),
        ("traj_1/actions", set_at((7, 0), np.inf), "not finite at step 7"),
        ("traj_1/actions", lambda values: values[:-3], "one more than actions"),
        ("traj_1/actions", lambda values: values[:0], "at least 2"),
        ("traj_1/actions", lambda values: values[:, :7], "pd_joint_pos has 8"),
        ("traj_1/actions", lambda values: values.astype(np.float64), "float64"),
        ("traj_1/success", lambda values: np.zeros_like(values), "does not end in success"),
        (
            "traj_1/env_states/actors/cube",
            set_at((3, 0), np.nan),
            "env_states/actors/cube is not finite at step 3",
        ),
    ],
)
def test_damage_inside_names_the_trajectory(pair, name, change, expected):
    replace(pair, name, change)
    said = refused(pair)
    assert "traj_1" in said
    assert expected in said


def test_all_findings_are_told_at_once(pair):
    replace(pair, "traj_0/actions", set_at((5, 2), np.nan))
    with h5py.File(pair, "a") as content:
        del content["traj_2/success"]
    said = refused(pair)
    assert "traj_0" in said
    assert "traj_2: lacks success" in said


def test_a_repeated_trajectory(pair):
    with h5py.File(pair, "a") as content:
        del content["traj_2"]
        content.copy("traj_0", "traj_2")
        length = len(content["traj_0/actions"])
    description = json.loads(pair.with_suffix(".json").read_text())
    description["episodes"][2]["elapsed_steps"] = length
    pair.with_suffix(".json").write_text(json.dumps(description))
    assert "traj_2: repeats traj_0" in refused(pair)


def test_a_trajectory_missing_in_the_h5(pair):
    with h5py.File(pair, "a") as content:
        del content["traj_2"]
    assert "traj_2: is listed in the .json but missing in the .h5" in refused(pair)


def test_another_task(pair):
    assert "PushCube-v1" in refused(pair, "PullCube-v1")


def test_another_robot_in_the_states(pair):
    with h5py.File(pair, "a") as content:
        states = content["traj_1/env_states/articulations"]
        states.move("panda", "panda_wristcam")
    assert (
        "traj_1: its env_states are of the robot panda_wristcam, but the task is evaluated with panda"
        in refused(pair)
    )
    with h5py.File(pair, "a") as content:
        del content["traj_1/env_states/articulations"]
    assert "traj_1: its env_states are of the robot (none)" in refused(pair)


@pytest.mark.parametrize("recorded", ["panda_wristcam", ["panda_wristcam"], "fetch"])
def test_another_robot_in_the_json(pair, recorded):
    description = json.loads(pair.with_suffix(".json").read_text())
    description["env_info"]["env_kwargs"]["robot_uids"] = recorded
    pair.with_suffix(".json").write_text(json.dumps(description))
    said = refused(pair)
    assert f"recorded with the robot {recorded}" in said
    assert "record it with robot_uids='panda'" in said


@pytest.mark.parametrize("kwargs", [None, {}, {"robot_uids": ["panda"]}])
def test_a_json_need_not_say_which_robot(pair, kwargs):
    description = json.loads(pair.with_suffix(".json").read_text())
    description["env_info"]["env_kwargs"] = kwargs
    pair.with_suffix(".json").write_text(json.dumps(description))
    assert len(read_demonstrations(pair, "PushCube-v1")[0]) == 3


@pytest.mark.parametrize("content", [None, "{", "[]", '{"episodes": []}'])
def test_a_missing_or_broken_json(pair, content):
    pair.with_suffix(".json").unlink()
    if content is not None:
        pair.with_suffix(".json").write_text(content)
    refused(pair)


def test_a_control_mode_that_does_not_match_the_actions(pair):
    description = json.loads(pair.with_suffix(".json").read_text())
    for episode in description["episodes"]:
        episode["control_mode"] = "pd_joint_delta_pos"
    pair.with_suffix(".json").write_text(json.dumps(description))
    assert "outside the [-1, 1] of pd_joint_delta_pos" in refused(pair)


def test_import_takes_the_first_and_keeps_them_exactly(pair, tmp_path):
    output = tmp_path / "shard-000" / "manifest.json"
    import_demos(Settings(task="PushCube-v1", count=2), pair, output)
    facts = read_manifest(output)["metadata"]
    assert (facts["demonstrations"], facts["found"]) == (2, 3)
    demonstrations, _ = read_demonstrations(output.parent / "trajectory.h5", "PushCube-v1")
    originals, _ = read_demonstrations(pair, "PushCube-v1")
    for copy, original in zip(demonstrations, originals[:2], strict=True):
        np.testing.assert_array_equal(copy.actions, original.actions)


def test_a_damaged_import_ends_with_a_sentence_and_writes_nothing(pair, tmp_path):
    pair.write_bytes(pair.read_bytes()[:20_000])
    output = tmp_path / "out" / "manifest.json"
    options = [
        "--task",
        "PushCube-v1",
        "--count",
        "2",
        "--input",
        str(pair),
        "--output",
        str(output),
    ]
    result = subprocess.run(
        [sys.executable, "-m", "demo2eval.data.import_demos", *options],
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1
    assert str(pair) in result.stderr
    assert "Traceback" not in result.stderr
    assert not output.exists()


def test_published_demonstrations_up_to_the_network(pair, tmp_path):
    assert archive_address("StackCube-v1").endswith("StackCube-v1.zip?download=true")
    with pytest.raises(UserError, match="PlaceSphere"):
        archive_address("PlaceSphere-v1")
    # The archive as ManiSkill packs it, served from a file.
    with zipfile.ZipFile(tmp_path / "served.zip", "w") as archive:
        for suffix in (".h5", ".json"):
            archive.write(
                pair.with_suffix(suffix), f"demos/PushCube-v1/motionplanning/trajectory{suffix}"
            )
        archive.writestr("demos/PushCube-v1/teleop/other.h5", b"")
    download((tmp_path / "served.zip").as_uri(), tmp_path / "archive.zip")
    found = unpack(tmp_path / "archive.zip", tmp_path / "unpacked")
    assert len(read_demonstrations(found, "PushCube-v1")[0]) == 3
    with pytest.raises(UserError, match="cannot be downloaded"):
        download((tmp_path / "missing.zip").as_uri(), tmp_path / "archive.zip")
    (tmp_path / "archive.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match="damaged"):
        unpack(tmp_path / "archive.zip", tmp_path / "unpacked")
