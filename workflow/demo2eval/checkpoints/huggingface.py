"""Turns Hugging Face safetensors of Pi0 and Pi0.5 into openpi's layout, and back.

    python -m demo2eval.checkpoints.huggingface --from-safetensors lerobot/pi05_base --output weights/pi05_base
    python -m demo2eval.checkpoints.huggingface --to-safetensors results/stackcube/checkpoints/30000 --output out/model.safetensors

Values keep the type that they are stored in, unless --dtype says otherwise, so that there and back gives the same bits. Arrays are
read, turned and written one at a time: memory holds the largest about three times, below one copy of the weights of a full-size
model. LoRA arrays have no counterpart in safetensors.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from demo2eval.checkpoints.mismatch import Shapes, check_arrays, measured
from demo2eval.checkpoints.openpi import LazyArray, open_params, save_lazily
from demo2eval.checkpoints.safetensors_files import StoredTensor, open_tensors, write_tensors
from demo2eval.cli import run
from demo2eval.errors import UserError
from demo2eval.pi0.config import Pi0Config, make_config
from demo2eval.pi0.params import table

TOWER = "paligemma_with_expert.paligemma.model."
VISION = TOWER + "vision_tower.vision_model."
LANGUAGE = TOWER + "language_model."
EXPERT = "paligemma_with_expert.gemma_expert.model."
TIED_EMBEDDING = "paligemma_with_expert.paligemma.lm_head.weight"
EMBEDDING = LANGUAGE + "embed_tokens.weight"
# LeRobot's policies own it and never use it.
EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"
FLOAT32 = np.dtype(np.float32)
DTYPES = {"stored": None, "float32": FLOAT32, "bfloat16": np.dtype(ml_dtypes.bfloat16)}


@dataclass(frozen=True)
class Rule:
    """One array of openpi's tree and the tensors that it is made of.

    Attributes:
        name: openpi's name.
        sources: Hugging Face names, in order; those of each layer one after the other.
        stack: number of layers, or None for an array that is not stacked.
        forward: one tensor -> one part.
        backward: the inverse.
        parts: tensors a layer; several are joined along a new axis behind that of the layers.
    """

    name: str
    sources: tuple[str, ...]
    stack: int | None
    forward: Callable[[np.ndarray], np.ndarray]
    backward: Callable[[np.ndarray], np.ndarray]
    parts: int = 1


def _same(array: np.ndarray) -> np.ndarray:
    return array


def _transposed(array: np.ndarray) -> np.ndarray:
    return array.T


def _heads_in(heads: int) -> tuple[Callable, Callable]:
    """[heads * k, d] <-> [heads, d, k], the projections of the language towers."""
    return (
        lambda array: array.reshape(heads, -1, array.shape[-1]).transpose(0, 2, 1),
        lambda array: array.transpose(0, 2, 1).reshape(-1, array.shape[1]),
    )


def _heads_out(heads: int) -> tuple[Callable, Callable]:
    """[d, heads * k] <-> [heads, k, d], the output of attention."""
    return (
        lambda array: array.T.reshape(heads, -1, array.shape[0]),
        lambda array: array.reshape(-1, array.shape[-1]).T,
    )


def _vision_heads(heads: int) -> tuple[Callable, Callable]:
    """[heads * k, d] <-> [d, heads, k], the projections of the vision tower."""
    return (
        lambda array: array.T.reshape(array.shape[1], heads, -1),
        lambda array: array.reshape(array.shape[0], -1).T,
    )


def dense_rules(name: str, source: str) -> Iterator[Rule]:
    """A Dense layer."""
    yield Rule(f"{name}/kernel", (f"{source}.weight",), None, _transposed, _transposed)
    yield Rule(f"{name}/bias", (f"{source}.bias",), None, _same, _same)


def vision_rules(depth: int, heads: int) -> Iterator[Rule]:
    """SigLIP and the projection behind it."""
    root, block = "PaliGemma/img", "PaliGemma/img/Transformer/encoderblock"
    embeddings = VISION + "embeddings."
    yield Rule(
        f"{root}/embedding/kernel",
        (embeddings + "patch_embedding.weight",),
        None,
        lambda array: array.transpose(2, 3, 1, 0),
        lambda array: array.transpose(3, 2, 0, 1),
    )
    yield Rule(f"{root}/embedding/bias", (embeddings + "patch_embedding.bias",), None, _same, _same)
    yield Rule(
        f"{root}/pos_embedding",
        (embeddings + "position_embedding.weight",),
        None,
        lambda array: array[None],
        lambda array: array[0],
    )
    layer = lambda name: tuple(f"{VISION}encoder.layers.{index}.{name}" for index in range(depth))  # noqa: E731
    for ours, theirs in (("LayerNorm_0", "layer_norm1"), ("LayerNorm_1", "layer_norm2")):
        yield Rule(f"{block}/{ours}/scale", layer(f"{theirs}.weight"), depth, _same, _same)
        yield Rule(f"{block}/{ours}/bias", layer(f"{theirs}.bias"), depth, _same, _same)
    for ours, theirs in (("Dense_0", "fc1"), ("Dense_1", "fc2")):
        yield Rule(
            f"{block}/MlpBlock_0/{ours}/kernel",
            layer(f"mlp.{theirs}.weight"),
            depth,
            _transposed,
            _transposed,
        )
        yield Rule(
            f"{block}/MlpBlock_0/{ours}/bias", layer(f"mlp.{theirs}.bias"), depth, _same, _same
        )
    attention = f"{block}/MultiHeadDotProductAttention_0"
    split = lambda array: array.reshape(heads, -1)  # noqa: E731
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        yield Rule(
            f"{attention}/{ours}/kernel",
            layer(f"self_attn.{theirs}.weight"),
            depth,
            *_vision_heads(heads),
        )
        yield Rule(
            f"{attention}/{ours}/bias", layer(f"self_attn.{theirs}.bias"), depth, split, np.ravel
        )
    yield Rule(
        f"{attention}/out/kernel", layer("self_attn.out_proj.weight"), depth, *_heads_out(heads)
    )
    yield Rule(f"{attention}/out/bias", layer("self_attn.out_proj.bias"), depth, _same, _same)
    yield Rule(
        f"{root}/Transformer/encoder_norm/scale",
        (VISION + "post_layernorm.weight",),
        None,
        _same,
        _same,
    )
    yield Rule(
        f"{root}/Transformer/encoder_norm/bias",
        (VISION + "post_layernorm.bias",),
        None,
        _same,
        _same,
    )
    yield from dense_rules(f"{root}/head", TOWER + "multi_modal_projector.linear")


def language_rules(
    root: str, suffix: str, depth: int, heads: int, kv_heads: int, adaptive: bool
) -> Iterator[Rule]:
    """One language tower."""
    ours = "PaliGemma/llm/layers"
    layer = lambda *names: tuple(
        f"{root}layers.{index}.{name}" for index in range(depth) for name in names
    )  # noqa: E731
    query, key_value = (
        "self_attn.q_proj.weight",
        ("self_attn.k_proj.weight", "self_attn.v_proj.weight"),
    )
    if heads == kv_heads:
        yield Rule(
            f"{ours}/attn/qkv_einsum{suffix}/w",
            layer(query, *key_value),
            depth,
            *_heads_in(heads),
            parts=3,
        )
    else:
        yield Rule(f"{ours}/attn/q_einsum{suffix}/w", layer(query), depth, *_heads_in(heads))
        yield Rule(
            f"{ours}/attn/kv_einsum{suffix}/w",
            layer(*key_value),
            depth,
            *_heads_in(kv_heads),
            parts=2,
        )
    yield Rule(
        f"{ours}/attn/attn_vec_einsum{suffix}/w",
        layer("self_attn.o_proj.weight"),
        depth,
        *_heads_out(heads),
    )
    gates = layer("mlp.gate_proj.weight", "mlp.up_proj.weight")
    yield Rule(f"{ours}/mlp{suffix}/gating_einsum", gates, depth, _transposed, _transposed, parts=2)
    yield Rule(
        f"{ours}/mlp{suffix}/linear", layer("mlp.down_proj.weight"), depth, _transposed, _transposed
    )
    norms = (
        ("pre_attention_norm", "input_layernorm"),
        ("pre_ffw_norm", "post_attention_layernorm"),
    )
    for name, theirs in norms:
        if adaptive:
            yield Rule(
                f"{ours}/{name}{suffix}/Dense_0/kernel",
                layer(f"{theirs}.dense.weight"),
                depth,
                _transposed,
                _transposed,
            )
            yield Rule(
                f"{ours}/{name}{suffix}/Dense_0/bias",
                layer(f"{theirs}.dense.bias"),
                depth,
                _same,
                _same,
            )
        else:
            yield Rule(
                f"{ours}/{name}{suffix}/scale", layer(f"{theirs}.weight"), depth, _same, _same
            )
    if adaptive:
        yield from dense_rules(f"PaliGemma/llm/final_norm{suffix}/Dense_0", f"{root}norm.dense")
    else:
        yield Rule(
            f"PaliGemma/llm/final_norm{suffix}/scale", (f"{root}norm.weight",), None, _same, _same
        )


def rules_for(config: Pi0Config) -> list[Rule]:
    """Return the rule of every array of a model without LoRA."""
    language, expert = config.paligemma, config.action_expert
    projections = ["action_in_proj", "action_out_proj"]
    projections += (
        ["time_mlp_in", "time_mlp_out"]
        if config.is_pi05
        else ["state_proj", "action_time_mlp_in", "action_time_mlp_out"]
    )
    return [
        *vision_rules(config.siglip.depth, config.siglip.num_heads),
        Rule("PaliGemma/llm/embedder/input_embedding", (TIED_EMBEDDING,), None, _same, _same),
        *language_rules(
            LANGUAGE, "", language.depth, language.num_heads, language.num_kv_heads, adaptive=False
        ),
        *language_rules(
            EXPERT,
            "_1",
            expert.depth,
            expert.num_heads,
            expert.num_kv_heads,
            adaptive=config.is_pi05,
        ),
        *(rule for name in projections for rule in dense_rules(name, name)),
    ]


def part_shape(rule: Rule, shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the shape of one tensor's share of an array of `shape`."""
    if rule.stack is None:
        return shape
    return shape[2 if rule.parts > 1 else 1 :]


