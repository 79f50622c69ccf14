"""Which arrays LoRA freezes, and the shapes in the signatures of pi0."""

import dataclasses
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from jaxtyping import TypeCheckError
from small_model import CONFIG, with_lora

from demo2eval.pi0 import model
from demo2eval.pi0.params import flatten, init_params, param_table, split_trainable, unflatten


@pytest.mark.slow
def test_lora_freezes_the_rest_of_both_experts():
    golden = json.loads((Path(__file__).parents[1] / "golden/golden.json").read_text())["report"]
    lora = with_lora(CONFIG)
    trainable, frozen = split_trainable(lora, init_params(lora, jax.random.key(0)))
    assert sorted(frozen) == golden["lora/frozen"]
    assert {value.dtype for value in frozen.values()} == {jnp.dtype("bfloat16")}
    assert sorted(name for name in trainable if "/llm/" in name) == golden["lora/trainable_llm"]
    # With LoRA in one expert alone, the other expert is trained.
    expert_only = dataclasses.replace(lora, paligemma=CONFIG.paligemma)
    _, frozen = split_trainable(expert_only, init_params(expert_only, jax.random.key(0)))
    assert sorted(frozen) == [name for name in golden["lora/frozen"] if "_1/" in name]


def test_flat_and_nested_names_keep_their_order():
    flat = dict.fromkeys(sorted(param_table(CONFIG)), 0)
    assert list(flatten(unflatten(flat))) == list(flat)
    assert unflatten({"b/a": 1, "a": 2, "b/c": 3}) == {"b": {"a": 1, "c": 3}, "a": 2}


def test_shapes_are_checked_in_tests():
    with pytest.raises(TypeCheckError):
        model.posemb_sincos(jnp.zeros((2, 3)), 4)
