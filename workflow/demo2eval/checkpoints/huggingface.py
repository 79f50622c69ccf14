"""Turns Hugging Face safetensors of Pi0 and Pi0.5 into openpi's layout, and back.

    demo2eval convert --from-safetensors lerobot/pi05_base --output weights/pi05_base
    demo2eval convert --to-safetensors results/stackcube/checkpoints/30000 \\
        --output out/model.safetensors

Values keep the type that they are stored in, unless --dtype says otherwise, so that there and back
gives the same bits. Memory stays below 1.3 copies of the weights: from safetensors, arrays are read
and written one at a time; to safetensors, all tensors are written at once. LoRA arrays have no form
in safetensors.
"""

import argparse
import json
import math
from pathlib import Path

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from demo2eval.checkpoints.huggingface_layout import (
    EMBEDDING,
    EXPERT_HEAD,
    TIED_EMBEDDING,
    Rule,
    huggingface_shapes,
    huggingface_sizes,
    make_rules,
)
from demo2eval.checkpoints.mismatch import check_shapes
from demo2eval.checkpoints.openpi import LazyArray, open_params, save_lazy_params
from demo2eval.checkpoints.policy_metadata import read_policy_metadata
from demo2eval.checkpoints.safetensors_files import open_tensors
from demo2eval.cli import report_errors
from demo2eval.errors import UserError
from demo2eval.pi0.config import Pi0Config, make_config
from demo2eval.pi0.params import param_table

FLOAT32 = np.dtype(np.float32)
DTYPES = {"stored": None, "float32": FLOAT32, "bfloat16": np.dtype(ml_dtypes.bfloat16)}


def from_huggingface(
    source: Path, folder: Path, config: Pi0Config, dtype: np.dtype | None = FLOAT32
) -> None:
    """Write the weights of safetensors as `folder`, the `params` of an openpi checkpoint.

    Args:
        source: a file, an index or a folder.
        dtype: of the arrays; None for the types in which they are stored.

    Raises:
        UserError: as `open_huggingface`, or if `folder` exists.
    """
    save_lazy_params(folder, open_huggingface(source, config, dtype))


def open_huggingface(
    source: Path, config: Pi0Config, dtype: np.dtype | None = None
) -> dict[str, LazyArray]:
    """Return a model's arrays by openpi's names, none of them read yet, from safetensors.

    Args:
        source: a file, an index or a folder.
        dtype: of the arrays; None for the types in which they are stored.

    Raises:
        UserError: names files that are missing or damaged, and arrays that are missing, unexpected
            or of another shape.
    """
    tensors = drop_duplicates(open_tensors(source), source)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    check_shapes(config, huggingface_shapes(config), found, source, huggingface_sizes(found))
    shapes = {name: shape for name, (shape, _) in param_table(config).items()}
    return {
        rule.name: _stack(rule, shapes[rule.name], [tensors[name] for name in rule.tensors], dtype)
        for rule in make_rules(config)
    }


def drop_duplicates(tensors: dict[str, LazyArray], source: Path) -> dict[str, LazyArray]:
    """Return the tensors without the expert's unused head, and with the token embedding once.

    The embedding keeps the name of PaliGemma's head.

    Raises:
        UserError: if there are two embeddings that differ.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if name != EXPERT_HEAD}
    embedding = tensors.pop(EMBEDDING, None)
    if embedding is None:
        return tensors
    head = tensors.setdefault(TIED_EMBEDDING, embedding)
    same = head is embedding or (
        head.shape == embedding.shape and np.array_equal(head.read(), embedding.read())
    )
    if not same:
        raise UserError(
            f"{source} holds a {TIED_EMBEDDING} that is not {EMBEDDING}; "
            "in Pi0 and Pi0.5 they are one array."
        )
    return tensors


def _stack(
    rule: Rule, shape: tuple[int, ...], tensors: list[LazyArray], dtype: np.dtype | None
) -> LazyArray:
    """Return the array of `shape` that a rule makes of its tensors."""
    if dtype is None:
        # The tensors of an array that differ in type are kept in one that holds both.
        dtype = np.result_type(*{tensor.dtype for tensor in tensors})

    def read() -> np.ndarray:
        array = np.empty(shape, dtype)
        parts = array.reshape(len(tensors), *shape[rule.stack_axes :])
        for part, tensor in zip(parts, tensors, strict=True):
            part[...] = rule.layout.to_openpi(tensor.read())
        return array

    return LazyArray(shape, dtype, read)


def to_huggingface(
    params: Path, file: Path, config: Pi0Config, dtype: np.dtype | None = None
) -> None:
    """Write the weights of an openpi checkpoint's `params` as one safetensors file.

    The tensors' names are those of published base files. LeRobot's policies load the file.

    Args:
        dtype: of the tensors; None for the types in which the arrays are stored.

    Raises:
        UserError: if the weights cannot be read or are of another model, or if `file` exists.
    """
    if file.exists():
        raise UserError(f"{file} exists; remove it or give another output.")
    huggingface_shapes(config)  # refuses models that have no form in safetensors
    arrays, tensors = open_params(params, config), {}
    # The largest first: while it is turned it is in memory twice, and the others not yet.
    for rule in sorted(make_rules(config), key=lambda rule: -math.prod(arrays[rule.name].shape)):
        tensors |= _split(rule, arrays[rule.name].read(), dtype)
    head_shape = (config.vocab_size, config.action_expert.width)
    tensors[EXPERT_HEAD] = np.zeros(head_shape, tensors[TIED_EMBEDDING].dtype)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    save_file(tensors, partial)
    partial.rename(file)


def _split(rule: Rule, array: np.ndarray, dtype: np.dtype | None) -> dict[str, np.ndarray]:
    """Return {name: tensor} of the tensors that an array is made of."""
    parts = array.reshape(len(rule.tensors), *array.shape[rule.stack_axes :])
    # safetensors writes memory as it lies, so each must be contiguous.
    return {
        name: np.ascontiguousarray(rule.layout.to_huggingface(part), dtype)
        for name, part in zip(rule.tensors, parts, strict=True)
    }


def find_config(checkpoint: Path | None, variant: str | None, overrides: dict) -> Pi0Config:
    """Return the model that the options name, or else the one that the checkpoint names."""
    if checkpoint is not None and variant is None and any(checkpoint.glob("assets/**/policy.json")):
        return read_policy_metadata(checkpoint).config
    return make_config(variant or "pi05", **overrides)


def _json_object(text: str) -> dict:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise argparse.ArgumentTypeError(f"expected a JSON object, got {text!r}") from error


def main() -> None:
    """Convert in one direction."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from-safetensors", type=Path, help="file, index or folder to read")
    direction.add_argument(
        "--to-safetensors", type=Path, help="checkpoint, a folder with params/, to read"
    )
    parser.add_argument(
        "--variant",
        help="model variant, such as pi0 (default: what the checkpoint says it is, or pi05)",
    )
    parser.add_argument(
        "--model-overrides",
        type=_json_object,
        default={},
        help="fields of Pi0Config that differ, as JSON",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="stored",
        help="type of the values written (default: stored)",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="checkpoint folder or safetensors file to write"
    )
    arguments = parser.parse_args()
    config = find_config(arguments.to_safetensors, arguments.variant, arguments.model_overrides)
    dtype = DTYPES[arguments.dtype]
    if arguments.from_safetensors:
        from_huggingface(arguments.from_safetensors, arguments.output / "params", config, dtype)
    else:
        to_huggingface(arguments.to_safetensors / "params", arguments.output, config, dtype)


if __name__ == "__main__":
    with report_errors():
        main()
