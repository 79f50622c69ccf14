"""Sizes and switches of Pi0 and Pi0.5: one configuration class for both families and every size."""

import dataclasses
import difflib
from dataclasses import dataclass
from typing import Any

from pydantic import TypeAdapter, ValidationError

from demo2eval.errors import UserError


@dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters of one expert, for its attention and its feed-forward matrices."""

    attention_rank: int
    attention_alpha: float
    feed_forward_rank: int
    feed_forward_alpha: float


@dataclass(frozen=True)
class GemmaConfig:
    """One expert: PaliGemma's language model (Gemma), or the action expert that attends with it."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    lora: LoraConfig | None = None

    @property
    def layer_size(self) -> int:
        """Values in the matrices of a layer, without LoRA."""
        attention = 2 * (self.num_heads + self.num_kv_heads) * self.head_dim
        return self.width * (attention + 3 * self.mlp_dim)


@dataclass(frozen=True)
class SiglipConfig:
    """The vision encoder: SigLIP's ViT without a pooling head."""

    width: int
    depth: int
    mlp_dim: int
    num_heads: int
    patch_size: int = 14
    image_size: int = 224

    @property
    def num_patches(self) -> int:
        """Patches of one image, which are its tokens."""
        return (self.image_size // self.patch_size) ** 2

    @property
    def layer_size(self) -> int:
        """Values in the matrices of a layer."""
        return self.width * (4 * self.width + 2 * self.mlp_dim)


@dataclass(frozen=True)
class Pi0Config:
    """A whole model.

    Attributes:
        family: "pi05" or "pi0".
        paligemma: the expert that reads images and prompt.
        action_expert: the expert that reads noisy actions; same depth and heads as `paligemma`.
        siglip: the vision encoder.
        action_dim: dim of the model's state and actions; shorter ones are padded.
        action_horizon: actions in a chunk.
        max_token_len: length to which prompts are padded.
        dtype: of the computation; parameters are float32 for training.
        discrete_state_input: the state is written into the prompt (Pi0.5).
        continuous_state_token: the state is one more prefix token (Pi0.5). It is for small models
            that are trained from scratch; openpi has no such switch.
        remat: what the backward pass computes again to save memory: "none"; "elementwise", all but
            the outputs of matrix products and attention; "vision", and of the vision encoder
            everything; or "all".
    """

    family: str
    paligemma: GemmaConfig
    action_expert: GemmaConfig
    siglip: SiglipConfig
    vocab_size: int = 257_152
    action_dim: int = 32
    action_horizon: int = 50
    max_token_len: int = 200
    dtype: str = "bfloat16"
    discrete_state_input: bool = True
    continuous_state_token: bool = False
    remat: str = "all"

    @property
    def is_pi05(self) -> bool:
        """Whether time conditions the expert's norms (Pi0.5), or is mixed into its tokens (Pi0)."""
        return self.family == "pi05"


GEMMA_2B = GemmaConfig(
    width=2048, depth=18, mlp_dim=16_384, num_heads=8, num_kv_heads=1, head_dim=256
)
GEMMA_300M = GemmaConfig(
    width=1024, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=256
)
SO400M = SiglipConfig(width=1152, depth=27, mlp_dim=4304, num_heads=16)
PI05 = Pi0Config("pi05", GEMMA_2B, GEMMA_300M, SO400M)
PI0 = Pi0Config("pi0", GEMMA_2B, GEMMA_300M, SO400M, max_token_len=48, discrete_state_input=False)
LORA = {
    "paligemma": dataclasses.replace(GEMMA_2B, lora=LoraConfig(16, 16.0, 16, 16.0)),
    "action_expert": dataclasses.replace(GEMMA_300M, lora=LoraConfig(32, 32.0, 32, 32.0)),
}
TINY = {
    "paligemma": GemmaConfig(
        width=96, depth=3, mlp_dim=256, num_heads=4, num_kv_heads=1, head_dim=24
    ),
    "action_expert": GemmaConfig(
        width=64, depth=3, mlp_dim=192, num_heads=4, num_kv_heads=1, head_dim=24
    ),
    "siglip": SiglipConfig(
        width=96, depth=2, mlp_dim=256, num_heads=4, patch_size=16, image_size=64
    ),
    "vocab_size": 512,
    "dtype": "float32",
    "remat": "none",
}
TINY_LORA = {
    name: dataclasses.replace(TINY[name], lora=LoraConfig(4, 4.0, 4, 4.0)) for name in LORA
}
SMALL = {
    "paligemma": GemmaConfig(
        width=384, depth=6, mlp_dim=1536, num_heads=6, num_kv_heads=1, head_dim=64
    ),
    "action_expert": GemmaConfig(
        width=256, depth=6, mlp_dim=1024, num_heads=6, num_kv_heads=1, head_dim=64
    ),
    "siglip": SiglipConfig(
        width=256, depth=6, mlp_dim=1024, num_heads=4, patch_size=16, image_size=128
    ),
    "vocab_size": 512,
    "remat": "none",
}
VARIANTS = {
    "pi05": PI05,
    "pi0": PI0,
    "pi05_lora": dataclasses.replace(PI05, **LORA),
    "pi0_lora": dataclasses.replace(PI0, **LORA),
    "pi05_small": dataclasses.replace(PI05, **SMALL),
    "pi0_small": dataclasses.replace(PI0, **SMALL),
    "pi05_tiny": dataclasses.replace(PI05, **TINY),
    "pi0_tiny": dataclasses.replace(PI0, **TINY),
    "pi05_tiny_lora": dataclasses.replace(PI05, **TINY | TINY_LORA),
}


def _replace(config, key: str, value):
    """Return `config` with one field replaced; dots lead into nested configurations."""
    name, _, rest = key.partition(".")
    fields = [field.name for field in dataclasses.fields(config)] if config else []
    if name not in fields:
        close = difflib.get_close_matches(name, fields, n=1, cutoff=0.4)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(f"model.overrides has an unknown key {key!r}.{hint}")
    current = getattr(config, name)
    if rest:
        value = _replace(current, rest, value)
    elif isinstance(current, bool | int | str):
        try:
            value = TypeAdapter(type(current)).validate_python(value)
        except ValidationError:
            raise UserError(
                f"model.overrides has {value!r} for {name!r}; it should be of type "
                f"{type(current).__name__}, such as {current!r}."
            ) from None
    return dataclasses.replace(config, **{name: value})


def merge_overrides(
    overrides: dict,
    *,
    action_horizon: int,
    discrete_state_input: bool,
    continuous_state_token: bool,
) -> dict[str, Any]:
    """Return everything in which a run's model differs from its variant, for `make_config`.

    Args:
        overrides: `model.overrides` of the configuration; they win over the other settings.
    """
    return {
        "action_horizon": action_horizon,
        "discrete_state_input": discrete_state_input,
        "continuous_state_token": continuous_state_token,
    } | overrides


def without_lora(config: Pi0Config) -> Pi0Config:
    """Return the same model without low-rank adapters."""
    experts = {name: dataclasses.replace(getattr(config, name), lora=None) for name in LORA}
    return dataclasses.replace(config, **experts)


def make_config(variant: str = "pi05", **overrides) -> Pi0Config:
    """Return a variant's configuration with changes.

    Args:
        variant: one of `VARIANTS`.
        overrides: fields of `Pi0Config`, with dots for nested ones, as in {"siglip.width": 128}.

    Raises:
        UserError: if the variant or a key is unknown, with the nearest; if a value is of another
            type.
    """
    if variant not in VARIANTS:
        close = difflib.get_close_matches(variant, VARIANTS, n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise UserError(
            f"there is no model variant {variant!r}; there are {', '.join(VARIANTS)}.{hint}"
        )
    config = VARIANTS[variant]
    for key, value in overrides.items():
        config = _replace(config, key, value)
    return config