def huggingface_shapes(config: Pi0Config) -> Shapes:
    """Return the shape of every tensor that a model is made of.

    Raises:
        UserError: if the model has arrays for which there is none.
    """
    shapes, rules = {name: shape for name, (shape, _) in table(config).items()}, rules_for(config)
    if own := shapes.keys() - {rule.name for rule in rules}:
        kind = "LoRA arrays" if any("lora" in name for name in own) else "a continuous state token"
        raise UserError(
            f"a model with {kind} has no form in safetensors; train without, or keep openpi's layout."
        )
    wanted = {}
    for rule in rules:
        shape = rule.backward(np.empty(part_shape(rule, shapes[rule.name]), np.int8)).shape
        wanted |= dict.fromkeys(rule.sources, shape)
    return wanted


def huggingface_sizes(found: Shapes) -> dict[str, int]:
    """Return what shapes of tensors say of a model, {"paligemma.width": 2048, ...}; heads cannot be told from them."""
    layer = "layers.0."
    places = {
        "vocab_size": (TIED_EMBEDDING, 0),
        "action_dim": ("action_in_proj.weight", 1),
        "paligemma.width": (TIED_EMBEDDING, 1),
        "paligemma.mlp_dim": (f"{LANGUAGE}{layer}mlp.gate_proj.weight", 0),
        "action_expert.width": ("action_in_proj.weight", 0),
        "action_expert.mlp_dim": (f"{EXPERT}{layer}mlp.gate_proj.weight", 0),
        "siglip.width": (f"{VISION}embeddings.patch_embedding.weight", 0),
        "siglip.patch_size": (f"{VISION}embeddings.patch_embedding.weight", 2),
        "siglip.mlp_dim": (f"{VISION}encoder.{layer}mlp.fc1.bias", 0),
    }
    sizes = measured(places, found)
    for key, prefix in (
        ("paligemma", LANGUAGE),
        ("action_expert", EXPERT),
        ("siglip", f"{VISION}encoder."),
    ):
        prefix = f"{prefix}layers."
        if layers := {
            name.removeprefix(prefix).split(".")[0] for name in found if name.startswith(prefix)
        }:
            sizes[f"{key}.depth"] = len(layers)
    return sizes


