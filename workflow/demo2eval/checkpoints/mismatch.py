"""What is wrong with weights that are not a model's: which arrays, what the weights are, and what to set."""

import json
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from demo2eval.errors import UserError
from demo2eval.pi0.config import Pi0Config
from demo2eval.pi0.params import table

# A Pi0 file for Pi0.5 is told in full; of dozens a few say enough.
NAMES_SHOWN, OF_DOZENS = 12, 4
Shapes = dict[str, tuple[int, ...]]


class HasShape(Protocol):
    """An array, or a description of one."""

    shape: tuple[int, ...]


def listed(names: Iterable[str]) -> str:
    """Return names as a list in words: layers of one array together, and of more than `NAMES_SHOWN` the first few."""
    layers: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"(?<=layers\.)\d+(?=\.)", name)
        pattern = re.sub(r"(?<=layers\.)\d+(?=\.)", "#", name, count=1)
        layers.setdefault(pattern, []).extend([int(number.group())] if number else [])
    told = [
        pattern.replace("#", _span(numbers), 1) if numbers else pattern
        for pattern, numbers in layers.items()
    ]
    if len(told) > NAMES_SHOWN:
        told = [*told[:OF_DOZENS], f"and {len(told) - OF_DOZENS} more"]
    return ", ".join(told).replace(", and ", " and ")


def _span(numbers: list[int]) -> str:
    first, last = min(numbers), max(numbers)
    if len(numbers) == 1:
        return str(first)
    return (
        f"{first}-{last}"
        if len(numbers) == last - first + 1
        else ",".join(map(str, sorted(numbers)))
    )


def family_of(names: Iterable[str]) -> str:
    """Return which family arrays of these names, openpi's or Hugging Face's, are of: "pi05", "pi0" or "unknown"."""
    names = set(names)
    if names & {"time_mlp_in/kernel", "time_mlp_in.weight"}:
        return "pi05"
    return (
        "pi0" if names & {"action_time_mlp_in/kernel", "action_time_mlp_in.weight"} else "unknown"
    )


def check_params(config: Pi0Config, flat: dict[str, HasShape], source: Path) -> None:
    """Compare arrays by openpi's names, or what else has their shapes, with a model's parameter table.

    Raises:
        UserError: as `check_arrays`.
    """
    found = {name: tuple(value.shape) for name, value in flat.items()}
    check_arrays(
        config,
        {name: shape for name, (shape, _) in table(config).items()},
        found,
        source,
        sizes_of(found),
    )


def check_arrays(
    config: Pi0Config, wanted: Shapes, found: Shapes, source: Path, sizes: dict[str, int]
) -> None:
    """Compare the shapes of arrays with those that a model needs.

    Args:
        wanted, found: name -> shape.
        sizes: what the arrays found say of the model they are of, by the keys of `model.overrides`.

    Raises:
        UserError: names the arrays that are missing, left over or misshapen, and says what the file is and what to set.
    """
    missing, extra = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    misshapen = sorted(
        name for name in wanted.keys() & found.keys() if tuple(found[name]) != tuple(wanted[name])
    )
    shapes = [f"{name} {list(found[name])} instead of {list(wanted[name])}" for name in misshapen]
    wrong = {"missing": missing, "left over": extra, "misshapen": shapes}
    told = [f"{what} {listed(names)}" for what, names in wrong.items() if names]
    if told:
        advice = _advice(config, found, sizes)
        raise UserError(
            f"{source} does not hold the weights of this {config.family} model: {'; '.join(told)}; {advice}."
        )


def _advice(config: Pi0Config, found: Shapes, sizes: dict[str, int]) -> str:
    family, lora = family_of(found), any("lora" in name for name in found)
    if family == "unknown":
        return "these are not weights of Pi0 or Pi0.5: set model.weights to a checkpoint of one"
    if family != config.family:
        return f"these are weights of {family}: set model.variant (--variant) to a {family} variant, or give weights of {config.family}"
    if lora != any("lora" in name for name in table(config)):
        kind = "with" if lora else "without"
        such = f"{family}_lora" if lora else family
        return f"these are weights of {family} {kind} LoRA: set model.variant (--variant) to one {kind} LoRA, such as {such}"
    other = {key: size for key, size in sizes.items() if _setting(config, key) not in (size, None)}
    if other:
        return f"these are weights of {family} in another size: set model.overrides (--model-overrides) to {json.dumps(other)}"
    token = "state_proj/kernel" in found
    if family == "pi05" and token != config.continuous_state_token:
        kind = f"with{'' if token else 'out'} a state token"
        return f"these are weights of pi05 {kind}: set model.continuous_state_token to {str(token).lower()}"
    return f"these are weights of {family}, but not all of them or not they alone: copy or make them again"


def _setting(config: Pi0Config, key: str) -> int | None:
    """Return the model's value of a key with dots, or None if it has no such part."""
    value = config
    for part in key.split("."):
        value = value and getattr(value, part)
    return value


def sizes_of(found: Shapes) -> dict[str, int]:
    """Return what shapes of arrays by openpi's names say of a model, {"paligemma.width": 2048, ...}."""
    llm, img = "PaliGemma/llm", "PaliGemma/img"
    block = f"{img}/Transformer/encoderblock"
    places = {
        "vocab_size": (f"{llm}/embedder/input_embedding", 0),
        "action_dim": ("action_in_proj/kernel", 0),
        "siglip.width": (f"{img}/embedding/kernel", 3),
        "siglip.depth": (f"{block}/LayerNorm_0/scale", 0),
        "siglip.mlp_dim": (f"{block}/MlpBlock_0/Dense_0/kernel", 2),
        "siglip.num_heads": (f"{block}/MultiHeadDotProductAttention_0/query/kernel", 2),
        "siglip.patch_size": (f"{img}/embedding/kernel", 0),
    }
    for tower, suffix in (("paligemma", ""), ("action_expert", "_1")):
        gates, out = (
            f"{llm}/layers/mlp{suffix}/gating_einsum",
            f"{llm}/layers/attn/attn_vec_einsum{suffix}/w",
        )
        places |= {
            f"{tower}.{key}": (gates, axis)
            for key, axis in (("depth", 0), ("width", 2), ("mlp_dim", 3))
        }
        places |= {
            f"{tower}.{key}": (out, axis) for key, axis in (("num_heads", 1), ("head_dim", 2))
        }
        ranks = {
            "attention_rank": f"{llm}/layers/attn/q_einsum{suffix}/lora_a",
            "feed_forward_rank": f"{gates}_lora_a",
        }
        places |= {f"{tower}.lora.{key}": (name, 3) for key, name in ranks.items()}
        # With as many heads of keys and values as of queries, the three lie in one array.
        joined, apart = (f"{llm}/layers/attn/{kind}_einsum{suffix}/w" for kind in ("qkv", "kv"))
        places[f"{tower}.num_kv_heads"] = (joined if joined in found else apart, 2)
    sizes = measured(places, found)
    if patches := measured({"side": (f"{img}/pos_embedding", 1)}, found):
        sizes["siglip.image_size"] = math.isqrt(patches["side"]) * sizes.get("siglip.patch_size", 0)
    return sizes


def measured(places: dict[str, tuple[str, int]], found: Shapes) -> dict[str, int]:
    """Return {key: length of an axis} for the arrays that are there; `places` says which axis of which array."""
    return {
        key: found[name][axis]
        for key, (name, axis) in places.items()
        if axis < len(found.get(name, ()))
    }
