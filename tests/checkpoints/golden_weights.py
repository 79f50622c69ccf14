"""The reference weights in tests/golden, and the models that they are of."""

import dataclasses
import functools
import json
import tempfile
from pathlib import Path

import numpy as np
from golden_data import GOLDEN, lerobot_folder, read

from demo2eval.pi0.config import GemmaConfig, LoraConfig, Pi0Config, SiglipConfig

OPENPI_CHECKPOINT = GOLDEN / "checkpoint_pi05_ema/3"
SIZES = json.loads((GOLDEN / "golden.json").read_text())["config"]
PI05 = Pi0Config(
    "pi05",
    GemmaConfig(**SIZES["paligemma"]),
    GemmaConfig(**SIZES["action_expert"]),
    SiglipConfig(width=32, depth=2, mlp_dim=80, num_heads=2),
    vocab_size=SIZES["vocab_size"],
    action_horizon=10,
)
PI0 = dataclasses.replace(PI05, family="pi0")


def golden_params(family: str = "pi05") -> dict[str, np.ndarray]:
    """Return the reference weights by openpi's names."""
    return read(f"{family}_params")


@functools.cache
def lerobot_file() -> Path:
    """Return the model.safetensors that LeRobot wrote of the weights of Pi0.5."""
    return lerobot_folder(Path(tempfile.mkdtemp()), PI05) / "model.safetensors"


def with_lora(rank: int) -> Pi0Config:
    """Return the Pi0.5 model with LoRA in the action expert."""
    lora = LoraConfig(rank, 4.0, 4, 4.0)
    return dataclasses.replace(
        PI05, action_expert=dataclasses.replace(PI05.action_expert, lora=lora)
    )
