"""Turns Hugging Face safetensors of Pi0 and Pi0.5 into openpi's layout, and back.

    python -m demo2eval.pi0.convert --from-safetensors lerobot/pi05_base --output weights/pi05_base
    python -m demo2eval.pi0.convert --to-safetensors results/stackcube/checkpoints/30000 --output out/model.safetensors

Arrays are moved one at a time, so memory holds one copy of the weights. LoRA arrays have
no counterpart in the safetensors.
"""

import argparse
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo2eval.cli import run
from demo2eval.errors import UserError
from demo2eval.pi0.checkpoint import check_params, load_params, save_params
from demo2eval.pi0.config import Pi0Config
from demo2eval.pi0.parameters import flatten, unflatten

TOWER = "paligemma_with_expert.paligemma.model."
VISION = TOWER + "vision_tower.vision_model."
LANGUAGE = TOWER + "language_model."
EXPERT = "paligemma_with_expert.gemma_expert.model."
TIED_EMBEDDING = "paligemma_with_expert.paligemma.lm_head.weight"
DROPPED = ("paligemma_with_expert.gemma_expert.lm_head.weight", LANGUAGE + "embed_tokens.weight")


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
        yield Rule(f"{block}/MlpBlock_0/{ours}/kernel", layer(f"mlp.{theirs}.weight"), depth, _transposed, _transposed)
        yield Rule(f"{block}/MlpBlock_0/{ours}/bias", layer(f"mlp.{theirs}.bias"), depth, _same, _same)
    attention = f"{block}/MultiHeadDotProductAttention_0"
    split = lambda array: array.reshape(heads, -1)  # noqa: E731
    for ours, theirs in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        yield Rule(f"{attention}/{ours}/kernel", layer(f"self_attn.{theirs}.weight"), depth, *_vision_heads(heads))
        yield Rule(f"{attention}/{ours}/bias", layer(f"self_attn.{theirs}.bias"), depth, split, np.ravel)
    yield Rule(f"{attention}/out/kernel", layer("self_attn.out_proj.weight"), depth, *_heads_out(heads))
    yield Rule(f"{attention}/out/bias", layer("self_attn.out_proj.bias"), depth, _same, _same)
    yield Rule(f"{root}/Transformer/encoder_norm/scale", (VISION + "post_layernorm.weight",), None, _same, _same)
    yield Rule(f"{root}/Transformer/encoder_norm/bias", (VISION + "post_layernorm.bias",), None, _same, _same)
    yield from dense_rules(f"{root}/head", TOWER + "multi_modal_projector.linear")


def language_rules(root: str, suffix: str, depth: int, heads: int, kv_heads: int, adaptive: bool) -> Iterator[Rule]:
    """One language tower."""
    ours = "PaliGemma/llm/layers"
    layer = lambda *names: tuple(f"{root}layers.{index}.{name}" for index in range(depth) for name in names)  # noqa: E731
    query, key_value = "self_attn.q_proj.weight", ("self_attn.k_proj.weight", "self_attn.v_proj.weight")
    if heads == kv_heads:
        yield Rule(f"{ours}/attn/qkv_einsum{suffix}/w", layer(query, *key_value), depth, *_heads_in(heads), parts=3)
    else:
        yield Rule(f"{ours}/attn/q_einsum{suffix}/w", layer(query), depth, *_heads_in(heads))
        yield Rule(f"{ours}/attn/kv_einsum{suffix}/w", layer(*key_value), depth, *_heads_in(kv_heads), parts=2)
    yield Rule(f"{ours}/attn/attn_vec_einsum{suffix}/w", layer("self_attn.o_proj.weight"), depth, *_heads_out(heads))
    gates = layer("mlp.gate_proj.weight", "mlp.up_proj.weight")
    yield Rule(f"{ours}/mlp{suffix}/gating_einsum", gates, depth, _transposed, _transposed, parts=2)
    yield Rule(f"{ours}/mlp{suffix}/linear", layer("mlp.down_proj.weight"), depth, _transposed, _transposed)
    norms = (("pre_attention_norm", "input_layernorm"), ("pre_ffw_norm", "post_attention_layernorm"))
    for name, theirs in norms:
        if adaptive:
            yield Rule(f"{ours}/{name}{suffix}/Dense_0/kernel", layer(f"{theirs}.dense.weight"), depth, _transposed, _transposed)
            yield Rule(f"{ours}/{name}{suffix}/Dense_0/bias", layer(f"{theirs}.dense.bias"), depth, _same, _same)
        else:
            yield Rule(f"{ours}/{name}{suffix}/scale", layer(f"{theirs}.weight"), depth, _same, _same)
    if adaptive:
        yield from dense_rules(f"PaliGemma/llm/final_norm{suffix}/Dense_0", f"{root}norm.dense")
    else:
        yield Rule(f"PaliGemma/llm/final_norm{suffix}/scale", (f"{root}norm.weight",), None, _same, _same)