def without_copies(tensors: dict[str, StoredTensor], source: Path) -> dict[str, StoredTensor]:
    """Return the tensors with the token embedding once, by the name of PaliGemma's head, and without the expert's unused head.

    Raises:
        UserError: if there are two embeddings that differ.
    """
    tensors = {name: tensor for name, tensor in tensors.items() if name != EXPERT_HEAD}
    embedding = tensors.pop(EMBEDDING, None)
    if embedding is None:
        return tensors
    head = tensors.setdefault(TIED_EMBEDDING, embedding)
    if head is not embedding and not (
        head.shape == embedding.shape and np.array_equal(head.read(), embedding.read())
    ):
        raise UserError(
            f"{source} holds a {TIED_EMBEDDING} that is not {EMBEDDING}; in Pi0 and Pi0.5 they are one array."
        )
    return tensors


def open_huggingface(
    source: Path, config: Pi0Config, dtype: np.dtype | None = None
) -> dict[str, LazyArray]:
    """Return a model's arrays by openpi's names, none of them read yet, from safetensors.

    Args:
        source: a file, an index or a folder.
        dtype: of the arrays; None for the types in which they are stored.

    Raises:
        UserError: names files that are missing or damaged, and arrays that are missing, left over or misshapen.
    """
    tensors = without_copies(open_tensors(source), source)
    found = {name: tensor.shape for name, tensor in tensors.items()}
    check_arrays(config, huggingface_shapes(config), found, source, huggingface_sizes(found))
    shapes = table(config)
    return {
        rule.name: _joined(
            rule, shapes[rule.name][0], [tensors[name] for name in rule.sources], dtype
        )
        for rule in rules_for(config)
    }


