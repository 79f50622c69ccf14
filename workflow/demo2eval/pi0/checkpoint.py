"""Weights on disk in openpi's layout: `<step>/params` holds {"params": tree}, float32, written by Orbax."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import jax
import numpy as np
import orbax.checkpoint as ocp

from demo2eval.errors import UserError
from demo2eval.pi0.config import Pi0Config
from demo2eval.pi0.parameters import flatten, table, unflatten

NAMES_SHOWN = 12


def save_params(path: Path, params: dict) -> None:
    """Write weights so that openpi's own loader reads them.

    Args:
        path: the folder `<step>/params`, which must not exist.
        params: nested dictionary of arrays.
    """
    ocp.PyTreeCheckpointer().save(Path(path).absolute(), {"params": params})


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
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path} does not exist; a checkpoint keeps its weights in <step>/params.")
    checkpointer = ocp.PyTreeCheckpointer()
    with _damage_is_told(path):
        template = checkpointer.metadata(path.absolute()).item_metadata.tree
        stored = _without_value(flatten(template["params"]))
    if config is not None:
        check_params(config, stored, path)
    with _damage_is_told(path):
        arguments = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray, dtype=dtype), template)
        saved = checkpointer.restore(path.absolute(), ocp.args.PyTreeRestore(item=template, restore_args=arguments))
    return unflatten(_without_value(flatten(saved["params"])))


@contextmanager
def _damage_is_told(path: Path) -> Iterator[None]:
    try:
        yield
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"{path} cannot be read ({first_line}): it is incomplete; copy or make it again.") from error


def _without_value(flat: dict) -> dict:
    """Undo openpi's training, which writes every array as <name>/value."""
    if flat and all(name.endswith("/value") for name in flat):
        return {name.removesuffix("/value"): value for name, value in flat.items()}
    return flat


def family_of(names: Iterable[str]) -> str:
    """Return which family arrays of these names, joined by "/", are of: "pi05", "pi0" or "unknown"."""
    names = set(names)
    if "time_mlp_in/kernel" in names:
        return "pi05"
    return "pi0" if "action_time_mlp_in/kernel" in names else "unknown"


def check_params(config: Pi0Config, flat: dict[str, np.ndarray], source: Path) -> None:
    """Compare arrays with a model's parameter table.

    Raises:
        UserError: names the arrays that are missing, left over or misshapen, and says what the file is and what to set.
    """
    wanted = {name: shape for name, (shape, _) in table(config).items()}
    missing = sorted(wanted.keys() - flat.keys())
    extra = sorted(flat.keys() - wanted.keys())
    misshapen = sorted(name for name in wanted.keys() & flat.keys() if tuple(flat[name].shape) != wanted[name])
    if not (missing or extra or misshapen):
        return
    told = []
    if missing:
        told.append(f"missing {_names(missing)}")
    if extra:
        told.append(f"left over {_names(extra)}")
    if misshapen:
        shapes = [f"{name} {list(flat[name].shape)} instead of {list(wanted[name])}" for name in misshapen]
        told.append(f"misshapen {_names(shapes)}")
    raise UserError(f"{source} does not hold the weights of this {config.family} model: {'; '.join(told)}; {_advice(config, flat)}.")


def _advice(config: Pi0Config, flat: dict) -> str:
    """Return what to do about arrays that are not this model's."""
    family, lora = family_of(flat), any("lora" in name for name in flat)
    if family == "unknown":
        return "these are not weights of Pi0 or Pi0.5: set model.weights to a checkpoint of one"
    if family != config.family:
        return f"these are weights of {family}: set model.variant to a {family} variant, or give weights of {config.family}"
    if lora != any("lora" in name for name in table(config)):
        variant = f"{family}_lora" if lora else family
        return f"these are weights of {family} with{'' if lora else 'out'} LoRA: set model.variant to {variant}"
    if family == "pi05" and ("state_proj/kernel" in flat) != config.continuous_state_token:
        return f"set model.continuous_state_token to {'false' if config.continuous_state_token else 'true'}"
    return "set model.overrides to the sizes of the file"


def _names(names: list[str]) -> str:
    more = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return f"{', '.join(names[:NAMES_SHOWN])}{more}"
