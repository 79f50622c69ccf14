"""A sentence for each way in which weights are not a model's, with openpi's names.

Those with Hugging Face's names are in test_huggingface.py.
"""

import dataclasses
import json

import numpy as np
import pytest
from golden_weights import PI0, PI05, golden_params, with_lora

from demo2eval.checkpoints.mismatch import detect_family, join_names
from demo2eval.checkpoints.openpi import load_params, save_params
from demo2eval.errors import UserError
from demo2eval.pi0.config import Pi0Config, SiglipConfig, make_config
from demo2eval.pi0.params import param_table, unflatten

EXPERT_NORMS = [
    f"PaliGemma/llm/{norm}"
    for norm in ("final_norm_1", "layers/pre_attention_norm_1", "layers/pre_ffw_norm_1")
]
PI05_ALONE = [f"{name}/Dense_0/{array}" for name in EXPERT_NORMS for array in ("bias", "kernel")]
PI05_ALONE += [f"time_mlp_{end}/{array}" for end in ("in", "out") for array in ("bias", "kernel")]
PI0_ALONE = [f"{name}/scale" for name in EXPERT_NORMS]
PI0_ALONE += [
    f"{name}/{array}"
    for name in ("action_time_mlp_in", "action_time_mlp_out", "state_proj")
    for array in ("bias", "kernel")
]


def load_error(path, config: Pi0Config) -> str:
    with pytest.raises(UserError) as caught:
        load_params(path, config)
    return str(caught.value)


@pytest.mark.parametrize("config", [PI05, PI0], ids=["pi05", "pi0"])
def test_weights_of_the_other_family_are_named_array_by_array(tmp_path, config):
    family = "pi0" if config.is_pi05 else "pi05"
    path = tmp_path / "params"
    save_params(path, unflatten(golden_params(family)))
    missing, unexpected = (PI05_ALONE, PI0_ALONE) if config.is_pi05 else (PI0_ALONE, PI05_ALONE)
    assert load_error(path, config) == (
        f"{path} does not hold the weights of this {config.family} model:"
        f" missing {', '.join(missing)}; unexpected {', '.join(unexpected)};"
        f" these are weights of {family}: set model.variant (--variant) to a {family} variant,"
        f" or give weights of {config.family}."
    )
    assert detect_family(golden_params(family)) == family


def test_other_sizes_name_the_arrays_and_what_to_set(tmp_path):
    path = tmp_path / "params"
    save_params(path, unflatten(golden_params()))
    larger = dataclasses.replace(PI05, vocab_size=2048)
    assert load_error(path, larger) == (
        f"{path} does not hold the weights of this pi05 model:"
        " shape mismatch PaliGemma/llm/embedder/input_embedding [1024, 64] instead of [2048, 64];"
        " these are weights of pi05 in another size: set model.overrides (--model-overrides) to"
        ' {"vocab_size": 1024}.'
    )
    siglip = SiglipConfig(width=64, depth=3, mlp_dim=80, num_heads=2, image_size=112)
    deeper = dataclasses.replace(PI05, siglip=siglip)
    encoder = "PaliGemma/img/Transformer/encoder"
    assert load_error(path, deeper) == (
        f"{path} does not hold the weights of this pi05 model:"
        f" shape mismatch {encoder}_norm/bias [32] instead of [64],"
        f" {encoder}_norm/scale [32] instead of [64],"
        f" {encoder}block/LayerNorm_0/bias [2, 32] instead of [3, 64],"
        f" {encoder}block/LayerNorm_0/scale [2, 32] instead of [3, 64] and 18 more;"
        " these are weights of pi05 in another size: set model.overrides (--model-overrides) to"
        ' {"siglip.width": 32, "siglip.depth": 2, "siglip.image_size": 224}.'
    )


def test_the_overrides_that_the_sentence_names_fit(tmp_path):
    path = tmp_path / "params"
    save_params(path, unflatten(golden_params()))
    message = load_error(path, make_config("pi05"))
    overrides = json.loads(message.split("--model-overrides) to ")[1].removesuffix("."))
    assert load_params(path, make_config("pi05", **overrides))


def test_lora_where_the_model_has_none_and_back(tmp_path):
    plain, adapted = tmp_path / "plain", tmp_path / "lora"
    save_params(plain, unflatten(golden_params()))
    shapes = {name: shape for name, (shape, _) in param_table(with_lora(4)).items()}
    zeros = {name: np.zeros(shape, np.float32) for name, shape in shapes.items()}
    save_params(adapted, unflatten(zeros))
    attention = [
        f"attn/{kind}_einsum_1/lora_{end}" for kind in ("attn_vec", "kv", "q") for end in "ab"
    ]
    forward = [f"mlp_1/{name}_lora_{end}" for name in ("gating_einsum", "linear") for end in "ab"]
    names = ", ".join(f"PaliGemma/llm/layers/{name}" for name in attention + forward)
    assert load_error(adapted, PI05) == (
        f"{adapted} does not hold the weights of this pi05 model: unexpected {names};"
        " these are weights of pi05 with LoRA:"
        " set model.variant (--variant) to one with LoRA, such as pi05_lora."
    )
    assert load_error(plain, with_lora(4)) == (
        f"{plain} does not hold the weights of this pi05 model: missing {names};"
        " these are weights of pi05 without LoRA:"
        " set model.variant (--variant) to one without LoRA, such as pi05."
    )
    assert load_error(adapted, with_lora(2)).endswith(
        'set model.overrides (--model-overrides) to {"action_expert.lora.attention_rank": 4}.'
    )


def test_a_state_token_where_the_weights_have_none(tmp_path):
    path = tmp_path / "params"
    save_params(path, unflatten(golden_params()))
    assert load_error(path, dataclasses.replace(PI05, continuous_state_token=True)) == (
        f"{path} does not hold the weights of this pi05 model:"
        " missing state_proj/bias, state_proj/kernel;"
        " these are weights of pi05 without a state token:"
        " set model.continuous_state_token to false."
    )


def test_some_of_the_weights_and_weights_of_something_else(tmp_path):
    some = {name: value for name, value in golden_params().items() if "/mlp/" not in name}
    save_params(tmp_path / "some", unflatten(some))
    assert load_error(tmp_path / "some", PI05) == (
        f"{tmp_path}/some does not hold the weights of this pi05 model:"
        " missing PaliGemma/llm/layers/mlp/gating_einsum, PaliGemma/llm/layers/mlp/linear;"
        " these are weights of pi05, but not all of them or not they alone:"
        " copy or make them again."
    )
    save_params(tmp_path / "else", {"encoder": {"kernel": np.zeros(3)}})
    assert load_error(tmp_path / "else", PI05).endswith(
        " and 47 more; unexpected encoder/kernel; these are not weights of Pi0 or Pi0.5:"
        " set model.weights to a checkpoint of one."
    )


def test_layers_are_named_together():
    names = [f"x.layers.{layer}.y" for layer in range(12)] + ["x.layers.1.z", "x.layers.4.z"]
    assert join_names(names) == "x.layers.0-11.y, x.layers.1,4.z"
    assert join_names(["x.layers.3.y"]) == "x.layers.3.y"
    assert join_names(f"a{index}" for index in range(13)) == "a0, a1, a2, a3 and 9 more"
