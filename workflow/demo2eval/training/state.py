"""The training state on disk: raw weights and optimizer state, beside the EMA weights that openpi's layout calls `params`."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import jax
import numpy as np
import optax
import orbax.checkpoint as ocp

from demo2eval.errors import UserError


def tree_digest(tree) -> str:
    """Return a SHA-256 of a tree's names, dtypes, shapes and values; equal trees have equal digests wherever they lie."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)

    def digest(item) -> str:
        path, leaf = item
        array = np.ascontiguousarray(np.asarray(leaf))
        header = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode()
        return hashlib.sha256(header + array.tobytes()).hexdigest()

    with ThreadPoolExecutor(8) as pool:
        return hashlib.sha256("\n".join(sorted(pool.map(digest, leaves))).encode()).hexdigest()


def save_train_state(path: Path, params, opt_state: optax.OptState) -> None:
    """Write the raw weights and the optimizer state, every array as it is.

    Args:
        path: the folder `<step>/train_state`, which must not exist.
        params: the weights that the optimizer updates, a nested dictionary.
        opt_state: its leaves are stored in order, since their structure follows from the optimizer.
    """
    leaves = {f"{index:04d}": leaf for index, leaf in enumerate(jax.tree.leaves(opt_state))}
    ocp.PyTreeCheckpointer().save(path.absolute(), {"params": params, "opt_state": leaves})


def load_train_state(path: Path, optimizer: optax.GradientTransformation):
    """Read what `save_train_state` wrote.

    Returns:
        (params, opt_state), arrays of numpy, equal bit for bit to those that were saved.

    Raises:
        UserError: if the folder is missing or damaged, or was written with another optimizer.
    """
    if not path.is_dir():
        raise UserError(
            f"{path} does not exist: only the newest training states are kept; delete the checkpoints after it to resume."
        )
    checkpointer = ocp.PyTreeCheckpointer()
    try:
        template = checkpointer.metadata(path.absolute()).item_metadata.tree
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), template)
        saved = checkpointer.restore(
            path.absolute(), ocp.args.PyTreeRestore(item=template, restore_args=arguments)
        )
    except (ValueError, FileNotFoundError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); delete this checkpoint, and its segment trains again."
        ) from error
    structure = jax.tree.structure(jax.eval_shape(optimizer.init, saved["params"]))
    leaves = [saved["opt_state"][key] for key in sorted(saved["opt_state"])]
    if structure.num_leaves != len(leaves):
        raise UserError(f"{path} was written with another optimizer; train from step 0 again.")
    return saved["params"], jax.tree.unflatten(structure, leaves)
