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
from jax.sharding import Mesh

from demo2eval.checkpoints.openpi import check_finite, load_params
from demo2eval.errors import UserError
from demo2eval.pi0.config import Pi0Config
from demo2eval.pi0.params import split_trainable
from demo2eval.training.host_ema import HostEma
from demo2eval.training.sharding import place

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
        ema: moving average of `params`; None without EMA, or if it is in the host's memory.
    """

    params: FlatParams
    frozen: FlatParams
    opt_state: optax.OptState
    ema: FlatParams | None


def init_train_state(
    checkpoint: Path,
    step: int,
    config: Pi0Config,
    optimizer: optax.GradientTransformation,
    ema_decay: float | None,
    *,
    mesh: Mesh,
    saved: Path | None = None,
    ema_on_host: bool = False,
) -> tuple[TrainState, HostEma | None]:
    """Return the state in which training left a checkpoint; at step 0 a fresh one.

    Args:
        checkpoint: its folder.
        step: of the checkpoint.
        mesh: of the devices that will hold the state.
        saved: a state that was saved on the way from this checkpoint to the next, to take instead.
        ema_on_host: keep the moving average in the host's memory.

    Returns:
        (state, moving average on the host or None).

    Raises:
        UserError: if the weights or the training state are missing, damaged or of another model.
    """
    loaded, frozen = split_trainable(config, load_params(checkpoint / "params", config))
    average = loaded
    if saved is None and step == 0:
        params = place(mesh, {name: np.asarray(loaded[name], np.float32) for name in loaded})
        opt_state = jax.jit(optimizer.init)(params)
    else:
        params, opt_state, saved_ema = load_train_state(
            saved or checkpoint / "train_state", optimizer
        )
        average = saved_ema or average
    host_ema = ema = None
    if ema_decay is not None and ema_on_host:
        host_ema = HostEma(average, ema_decay)
    elif ema_decay is not None:
        # A copy: the step's buffers are donated, so nothing may be in the state twice.
        ema = {name: jnp.array(value, jnp.float32, copy=True) for name, value in average.items()}
    return place(mesh, TrainState(params, frozen, opt_state, ema)), host_ema


class StateSaver:
    """Writes training states; the files are written while training goes on."""

    def __init__(self):
        """Open one checkpointer for all saves: each would keep memory of its own."""
        handler = ocp.PyTreeCheckpointHandler(use_compression=False)
        self._checkpointer = ocp.AsyncCheckpointer(handler)

    def save(self, path: Path, state: TrainState, ema: FlatParams | None = None) -> None:
        """Begin to write `params`, `opt_state` and, if given, `ema`; the rest is elsewhere.

        The folder `path` must not exist; it appears when it is whole.

        Args:
            path: the folder.
            state: the leaves of its `opt_state` are stored in order, since the optimizer tells
                their structure.
            ema: the moving average, if the weights of a checkpoint do not hold it.

        Raises:
            UserError: if an array is not finite.
        """
        leaves = {
            f"{index:04d}": leaf for index, leaf in enumerate(jax.tree.leaves(state.opt_state))
        }
        tree = {"params": state.params, "opt_state": leaves} | ({"ema": ema} if ema else {})
        check_finite(tree, "the training state")
        self._checkpointer.save(path.absolute(), args=ocp.args.PyTreeSave(tree))

    def wait(self) -> None:
        """Wait until what was saved is written."""
        self._checkpointer.wait_until_finished()


def load_train_state(
    path: Path, optimizer: optax.GradientTransformation
) -> tuple[FlatParams, optax.OptState, FlatParams | None]:
    """Read what `StateSaver` wrote.

    Returns:
        (params, opt_state, ema or None), arrays of numpy, bit for bit those that were saved.

    Raises:
        UserError: if the folder is damaged, or was written with another optimizer.
    """
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
    except (ValueError, OSError, KeyError, TypeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(
            f"{path} cannot be read ({first_line}). Copy it back if it is a checkpoint's; one that "
            "was saved on the way can be deleted, and training goes on from what is before it."
        ) from error
    structure = jax.tree.structure(jax.eval_shape(optimizer.init, saved["params"]))
    leaves = [saved["opt_state"][key] for key in sorted(saved["opt_state"])]
    if structure.num_leaves != len(leaves):
        raise UserError(f"{path} was written with another optimizer; it is of another training.")
    return saved["params"], jax.tree.unflatten(structure, leaves), saved.get("ema")


def tree_digest(tree: Any) -> str:
    """Return a SHA-256 of a tree's names, dtypes, shapes and values."""

    def digest(item: tuple) -> str:
        path, leaf = item
        array = np.ascontiguousarray(np.asarray(leaf))
        header = f"{jax.tree_util.keystr(path)} {array.dtype} {array.shape}\n".encode()
        content = hashlib.sha256(header)
        content.update(array.reshape(-1).view(np.uint8))
        return content.hexdigest()

    with ThreadPoolExecutor(8) as pool:
        digests = pool.map(digest, jax.tree_util.tree_leaves_with_path(tree))
        return hashlib.sha256("\n".join(sorted(digests)).encode()).hexdigest()