def rules_for(config: Pi0Config) -> list[Rule]:
    """Return the rule of every array of a model without LoRA."""
    language, expert = config.paligemma, config.action_expert
    projections = ["action_in_proj", "action_out_proj"]
    projections += (
        ["time_mlp_in", "time_mlp_out"] if config.is_pi05 else ["state_proj", "action_time_mlp_in", "action_time_mlp_out"]
    )
    return [
        *vision_rules(config.siglip.depth, config.siglip.num_heads),
        Rule("PaliGemma/llm/embedder/input_embedding", (TIED_EMBEDDING,), None, _same, _same),
        *language_rules(LANGUAGE, "", language.depth, language.num_heads, language.num_kv_heads, adaptive=False),
        *language_rules(EXPERT, "_1", expert.depth, expert.num_heads, expert.num_kv_heads, adaptive=config.is_pi05),
        *(rule for name in projections for rule in dense_rules(name, name)),
    ]


def open_safetensors(source: Path) -> tuple[dict[str, object], list]:
    """Return ({name without a leading "model.": file}, open files) of a safetensors file or of a folder of them.

    Raises:
        UserError: if there is none or one is damaged.
    """
    from safetensors import SafetensorError, safe_open

    source = Path(source)
    files = sorted(source.glob("*.safetensors")) if source.is_dir() else [source]
    if not files or not all(file.is_file() for file in files):
        raise UserError(
            f"{source} is neither an openpi checkpoint nor a file or folder of safetensors; set model.weights to one."
        )
    tensors, opened = {}, []
    for file in files:
        try:
            content = safe_open(file, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise UserError(f"{file} cannot be read ({error}): it is incomplete; copy it again.") from error
        opened.append(content)
        tensors |= {name.removeprefix("model."): (content, name) for name in content.keys()}  # noqa: SIM118
    return tensors, opened


def read_tree(source: Path, config: Pi0Config) -> dict[str, np.ndarray]:
    """Return a model's arrays, float32, by openpi's names, from safetensors.

    Raises:
        UserError: names the tensors that are missing, or arrays of another shape.
    """
    tensors, _ = open_safetensors(source)
    if TIED_EMBEDDING not in tensors and DROPPED[1] in tensors:
        tensors[TIED_EMBEDDING] = tensors[DROPPED[1]]
    rules = rules_for(config)
    missing = sorted({name for rule in rules for name in rule.sources} - tensors.keys())
    if missing:
        more = f" and {len(missing) - 12} more" if len(missing) > 12 else ""
        family = "pi05" if "time_mlp_in.weight" in tensors else "pi0"
        raise UserError(
            f"{source} lacks {', '.join(missing[:12])}{more}; it holds weights of {family}, and the run's model is {config.family}."
        )

    def part(rule: Rule, name: str) -> np.ndarray:
        content, stored = tensors[name]
        return rule.forward(np.asarray(content.get_tensor(stored), dtype=np.float32))

    flat = {}
    for rule in rules:
        if rule.stack is None:
            flat[rule.name] = np.ascontiguousarray(part(rule, rule.sources[0]))
            continue
        first = part(rule, rule.sources[0])
        array = np.empty((rule.stack, *((rule.parts,) if rule.parts > 1 else ()), *first.shape), np.float32)
        places = array.reshape(len(rule.sources), *first.shape)
        for index, name in enumerate(rule.sources):
            places[index] = part(rule, name)
        flat[rule.name] = array
    check_params(config, flat, Path(source))
    return flat


def from_huggingface(source: Path, folder: Path, config: Pi0Config) -> None:
    """Write the weights of safetensors as `folder`, the `params` of an openpi checkpoint."""
    save_params(folder, unflatten(read_tree(source, config)))


def to_huggingface(params: Path, file: Path, config: Pi0Config) -> None:
    """Write the weights of an openpi checkpoint's `params` as one safetensors file, with the names of published base files."""
    flat = flatten(load_params(params, config, np.float32))
    rules = rules_for(config)
    header, end = {}, 0
    for rule in rules:
        for name, part in zip(rule.sources, _parts(rule, flat[rule.name]), strict=True):
            shape = rule.backward(part).shape
            header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [end, end + part.nbytes]}
            end += part.nbytes
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_name(f".{file.name}.partial")
    with open(partial, "wb") as output:
        output.write(len(text).to_bytes(8, "little") + text)
        for rule in rules:
            for part in _parts(rule, flat.pop(rule.name)):
                output.write(np.ascontiguousarray(rule.backward(part), "<f4").data)
    partial.rename(file)


def _parts(rule: Rule, array: np.ndarray) -> np.ndarray:
    """Return the parts of an array, [number of sources, ...]."""
    if rule.stack is None:
        return array[None]
    return array.reshape(len(rule.sources), *array.shape[2 if rule.parts > 1 else 1 :])


def main() -> None:
    """Convert in one direction."""
    from demo2eval.pi0.config import make_config

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    direction = parser.add_mutually_exclusive_group(required=True)
    direction.add_argument("--from-safetensors", type=Path, help="file or folder to read")
    direction.add_argument("--to-safetensors", type=Path, help="checkpoint, a folder with params/, to read")
    parser.add_argument("--variant", default="pi05", help="pi05 or pi0 (default: pi05)")
    parser.add_argument("--output", type=Path, required=True, help="checkpoint folder or safetensors file to write")
    arguments = parser.parse_args()
    config = make_config(arguments.variant)
    if arguments.from_safetensors:
        from_huggingface(arguments.from_safetensors, arguments.output / "params", config)
    else:
        to_huggingface(arguments.to_safetensors / "params", arguments.output, config)


if __name__ == "__main__":
    run(main)