def _joined(
    rule: Rule, shape: tuple[int, ...], tensors: list[StoredTensor], dtype: np.dtype | None
) -> LazyArray:
    """Return the array of `shape` that a rule makes of its tensors."""
    if dtype is None:
        # The tensors of an array that differ in type are kept in one that holds both.
        dtype = np.result_type(*{tensor.dtype for tensor in tensors})

    def read() -> np.ndarray:
        if rule.stack is None:
            return np.ascontiguousarray(rule.forward(tensors[0].read()), dtype)
        array = np.empty(shape, dtype)
        for place, tensor in zip(
            array.reshape(len(tensors), *part_shape(rule, shape)), tensors, strict=True
        ):
            place[...] = rule.forward(tensor.read())
        return array

    return LazyArray(shape, dtype, read)


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
    save_lazily(folder, open_huggingface(source, config, dtype))


def to_huggingface(
    params: Path, file: Path, config: Pi0Config, dtype: np.dtype | None = None
) -> None:
    """Write the weights of an openpi checkpoint's `params` as one safetensors file, with the names of published base files.

    Args:
        dtype: of the tensors; None for the types in which the arrays are stored.

    Raises:
        UserError: if the weights cannot be read or are of another model, or if `file` exists.
    """
    shapes = huggingface_shapes(config)
    arrays, rules = open_params(params, config), rules_for(config)
    dtypes = {name: dtype or arrays[rule.name].dtype for rule in rules for name in rule.sources}
    described = {name: (dtypes[name], shape) for name, shape in shapes.items()}
    head = (dtypes[TIED_EMBEDDING], (config.vocab_size, config.action_expert.width))

    def values() -> Iterator[np.ndarray]:
        for rule in rules:
            array = arrays[rule.name].read()
            for part in array.reshape(len(rule.sources), *part_shape(rule, array.shape)):
                yield rule.backward(part)
            del array, part  # before the next is read
        yield np.zeros(head[1], head[0])

    write_tensors(file, {**described, EXPERT_HEAD: head}, values())


def config_of(checkpoint: Path | None, variant: str | None, overrides: dict) -> Pi0Config:
    """Return the model that the options name, or else the one that a checkpoint of demo2eval says it is."""
    if checkpoint is not None and variant is None and any(checkpoint.glob("assets/**/policy.json")):
        from demo2eval.checkpoints.policy_metadata import read_description

        return read_description(checkpoint).config
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
    config = config_of(arguments.to_safetensors, arguments.variant, arguments.model_overrides)
    dtype = DTYPES[arguments.dtype]
    if arguments.from_safetensors:
        from_huggingface(arguments.from_safetensors, arguments.output / "params", config, dtype)
    else:
        to_huggingface(arguments.to_safetensors / "params", arguments.output, config, dtype)


if __name__ == "__main__":
    run(main)
