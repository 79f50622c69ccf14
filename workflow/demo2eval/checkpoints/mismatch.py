"""Weights that are not a model's: which arrays differ, what the weights are, and what to set."""

import json
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from demo2eval.errors import UserError
from demo2eval.pi0.config import Pi0Config
from demo2eval.pi0.params import param_table

# All arrays in which Pi0 and Pi0.5 differ are named; of dozens a few say enough.
MAX_NAMES, FEW_NAMES = 12, 4
LAYER = re.compile(r"(?<=layers\.)\d+(?=\.)")
Shapes = Mapping[str, tuple[int, ...]]


class HasShape(Protocol):
    """An array, or what stands for one."""

    @property
    def shape(self) -> tuple[int, ...]: ...


def check_params(config: Pi0Config, flat: Mapping[str, HasShape], source: Path) -> None:
    """Compare arrays by openpi's names, or what else has their shapes, with a model's parameters.

    Raises:
        UserError: as `check_shapes`.
    """
    expected = {name: shape for name, (shape, _) in param_table(config).items()}
    found = {name: tuple(value.shape) for name, value in flat.items()}
    check_shapes(config, expected, found, source, openpi_sizes(found))


def check_shapes(
    config: Pi0Config, expected: Shapes, found: Shapes, source: Path, sizes: dict[str, int]
) -> None:
    """Compare the shapes of arrays with those that a model needs.

    Args:
        expected, found: name -> shape.
        sizes: what the arrays found say of their model, by the keys of `model.overrides`.

    Raises:
        UserError: names the arrays that are missing, unexpected or of another shape, and says what
            the file is and what to set.
    """
    different = sorted(
        name for name in expected.keys() & found.keys() if found[name] != expected[name]
    )
    differences = {
        "missing": sorted(expected.keys() - found.keys()),
        "unexpected": sorted(found.keys() - expected.keys()),
        "shape mismatch": [
            f"{name} {list(found[name])} instead of {list(expected[name])}" for name in different
        ],
    }
    problems = [f"{kind} {join_names(names)}" for kind, names in differences.items() if names]
    if problems:
        raise UserError(
            f"{source} does not hold the weights of this {config.family} model: "
            f"{'; '.join(problems)}; {_advise(config, found, sizes)}."
        )


def join_names(names: Iterable[str]) -> str:
    """Return a list in words: the layers of an array together, and only the first few of dozens."""
    layers: dict[str, list[int]] = {}
    for name in names:
        number = LAYER.search(name)
        pattern = LAYER.sub("#", name, count=1)
        layers.setdefault(pattern, []).extend([int(number.group())] if number else [])
    joined = [
        pattern.replace("#", _format_layers(numbers), 1) if numbers else pattern
        for pattern, numbers in layers.items()
    ]
    if len(joined) > MAX_NAMES:
        return f"{', '.join(joined[:FEW_NAMES])} and {len(joined) - FEW_NAMES} more"
    return ", ".join(joined)


def _format_layers(numbers: list[int]) -> str:
    first, last = min(numbers), max(numbers)
    if len(numbers) == 1:
        return str(first)
    if len(numbers) == last - first + 1:
        return f"{first}-{last}"
    return ",".join(map(str, sorted(numbers)))


def detect_family(names: Iterable[str]) -> str:
    """Return the family of arrays by their names: "pi05", "pi0" or "unknown".

    Args:
        names: openpi's or Hugging Face's.
    """
    names = set(names)
    if names & {"time_mlp_in/kernel", "time_mlp_in.weight"}:
        return "pi05"
    pi0_names = {"action_time_mlp_in/kernel", "action_time_mlp_in.weight"}
    return "pi0" if names & pi0_names else "unknown"


