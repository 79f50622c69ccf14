"""openpi's reference numbers: how they are read, and how ours are compared with them.

The folder is `tests/golden`, or that of the environment variable GOLDEN_DIR. An array lies in its
file whole, or in the form that the word behind an @ in its name says:

    attn_mask@sha256               type, shape and digest: ours must have the same bits
    prefix_out@fold_8              signed sums of eight entries each
    grad/.../kernel@fold_16        signed sums of sixteen
    aug0/base_0_rgb@every_7        every seventh entry
    image/base_0_rgb@differences   whole, as differences between neighboring pixels
    pi05_params@copies             names of arrays that are the same in pi05_params.npz

`tests/reduce_golden.py` makes these forms from whole arrays; golden/README.md lists them.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike
from safetensors.numpy import load_file, save_file

from demo2eval.checkpoints.huggingface import to_huggingface
from demo2eval.checkpoints.huggingface_layout import EXPERT_HEAD
from demo2eval.checkpoints.openpi import save_params
from demo2eval.pi0.config import Pi0Config
from demo2eval.pi0.params import unflatten

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))


def digest(array: np.ndarray) -> np.ndarray:
    """Return the type, shape and SHA-256 of an array's bits, as one string in an array."""
    bits = np.ascontiguousarray(array).tobytes()
    return np.array(f"{array.dtype} {list(array.shape)} {hashlib.sha256(bits).hexdigest()}")


def fold(array: np.ndarray, group: int) -> np.ndarray:
    """Return signed sums of `group` entries each, float32 [ceil(size / group)].

    Every entry is in one sum, with entries far from it. The signs are random, so that errors with a
    pattern do not cancel. If one entry is off by more than a tolerance, so is its sum.
    """
    # The raw bits of a bit generator are the same in every version of numpy.
    signs = np.where(np.random.PCG64(0).random_raw(array.size) >> np.uint64(63), -1.0, 1.0)
    signed = array.astype(np.float64).ravel() * signs
    return np.pad(signed, (0, -array.size % group)).reshape(group, -1).sum(0).astype(np.float32)


REDUCTIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "sha256": digest,
    "fold_8": partial(fold, group=8),
    "fold_16": partial(fold, group=16),
    "every_7": lambda array: array.ravel()[::7],
}


class Reduced(NamedTuple):
    """What the repository keeps of one of openpi's arrays: REDUCTIONS[reduction] of it."""

    reduction: str
    values: np.ndarray


def to_differences(images: np.ndarray) -> np.ndarray:
    """Return images, uint8 [b, h, w, 3], as differences along both axes, uint8 [b, 3, h, w]."""
    channels_first = np.moveaxis(images, -1, 1)
    rows = np.diff(channels_first, axis=2, prepend=np.uint8(0))
    return np.diff(rows, axis=3, prepend=np.uint8(0))


def from_differences(differences: np.ndarray) -> np.ndarray:
    """Undo `to_differences`."""
    images = differences.cumsum(2, dtype=np.uint8).cumsum(3, dtype=np.uint8)
    return np.ascontiguousarray(np.moveaxis(images, 1, -1))


def read(file_name: str, folder: Path = GOLDEN) -> dict:
    """Return what `<file_name>.npz` holds: name -> array, or Reduced."""
    arrays = {}
    with np.load(folder / f"{file_name}.npz") as file:
        for key in file.files:
            name, _, form = key.partition("@")
            if form == "copies":
                source = read(name, folder)
                arrays |= {copied: source[copied] for copied in file[key].tolist()}
            elif form == "differences":
                arrays[name] = from_differences(file[key])
            else:
                arrays[name] = Reduced(form, file[key]) if form else file[key]
    return arrays


def pair(ours: ArrayLike, golden, where: ArrayLike = True) -> tuple[np.ndarray, np.ndarray]:
    """Return the two arrays to compare: our values, reduced if openpi's are, and openpi's.

    Args:
        ours: an array.
        golden: what `read` gave for it.
        where: a mask that broadcasts; entries outside count as 0 on both sides.
    """
    ours = np.asarray(ours)
    if where is not True:
        ours = np.where(where, ours, 0)
    if isinstance(golden, Reduced):
        return REDUCTIONS[golden.reduction](ours), golden.values
    return ours, golden if where is True else np.where(where, golden, 0)


def difference(ours: ArrayLike, golden, where: ArrayLike = True) -> float:
    """Return the largest absolute difference within `pair`."""
    ours, golden = (np.asarray(array, np.float32) for array in pair(ours, golden, where))
    assert ours.shape == golden.shape
    return float(np.abs(ours - golden).max())


def assert_equal(ours: ArrayLike, golden, name: str = "") -> None:
    """Assert that the arrays of `pair` are equal."""
    np.testing.assert_array_equal(*pair(ours, golden), err_msg=name)


def lerobot_folder(scratch: Path, config: Pi0Config, folder: Path = GOLDEN) -> Path:
    """Return a folder with the model.safetensors that LeRobot wrote of `pi05_params`.

    If the reference data has no such file, our converter writes it into `scratch`, and every tensor
    must have the type, shape and bits that LeRobot's had. The expert's unused output head, which is
    not in openpi's weights, is filled with ones.
    """
    if (folder / "hf_pi05/model.safetensors").exists():
        return folder / "hf_pi05"
    written = json.loads((folder / "hf_pi05/tensors.json").read_text())
    save_params(scratch / "params", unflatten(read("pi05_params", folder)))
    to_huggingface(scratch / "params", scratch / "ours.safetensors", config)
    tensors = {
        f"model.{name}": array for name, array in load_file(scratch / "ours.safetensors").items()
    }
    head = np.ones_like(tensors.pop(f"model.{EXPERT_HEAD}"))
    ours = {name: str(digest(array)) for name, array in tensors.items()}
    differing = sorted({name for name, _ in ours.items() ^ written["tensors"].items()})
    assert not differing, f"not as LeRobot wrote them: {differing}"
    result = scratch / "hf_pi05"
    result.mkdir()
    shutil.copy(folder / "hf_pi05/config.json", result)
    save_file(
        tensors | {f"model.{EXPERT_HEAD}": head}, result / "model.safetensors", written["metadata"]
    )
    return result
