"""Safetensors files: found, whole, missing and damaged."""

import json
from pathlib import Path

import numpy as np
import pytest
from golden_weights import lerobot_file
from safetensors.numpy import load_file, save_file

from demo2eval.checkpoints.safetensors_files import INDEX, open_tensors
from demo2eval.errors import UserError


def open_error(source: Path) -> str:
    with pytest.raises(UserError) as caught:
        open_tensors(source)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def is_lerobots(source: Path) -> bool:
    """Whether a source holds the tensors of LeRobot's file, whose names begin with `model.`."""
    tensors, golden = open_tensors(source), load_file(lerobot_file())
    return tensors.keys() == {name.removeprefix("model.") for name in golden} and all(
        (tensors[name.removeprefix("model.")].read() == value).all()
        for name, value in golden.items()
    )


def write_shards(folder: Path, count: int = 3) -> dict[str, str]:
    """Write LeRobot's tensors as `count` files with an index, and return {tensor: file}."""
    tensors = load_file(lerobot_file())
    weight_map = {
        name: f"model-{1 + index % count:05d}-of-{count:05d}.safetensors"
        for index, name in enumerate(sorted(tensors))
    }
    for file in set(weight_map.values()):
        names = [name for name in weight_map if weight_map[name] == file]
        save_file({name: tensors[name] for name in names}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (folder / INDEX).write_text(json.dumps(index))
    return weight_map


def test_a_file_and_the_folder_that_holds_it():
    assert is_lerobots(lerobot_file())
    assert is_lerobots(lerobot_file().parent)


def test_shards_and_the_files_beside_weights(tmp_path):
    write_shards(tmp_path)
    # LeRobot keeps its normalization beside the weights.
    save_file(
        {"action.q01": np.zeros(7, np.float32)},
        tmp_path / "policy_preprocessor_step_2_normalizer_processor.safetensors",
    )
    assert is_lerobots(tmp_path)
    assert is_lerobots(tmp_path / INDEX)
    (tmp_path / INDEX).unlink()
    assert is_lerobots(tmp_path)


def test_damaged_files(tmp_path):
    whole, file = lerobot_file().read_bytes(), tmp_path / "model.safetensors"
    damaged = {
        "its last byte is missing": whole[:-1],
        "its header is cut": whole[:5000],
        "it is empty": b"",
        "its header is no JSON": (8).to_bytes(8, "little") + b"no JSON " + whole,
        "Git LFS left a pointer in its place": b"version https://git-lfs.github.com/spec/v1\n",
    }
    for content in damaged.values():
        file.write_bytes(content)
        message = open_error(file)
        assert message.startswith(f"{file} cannot be read (")
        assert message.endswith("): it is cut off, damaged or no safetensors file; copy it again.")


def test_a_missing_source(tmp_path):
    advice = "set model.weights to an openpi checkpoint, a folder with params/, or to safetensors."
    assert open_error(tmp_path / "nowhere") == f"{tmp_path}/nowhere does not exist; {advice}"
    assert open_error(tmp_path) == f"{tmp_path} has no safetensors files; {advice}"
    for name in "ab":
        save_file({name: np.zeros(1, np.float32)}, tmp_path / f"{name}.safetensors")
    assert open_error(tmp_path) == (
        f"{tmp_path} has 2 safetensors files, none of them model.safetensors; {advice}"
    )


def test_missing_shards_and_tensors(tmp_path):
    weight_map = write_shards(tmp_path)
    first, second = (f"model-0000{number}-of-00003.safetensors" for number in (1, 2))
    count = list(weight_map.values()).count(second)
    (tmp_path / second).unlink()
    assert open_error(tmp_path) == (
        f"{tmp_path} is missing {second}, {count} of the {len(weight_map)} arrays that {INDEX}"
        " lists; copy it again."
    )
    (tmp_path / second).write_bytes((tmp_path / first).read_bytes())
    message = open_error(tmp_path)
    assert message.startswith(f"{tmp_path / second} is missing ")
    assert message.endswith(f" more, which {INDEX} says it holds; copy it again.")
    (tmp_path / INDEX).write_text("{}")
    assert open_error(tmp_path) == (
        f"{tmp_path / INDEX} is no index of safetensors ('weight_map'); copy it again."
    )


def test_files_of_two_models_in_one_folder(tmp_path):
    for number in (1, 2):
        save_file({"a": np.zeros(1, np.float32)}, tmp_path / f"model-{number}.safetensors")
    assert open_error(tmp_path) == (
        f"{tmp_path} holds a twice; leave the files of one model in it."
    )


def test_numbers_that_are_no_weights(tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({"extra": np.zeros(1)}, file)
    assert open_error(file) == (f"{file} holds extra as F64; weights are of type F32, BF16, F16.")