def _advise(config: Pi0Config, found: Shapes, sizes: dict[str, int]) -> str:
    family, lora = detect_family(found), any("lora" in name for name in found)
    if family == "unknown":
        return "these are not weights of Pi0 or Pi0.5: set model.weights to a checkpoint of one"
    if family != config.family:
        return (
            f"these are weights of {family}: set model.variant (--variant) to a {family} variant, "
            f"or give weights of {config.family}"
        )
    if lora != any("lora" in name for name in param_table(config)):
        kind, variant = ("with", f"{family}_lora") if lora else ("without", family)
        return (
            f"these are weights of {family} {kind} LoRA: set model.variant (--variant) to one "
            f"{kind} LoRA, such as {variant}"
        )
    overrides = {key: size for key, size in sizes.items() if _get(config, key) not in (size, None)}
    if overrides:
        return (
            f"these are weights of {family} in another size: set model.overrides "
            f"(--model-overrides) to {json.dumps(overrides)}"
        )
    state_token = "state_proj/kernel" in found
    if family == "pi05" and state_token != config.continuous_state_token:
        kind = "with" if state_token else "without"
        return (
            f"these are weights of pi05 {kind} a state token: set model.continuous_state_token to "
            f"{str(state_token).lower()}"
        )
    return (
        f"these are weights of {family}, but not all of them or not they alone: "
        "copy or make them again"
    )


def _get(config: Pi0Config, key: str) -> int | None:
    """Return the model's value of a key with dots, or None if the model has no such module."""
    value: Any = config
    for field in key.split("."):
        value = value and getattr(value, field)
    return value


def openpi_sizes(found: Shapes) -> dict[str, int]:
    """Return what the shapes of openpi's arrays say of a model, {"paligemma.width": 2048, ...}."""
    llm, img = "PaliGemma/llm", "PaliGemma/img"
    block = f"{img}/Transformer/encoderblock"
    axes = {
        "vocab_size": (f"{llm}/embedder/input_embedding", 0),
        "action_dim": ("action_in_proj/kernel", 0),
        "siglip.width": (f"{img}/embedding/kernel", 3),
        "siglip.depth": (f"{block}/LayerNorm_0/scale", 0),
        "siglip.mlp_dim": (f"{block}/MlpBlock_0/Dense_0/kernel", 2),
        "siglip.num_heads": (f"{block}/MultiHeadDotProductAttention_0/query/kernel", 2),
        "siglip.patch_size": (f"{img}/embedding/kernel", 0),
    }
    for expert, suffix in (("paligemma", ""), ("action_expert", "_1")):
        gates = f"{llm}/layers/mlp{suffix}/gating_einsum"
        attention = {
            name: f"{llm}/layers/attn/{name}_einsum{suffix}"
            for name in ("qkv", "q", "kv", "attn_vec")
        }
        # With as many heads of keys and values as of queries, the three lie in one array.
        kv = attention["qkv" if f"{attention['qkv']}/w" in found else "kv"]
        axes |= {
            f"{expert}.depth": (gates, 0),
            f"{expert}.width": (gates, 2),
            f"{expert}.mlp_dim": (gates, 3),
            f"{expert}.num_heads": (f"{attention['attn_vec']}/w", 1),
            f"{expert}.head_dim": (f"{attention['attn_vec']}/w", 2),
            f"{expert}.lora.attention_rank": (f"{attention['q']}/lora_a", 3),
            f"{expert}.lora.feed_forward_rank": (f"{gates}_lora_a", 3),
            f"{expert}.num_kv_heads": (f"{kv}/w", 2),
        }
    sizes = read_sizes(axes, found)
    if patches := read_sizes({"count": (f"{img}/pos_embedding", 1)}, found):
        side = math.isqrt(patches["count"])
        sizes["siglip.image_size"] = side * sizes.get("siglip.patch_size", 0)
    return sizes


def read_sizes(axes: Mapping[str, tuple[str, int]], found: Shapes) -> dict[str, int]:
    """Return {key: length of an axis} for the arrays that are there.

    Args:
        axes: key -> (name of an array, axis).
    """
    return {
        key: found[name][axis]
        for key, (name, axis) in axes.items()
        if axis < len(found.get(name, ()))
    }
