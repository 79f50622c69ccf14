"""Weights on disk in openpi's layout: `<step>/params` holds {"params": tree}, written by Orbax."""

from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import jax
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


@dataclass(frozen=True)
class LazyArray:
    """An array that is read or made only when its turn comes to be written."""

    shape: tuple[int, ...]
    dtype: np.dtype
    read: Callable[[], np.ndarray]


class _OneByOne(ocp.type_handlers.NumpyHandler):
    """Writes each `LazyArray` to the end before the next is read; on disk they are plain numpy arrays."""

    async def serialize(self, values, infos, args=None):
        for value, info, arg in zip(values, infos, args, strict=True):
            for written in await super().serialize([value.read()], [info], [arg]):
                written.result()
        return []


def save_params(path: Path, params: dict) -> None:
    """Write weights so that openpi's own loader reads them.

    Args:
        path: the folder `<step>/params`, which must not exist.
        params: nested dictionary of arrays.
    """
    ocp.PyTreeCheckpointer().save(Path(path).absolute(), {"params": params})


def save_lazily(path: Path, arrays: dict[str, LazyArray]) -> None:
    """Write weights as `save_params` does, holding one array in memory at a time.

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
        (LazyArray, _OneByOne(deepcopy_host_arrays=False)),
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
        UserError: if the folder is missing or damaged, or the weights are of another family or size.
    """
    stored = _describe(Path(path), config)
    # Each array by itself: Orbax reads all at once, and of one that is damaged leaves a traceback for every other.
    with ThreadPoolExecutor(READERS) as pool:
        arrays = pool.map(lambda leaf: _restore(Path(path), *leaf, dtype), stored.values())
        return unflatten(dict(zip(stored, arrays, strict=True)))


def open_params(path: Path, config: Pi0Config) -> dict[str, LazyArray]:
    """Return the arrays that `load_params` reads, by openpi's names, none of them read yet.

    Raises:
        UserError: as `load_params`; an array that is damaged shows when it is read.
    """
    return {
        name: LazyArray(
            tuple(leaf.shape), np.dtype(leaf.dtype), partial(_restore, Path(path), place, leaf)
        )
        for name, (place, leaf) in _describe(Path(path), config).items()
    }


def _describe(path: Path, config: Pi0Config | None) -> dict[str, tuple[str, object]]:
    """Return {openpi's name: (name in the file, metadata)} of a checkpoint's arrays, compared with a model's if given."""
    if not path.is_dir():
        raise UserError(f"{path} does not exist; a checkpoint keeps its weights in <step>/params.")
    if not (path / "_METADATA").is_file():
        raise UserError(
            f"{path} holds no weights, or not all of them: it has no file _METADATA; copy or make it again."
        )
    with _damage_is_told(path):
        _read_index(path)
        metadata = ocp.PyTreeCheckpointer().metadata(path.absolute()).item_metadata
        if metadata is None:
            raise ValueError("_METADATA or _sharding is cut off")
        leaves = flatten(metadata.tree)
    stored = {name.removeprefix("params/"): (name, leaf) for name, leaf in leaves.items()}
    if all(name.endswith("/value") for name in stored):  # openpi's training writes them so
        stored = {name.removesuffix("/value"): place for name, place in stored.items()}
    if config is not None:
        check_params(config, {name: leaf for name, (_, leaf) in stored.items()}, path)
    return stored


def _read_index(path: Path) -> None:
    """Read what says where the arrays lie, which fails here with one error and in Orbax with one for each array."""
    if (path / "manifest.ocdbt").exists():
        tensorstore.KvStore.open(
            {"driver": "ocdbt", "base": path.absolute().as_uri() + "/"}
        ).result().list().result()
    elif not any(path.glob("params.*")):
        raise ValueError("manifest.ocdbt is missing")


def _restore(path: Path, name: str, leaf, dtype: np.dtype | None = None) -> np.ndarray:
    """Read one array, of metadata `leaf`."""
    with _damage_is_told(path, f"array {name.removeprefix('params/')} of "):
        restored = ocp.PyTreeCheckpointer().restore(
            path.absolute(),
            ocp.args.PyTreeRestore(
                item=unflatten({name: leaf}),
                restore_args=unflatten(
                    {name: ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype)}
                ),
                partial_restore=True,
            ),
        )
        return flatten(restored)[name]


@contextmanager
def _damage_is_told(path: Path, what: str = "") -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{what}{path} cannot be read ({first_line}): it is incomplete; copy or make it again."
        ) from error
