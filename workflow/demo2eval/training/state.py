"""The training state, in memory and on disk."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp

from demo2eval.checkpoints.openpi import load_params
from demo2eval.errors import UserError
from demo2eval.pi0.config import Pi0Config
from demo2eval.pi0.params import split_trainable, unflatten

FlatParams = dict[str, Any]
"""Arrays by openpi's names, "PaliGemma/llm/..."."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What a training step needs and changes.

    Attributes:
        params: parameters that are trained, float32.
        frozen: parameters that LoRA does not train, bfloat16.
        opt_state: the optimizer's state.
        ema: moving average of `params`; None without EMA.
    """

    params: FlatParams
    frozen: FlatParams
    opt_state: optax.OptState
    ema: FlatParams | None

    @property
    def eval_params(self) -> dict:
        """The parameters to evaluate, a nested dictionary: averaged if there is EMA."""
        return unflatten((self.params if self.ema is None else self.ema) | self.frozen)


def init_train_state(
    checkpoint: Path,
    step: int,
    config: Pi0Config,
    optimizer: optax.GradientTransformation,
    ema_decay: float | None,
) -> TrainState:
    """Return the state in which training left a checkpoint; at step 0 a fresh one.

    Args:
        checkpoint: its folder.

    Raises:
        UserError: if the weights or the training state are missing, damaged or of another model.
    """
    loaded, frozen = split_trainable(config, load_params(checkpoint / "params", config))
    if step == 0:
        params = {name: jnp.asarray(value, jnp.float32) for name, value in loaded.items()}
        opt_state = optimizer.init(params)
    else:
        params, opt_state = load_train_state(checkpoint / "train_state", optimizer)
    ema = None
    if ema_decay is not None:
        # A copy: the step's buffers are donated, so nothing may be in the state twice.
        ema = {name: jnp.array(value, jnp.float32, copy=True) for name, value in loaded.items()}
    return jax.device_put(TrainState(params, frozen, opt_state, ema))


def save_train_state(path: Path, state: TrainState) -> None:
    """Write `params` and `opt_state`; the rest is in the checkpoint's `params`.

    Args:
        path: the folder `<step>/train_state`, which must not exist.
        state: the leaves of its `opt_state` are stored in order, since the optimizer tells their
            structure.
    """
    leaves = {f"{index:04d}": leaf for index, leaf in enumerate(jax.tree.leaves(state.opt_state))}
    tree = {"params": state.params, "opt_state": leaves}
    ocp.PyTreeCheckpointer().save(path.absolute(), tree)


def load_train_state(
    path: Path, optimizer: optax.GradientTransformation
) -> tuple[FlatParams, optax.OptState]:
    """Read what `save_train_state` wrote.

    Returns:
        (params, opt_state), arrays of numpy, bit for bit those that were saved.

    Raises:
        UserError: if the folder is missing or damaged, or was written with another optimizer.
    """
    if not path.is_dir():
        raise UserError(
            f"{path} does not exist: only the newest training states are kept; delete the "
            "checkpoints after it to resume."
        )
    checkpointer = ocp.PyTreeCheckpointer()
    try:
        metadata = checkpointer.metadata(path.absolute()).item_metadata
        if metadata is None:
            raise ValueError("it has no _METADATA")
        restore_args = jax.tree.map(
            lambda _: ocp.RestoreArgs(restore_type=np.ndarray), metadata.tree
        )
        saved = checkpointer.restore(
            path.absolute(), ocp.args.PyTreeRestore(item=metadata.tree, restore_args=restore_args)
        )
    except (ValueError, OSError) as error:
        raise UserError(
            f"{path} cannot be read ({error}); delete this checkpoint, and it is trained again."
        ) from error
    structure = jax.tree.structure(jax.eval_shape(optimizer.init, saved["params"]))
    leaves = [saved["opt_state"][key] for key in sorted(saved["opt_state"])]
    if structure.num_leaves != len(leaves):
        raise UserError(f"{path} was written with another optimizer; train from step 0 again.")
    return saved["params"], jax.tree.unflatten(structure, leaves)


def tree_digest(tree: Any) -> str:
    """Return a SHA-256 of a tree's names, dtypes, shapes and values."""

    def digest(item: tuple) -> str:
        path, leaf = item
        array = np.ascontiguousarray(np.asarray(leaf))
        header = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode()
        return hashlib.sha256(header + array.tobytes()).hexdigest()

    with ThreadPoolExecutor(8) as pool:
        digests = pool.map(digest, jax.tree_util.tree_leaves_with_path(tree))
        return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
