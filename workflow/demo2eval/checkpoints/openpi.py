"""Weights on disk in openpi's layout: `<step>/params` holds {"params": tree}, written by Orbax."""

import logging
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore

from demo2eval.checkpoints.mismatch import check_params
from demo2eval.errors import UserError
from demo2eval.pi0.config import Pi0Config
from demo2eval.pi0.params import flatten, unflatten

# Orbax compresses a chunk at a time, several at once; without chunks, a whole array.
CHUNK_BYTES = 32 * 2**20
READERS = 4
# What Orbax's threads raise is raised here as well; they would log it once for each array.
for _name in ("absl", "asyncio"):
    logging.getLogger(_name).setLevel(logging.CRITICAL)


def _print_unraisable(unraisable: Any) -> None:
    # TensorStore's threads, for each array that was being written when another could not be.
    if str(unraisable.exc_value) != "Event loop is closed":
        sys.__unraisablehook__(unraisable)


sys.unraisablehook = _print_unraisable


@dataclass(frozen=True)
class LazyArray:
    """An array that is read only when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class _LazyHandler(ocp.type_handlers.NumpyHandler):
    """Writes each `LazyArray` before the next is read; on disk they are plain numpy arrays."""

    async def serialize(self, values: Any, infos, args=None):
        assert args is not None
        for value, info, arg in zip(values, infos, args, strict=True):
            for future in await super().serialize([value.read()], [info], [arg]):
                future.result()
        return []


def save_params(path: Path, params: dict) -> None:
    """Write weights so that openpi's own loader reads them.

    Args:
        path: the folder `<step>/params`, which must not exist.
        params: nested dictionary of arrays.

    Raises:
        UserError: if an array is not finite.
    """
    check_finite(params, "the weights")
    # Weights hardly get smaller by compression, which takes longer than writing.
    handler = ocp.PyTreeCheckpointHandler(use_compression=False)
    with ocp.Checkpointer(handler) as checkpointer:
        checkpointer.save(Path(path).absolute(), args=ocp.args.PyTreeSave({"params": params}))


def check_finite(tree: Any, name: str) -> None:
    """Raise a UserError if an array of a tree holds NaN or infinity.

    Args:
        name: of the tree, for the error.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        finite = _all_finite(leaf) if isinstance(leaf, jax.Array) else np.isfinite(leaf).all()
        if not finite:
            raise UserError(
                f"{name} are not finite (array {jax.tree_util.keystr(path, simple=True)}), and are "
                "not saved. Where training made them, lower training.peak_lr; else take other "
                "weights to start from."
            )


@jax.jit
def _all_finite(array: jax.Array) -> jax.Array:
    return jnp.isfinite(array).all()


def save_lazy_params(path: Path, arrays: dict[str, LazyArray]) -> None:
    """Write weights as `save_params` does, with one array in memory at a time.

    Args:
        path: the folder `<step>/params`.
        arrays: by openpi's names.

    Raises:
        UserError: if the folder exists.
    """
    if Path(path).exists():
        raise UserError(f"{path} exists; remove it or give another output.")
    tree = {"params": unflatten(arrays)}
    handlers = ocp.type_handlers.create_type_handler_registry(
        (LazyArray, _LazyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),
    )
    chunks = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
    with ocp.Checkpointer(
        ocp.PyTreeCheckpointHandler(type_handler_registry=handlers)
    ) as checkpointer:
        checkpointer.save(Path(path).absolute(), args=ocp.args.PyTreeSave(tree, save_args=chunks))


def load_params(path: Path, config: Pi0Config | None = None, dtype: np.dtype | None = None) -> dict:
    """Read weights that were written here or by openpi.

    Args:
        path: the folder `<step>/params`.
        config: if given, the tree is compared with this model's, before any array is read.
        dtype: of the arrays returned; None for the types in which they were stored.

    Returns:
        nested dictionary of numpy arrays.

    Raises:
        UserError: if the folder is missing or damaged, or if the weights are of another model.
    """
    stored = _read_metadata(Path(path), config)
    # Each array by itself: Orbax reads all at once, and of one that is damaged leaves a traceback
    # for every other.
    with ThreadPoolExecutor(READERS) as pool:
        arrays = pool.map(
            lambda array: _restore(Path(path), array[0], array[1], dtype), stored.values()
        )
        return unflatten(dict(zip(stored, arrays, strict=True)))


def open_params(path: Path, config: Pi0Config) -> dict[str, LazyArray]:
    """Return the arrays that `load_params` reads, by openpi's names, none of them read yet.

    Raises:
        UserError: as `load_params`; an array that is damaged shows when it is read.
    """
    return {
        name: LazyArray(
            tuple(metadata.shape),
            np.dtype(metadata.dtype),
            partial(_restore, Path(path), stored_name, metadata),
        )
        for name, (stored_name, metadata) in _read_metadata(Path(path), config).items()
    }


def _read_metadata(path: Path, config: Pi0Config | None) -> dict[str, tuple[str, Any]]:
    """Return {openpi's name: (name in the file, shape and dtype)} of a checkpoint's arrays.

    They are compared with a model's if `config` is given.
    """
    if not path.is_dir():
        raise UserError(f"{path} does not exist; a checkpoint keeps its weights in <step>/params.")
    if not (path / "_METADATA").is_file():
        raise UserError(
            f"{path} holds no weights, or not all of them: it has no file _METADATA; "
            "copy or make it again."
        )
    with _report_damage(path):
        _read_index(path)
        item = ocp.PyTreeCheckpointer().metadata(path.absolute()).item_metadata
        if item is None:
            raise ValueError("_METADATA or _sharding is cut off")
        stored = flatten(item.tree)
    arrays = {name.removeprefix("params/"): (name, stored[name]) for name in stored}
    if all(name.endswith("/value") for name in arrays):  # openpi's training writes them so
        arrays = {name.removesuffix("/value"): array for name, array in arrays.items()}
    if config is not None:
        check_params(config, {name: metadata for name, (_, metadata) in arrays.items()}, path)
    return arrays


def _read_index(path: Path) -> None:
    """Read where the arrays lie.

    If that is damaged, it fails here with one error, and in Orbax with one for each array.
    """
    if (path / "manifest.ocdbt").exists():
        tensorstore.KvStore.open(
            {"driver": "ocdbt", "base": path.absolute().as_uri() + "/"}
        ).result().list().result()
    elif not any(path.glob("params.*")):
        raise ValueError("manifest.ocdbt is missing")


def _restore(path: Path, name: str, metadata, dtype: np.dtype | None = None) -> np.ndarray:
    """Read one array by its name in the file."""
    as_numpy = ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)
    arguments = ocp.args.PyTreeRestore(
        item=unflatten({name: metadata}),
        restore_args=unflatten({name: as_numpy}),
        partial_restore=True,
    )
    with _report_damage(path, f"array {name.removeprefix('params/')} of "):
        return flatten(ocp.PyTreeCheckpointer().restore(path.absolute(), arguments))[name]


@contextmanager
def _report_damage(path: Path, prefix: str = "") -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{prefix}{path} cannot be read ({first_line}): it is incomplete; "
            "copy or make it again."
        ) from error
