"""Finds the safetensors files of a model and opens their tensors; none is read before its turn.

Weights of several files (shards) come with an index of which file holds which tensor.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from demo2eval.checkpoints.mismatch import join_names
from demo2eval.checkpoints.openpi import LazyArray
from demo2eval.errors import UserError

DTYPES = {"F32": np.float32, "BF16": ml_dtypes.bfloat16, "F16": np.float16}
INDEX = "model.safetensors.index.json"


def open_tensors(source: Path) -> dict[str, LazyArray]:
    """Return {name without one leading "model.": tensor} of all files of a model.

    Args:
        source: a safetensors file, an index, or a folder with either.

    Raises:
        UserError: if a file is missing or damaged, if a tensor is not where the index says, or if
            one is there twice.
    """
    files, weight_map = find_files(Path(source))
    tensors: dict[str, LazyArray] = {}
    for file in files:
        opened = _open_file(file)
        expected = {name for name, file_name in weight_map.items() if file_name == file.name}
        if missing := sorted(expected - opened.keys()):
            raise UserError(
                f"{file} is missing {join_names(missing)}, which {INDEX} says it holds; "
                "copy it again."
            )
        opened = {name.removeprefix("model."): tensor for name, tensor in opened.items()}
        if twice := sorted(opened.keys() & tensors.keys()):
            raise UserError(
                f"{source} holds {join_names(twice)} twice; leave the files of one model in it."
            )
        tensors |= opened
    return tensors


def find_files(source: Path) -> tuple[list[Path], dict[str, str]]:
    """Return (files, {tensor: name of its file}) of a model; the second is empty without an index.

    Other safetensors that lie in the folder, such as LeRobot's normalization, are no weights.

    Raises:
        UserError: if there is no file, or if one that the index names is missing.
    """
    index = source / INDEX if source.is_dir() else source
    if index.name.endswith(".json") and index.is_file():
        return _read_index(index)
    if source.is_file():
        return [source], {}
    for pattern in ("model.safetensors", "model-*.safetensors"):
        if files := sorted(source.glob(pattern)):
            return files, {}
    files = sorted(source.glob("*.safetensors"))
    if len(files) == 1:
        return files, {}
    problem = "does not exist"
    if source.is_dir():
        problem = "has no safetensors files"
    if files:
        problem = f"has {len(files)} safetensors files, none of them model.safetensors"
    raise UserError(
        f"{source} {problem}; set model.weights to an openpi checkpoint, a folder with params/, "
        "or to safetensors."
    )


def _read_index(index: Path) -> tuple[list[Path], dict[str, str]]:
    try:
        weight_map = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        files = [index.parent / name for name in sorted(set(weight_map.values()))]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is no index of safetensors ({error}); copy it again.") from error
    if missing := [file.name for file in files if not file.is_file()]:
        count = sum(file_name in missing for file_name in weight_map.values())
        raise UserError(
            f"{index.parent} is missing {', '.join(missing)}, {count} of the {len(weight_map)} "
            f"arrays that {INDEX} lists; copy it again."
        )
    return files, weight_map


def _open_file(file: Path) -> dict[str, LazyArray]:
    """Return {name: tensor} of one file."""
    tensors = {}
    with _safe_open(file) as content:
        for name in content.keys():  # noqa: SIM118  (it is no dictionary)
            tensor = content.get_slice(name)
            if tensor.get_dtype() not in DTYPES:
                raise UserError(
                    f"{file} holds {name} as {tensor.get_dtype()}; weights are of type "
                    f"{', '.join(DTYPES)}."
                )
            dtype = np.dtype(DTYPES[tensor.get_dtype()])
            tensors[name] = LazyArray(tuple(tensor.get_shape()), dtype, partial(_read, file, name))
    return tensors


def _read(file: Path, name: str) -> np.ndarray:
    # Opened for each tensor: while a file is open, all that was read of it stays in memory.
    with _safe_open(file) as content:
        return content.get_tensor(name)


@contextmanager
def _safe_open(file: Path) -> Iterator[safe_open]:
    try:
        with safe_open(file, framework="numpy") as content:
            yield content
    except (SafetensorError, OSError) as error:
        raise UserError(
            f"{file} cannot be read ({error}): it is cut off, damaged or no safetensors file; "
            "copy it again."
        ) from error
