"""Demos that are damaged where they enter: each a sentence with file, trajectory and reason."""

import json
import shutil

import h5py
import numpy as np
import pytest

from demo2eval.data.trajectory import read_trajectory_file
from demo2eval.data.validate import apply_on_invalid, validate_files
from demo2eval.errors import UserError


@pytest.fixture
def pair(pushcube_demos, tmp_path):
    """A copy of a valid .h5, with its .json beside it, to be damaged."""
    for name in ("trajectory.h5", "trajectory.json"):
        shutil.copy(pushcube_demos.parent / name, tmp_path)
    return tmp_path / "trajectory.h5"


def validate(file, task="PushCube-v1"):
    """Return the demos of a valid file."""
    files = validate_files([file], task=task, robot="panda")
    apply_on_invalid(files, "error")
    return files[0].demos


def refused(file, task="PushCube-v1") -> str:
    """Return the sentence about an invalid file."""
    with pytest.raises(UserError) as caught:
        validate(file, task)
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


def test_a_valid_file_is_read(pair):
    file = read_trajectory_file(pair)
    assert len(validate(pair)) == len(file.demos) == len(file.metadata["episodes"]) == 3
    assert file.episodes == file.metadata["episodes"]


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
    sentence = refused(pair)
    assert "traj_1: cannot be read" in sentence
    assert "damaged" in sentence


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
    sentence = refused(pair)
    assert "traj_1" in sentence
    assert expected in sentence


def test_all_issues_are_listed_at_once(pair):
    replace(pair, "traj_0/actions", set_at((5, 2), np.nan))
    with h5py.File(pair, "a") as content:
        del content["traj_2/success"]
    sentence = refused(pair)
    assert "traj_0" in sentence
    assert "traj_2: has no success" in sentence


def test_a_repeated_trajectory(pair):
    with h5py.File(pair, "a") as content:
        del content["traj_2"]
        content.copy("traj_0", "traj_2")
        length = len(content["traj_0/actions"])
    metadata = json.loads(pair.with_suffix(".json").read_text())
    metadata["episodes"][2]["elapsed_steps"] = length
    pair.with_suffix(".json").write_text(json.dumps(metadata))
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
    expected = (
        "its env_states are of the robot panda_wristcam, but the task is evaluated with panda"
    )
    assert f"traj_1: {expected}" in refused(pair)
    with h5py.File(pair, "a") as content:
        del content["traj_1/env_states/articulations"]
    assert "traj_1: its env_states are of the robot (none)" in refused(pair)


@pytest.mark.parametrize("recorded", ["panda_wristcam", ["panda_wristcam"], "fetch"])
def test_another_robot_in_the_json(pair, recorded):
    metadata = json.loads(pair.with_suffix(".json").read_text())
    metadata["env_info"]["env_kwargs"]["robot_uids"] = recorded
    pair.with_suffix(".json").write_text(json.dumps(metadata))
    sentence = refused(pair)
    assert f"says that the robot is {recorded}" in sentence
    assert "record it with robot_uids='panda'" in sentence


@pytest.mark.parametrize("kwargs", [None, {}, {"robot_uids": ["panda"]}])
def test_a_json_need_not_say_which_robot(pair, kwargs):
    metadata = json.loads(pair.with_suffix(".json").read_text())
    metadata["env_info"]["env_kwargs"] = kwargs
    pair.with_suffix(".json").write_text(json.dumps(metadata))
    assert len(validate(pair)) == 3


@pytest.mark.parametrize("content", [None, "{", "[]", '{"episodes": []}'])
def test_a_missing_or_broken_json(pair, content):
    pair.with_suffix(".json").unlink()
    if content is not None:
        pair.with_suffix(".json").write_text(content)
    refused(pair)


def test_a_control_mode_that_does_not_match_the_actions(pair):
    metadata = json.loads(pair.with_suffix(".json").read_text())
    for episode in metadata["episodes"]:
        episode["control_mode"] = "pd_joint_delta_pos"
    pair.with_suffix(".json").write_text(json.dumps(metadata))
    assert "outside the [-1, 1] of pd_joint_delta_pos" in refused(pair)
