"""Safetensors read and written one tensor at a time, so that memory never holds a whole file.

A file is eight bytes with the length of a JSON header, the header {name: {dtype, shape, data_offsets}}, and the values
(https://github.com/huggingface/safetensors#format). Weights of several files come with an index of which file holds what.
"""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from demo2eval.checkpoints.mismatch import listed
from demo2eval.errors import UserError

DTYPES = {"F32": np.dtype("<f4"), "BF16": np.dtype(ml_dtypes.bfloat16), "F16": np.dtype("<f2")}
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies in a file."""

    file: Path
    offset: int
    shape: tuple[int, ...]
    dtype: np.dtype

    def read(self) -> np.ndarray:
        """Return the values."""
        raw = np.fromfile(
            self.file, np.uint8, math.prod(self.shape) * self.dtype.itemsize, offset=self.offset
        )
        return raw.view(self.dtype).reshape(self.shape)


def read_header(file: Path) -> dict[str, StoredTensor]:
    """Return {name: tensor} of one safetensors file, whose values are not read.

    Raises:
        UserError: if the file is missing, cut off, no safetensors file, or of numbers that are no weights.
    """
    if not file.is_file():
        raise UserError(
            f"{file} does not exist; give a safetensors file, or the folder that holds it."
        )
    size = file.stat().st_size
    with open(file, "rb") as content:
        length = int.from_bytes(content.read(8), "little")
        text = content.read(length) if length <= size else b""
    if size < 8 or length > size - 8:
        raise UserError(
            f"{file} is cut off within its header, at {size} bytes, or is no safetensors file; copy it again."
        )
    try:
        header = json.loads(text)
        header.pop("__metadata__", None)
        tensors = {name: _stored(file, 8 + length, name, entry) for name, entry in header.items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{file} has a header that cannot be read ({error}); it is no safetensors file, or damaged."
        ) from error
    if end > size:
        raise UserError(f"{file} is cut off: it holds {size} bytes of {end}; copy it again.")
    return tensors


def _stored(file: Path, start: int, name: str, entry: dict) -> StoredTensor:
    shape, (first, last), kind = tuple(entry["shape"]), entry["data_offsets"], entry["dtype"]
    if kind not in DTYPES:
        raise UserError(f"{file} holds {name} as {kind}; weights are of type {', '.join(DTYPES)}.")
    if last - first != math.prod(shape) * DTYPES[kind].itemsize:
        raise ValueError(f"{last - first} bytes for {name} {list(shape)} of type {kind}")
    return StoredTensor(file, start + first, shape, DTYPES[kind])


def shards(source: Path) -> tuple[list[Path], dict[str, str]]:
    """Return (files, {tensor: name of its file}) of weights; the second is empty if there is no index.

    Args:
        source: a safetensors file, an index, or a folder with either. Other safetensors that lie in the folder, such as
            LeRobot's normalisation, are no weights.

    Raises:
        UserError: if there is none, or files that the index names are missing.
    """
    index = source / INDEX if source.is_dir() else source
    if index.name.endswith(".json") and index.is_file():
        return _indexed(index)
    if source.is_file():
        return [source], {}
    for pattern in ("model.safetensors", "model-*.safetensors"):
        if files := sorted(source.glob(pattern)):
            return files, {}
    files = sorted(source.glob("*.safetensors"))
    if len(files) == 1:
        return files, {}
    wrong = "does not exist"
    if source.is_dir():
        wrong = f"has {len(files) or 'no'} safetensors files{', none of them model.safetensors' if files else ''}"
    raise UserError(
        f"{source} {wrong}; set model.weights to an openpi checkpoint, a folder with params/, or to safetensors."
    )


def _indexed(index: Path) -> tuple[list[Path], dict[str, str]]:
    try:
        places = dict(json.loads(index.read_text(encoding="utf-8"))["weight_map"])
        files = [index.parent / name for name in sorted(set(places.values()))]
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{index} is no index of safetensors ({error}); copy it again.") from error
    if missing := [file.name for file in files if not file.is_file()]:
        arrays = sum(file in missing for file in places.values())
        raise UserError(
            f"{index.parent} lacks {', '.join(missing)}, {arrays} of the {len(places)} arrays that {INDEX} lists."
        )
    return files, places


def open_tensors(source: Path) -> dict[str, StoredTensor]:
    """Return {name without one leading "model.": tensor} of all files of some weights.

    Args:
        source: as for `shards`.

    Raises:
        UserError: if a file is missing or damaged, or lacks what the index says, or if a tensor is there twice.
    """
    files, places = shards(Path(source))
    tensors: dict[str, StoredTensor] = {}
    for file in files:
        header = read_header(file)
        if absent := sorted(
            name for name, place in places.items() if place == file.name and name not in header
        ):
            raise UserError(
                f"{file} lacks {listed(absent)}, which {INDEX} says it holds; copy it again."
            )
        plain = {name.removeprefix("model."): tensor for name, tensor in header.items()}
        if twice := sorted(plain.keys() & tensors.keys()):
            raise UserError(
                f"{source} holds {listed(twice)} twice; leave the files of one model in it."
            )
        tensors |= plain
    return tensors


def write_tensors(
    file: Path, described: dict[str, tuple[np.dtype, tuple[int, ...]]], values: Iterable[np.ndarray]
) -> None:
    """Write a safetensors file, under another name until it is whole.

    Args:
        described: name -> dtype and shape, in the order of `values`, which are taken one by one.

    Raises:
        UserError: if the file exists.
    """
    if file.exists():
        raise UserError(f"{file} exists; remove it or give another output.")
    names = {dtype: name for name, dtype in DTYPES.items()}
    header, end = {}, 0
    for name, (dtype, shape) in described.items():
        start, end = end, end + math.prod(shape) * dtype.itemsize
        header[name] = {"dtype": names[dtype], "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    try:
        with open(partial, "wb") as output:
            output.write(len(text).to_bytes(8, "little") + text)
            for (dtype, shape), value in zip(described.values(), values, strict=True):
                if value.shape != shape:
                    raise ValueError(f"{value.shape} is not the {shape} that was announced")
                output.write(np.ascontiguousarray(value, dtype).view(np.uint8).data)
        partial.rename(file)
    finally:
        partial.unlink(missing_ok=True)
