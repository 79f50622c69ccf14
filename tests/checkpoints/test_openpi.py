"""Weights in openpi's layout, in and out, and a sentence for each way in which they do not fit."""

import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from golden_data import assert_equal, read

from demo2eval.checkpoints.mismatch import family_of
from demo2eval.checkpoints.openpi import load_params, save_params
from demo2eval.errors import UserError
from demo2eval.pi0.config import GemmaConfig, LoraConfig, Pi0Config, SiglipConfig, make_config
from demo2eval.pi0.params import flatten, table, unflatten

GOLDEN = Path(__file__).resolve().parents[1] / "golden"
CHECKPOINT = GOLDEN / "checkpoint_pi05_ema/3"
SIZES = json.loads((GOLDEN / "golden.json").read_text())["config"]
CONFIG = Pi0Config(
    "pi05",
    GemmaConfig(**SIZES["paligemma"]),
    GemmaConfig(**SIZES["action_expert"]),
    SiglipConfig(width=32, depth=2, mlp_dim=80, num_heads=2),
    vocab_size=SIZES["vocab_size"],
    action_horizon=10,
)


def golden_params(family: str = "pi05") -> dict[str, np.ndarray]:
    return read(f"{family}_params", GOLDEN)


def refused(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        load_params(*arguments)
    return str(caught.value)


def test_openpis_checkpoint_is_read():
    flat = flatten(load_params(CHECKPOINT / "params", CONFIG))
    golden = read("pi05_ema_train3", GOLDEN)
    assert {f"ema_after3/{name}" for name in flat} == {
        name for name in golden if name.startswith("ema_after3/")
    }
    for name, value in flat.items():
        assert_equal(value, golden[f"ema_after3/{name}"], name)


def test_what_is_written_is_read_the_way_openpi_does(tmp_path):
    save_params(tmp_path / "params", unflatten(golden_params()))
    # As openpi's loader does: every array as numpy, by name.
    arguments = {
        "params": unflatten(
            dict.fromkeys(golden_params(), ocp.RestoreArgs(restore_type=np.ndarray))
        )
    }
    with ocp.PyTreeCheckpointer() as checkpointer:
        template = {"params": checkpointer.metadata(tmp_path / "params").item_metadata["params"]}
        restored = checkpointer.restore(
            tmp_path / "params", ocp.args.PyTreeRestore(item=template, restore_args=arguments)
        )["params"]
    for name, value in golden_params().items():
        np.testing.assert_array_equal(flatten(restored)[name], value)


EXPERTS_NORMS = [
    f"PaliGemma/llm/{norm}"
    for norm in ("final_norm_1", "layers/pre_attention_norm_1", "layers/pre_ffw_norm_1")
]
PI05_ALONE = [f"{name}/Dense_0/{part}" for name in EXPERTS_NORMS for part in ("bias", "kernel")]
PI05_ALONE += [f"time_mlp_{end}/{part}" for end in ("in", "out") for part in ("bias", "kernel")]
PI0_ALONE = [f"{name}/scale" for name in EXPERTS_NORMS]
PI0_ALONE += [
    f"{name}/{part}"
    for name in ("action_time_mlp_in", "action_time_mlp_out", "state_proj")
    for part in ("bias", "kernel")
]
PI0 = dataclasses.replace(CONFIG, family="pi0")


@pytest.mark.parametrize("config", [CONFIG, PI0], ids=["pi05", "pi0"])
def test_weights_of_the_other_family_are_named_array_by_array(tmp_path, config):
    file = "pi0" if config.is_pi05 else "pi05"
    path = tmp_path / "params"
    save_params(path, unflatten(golden_params(file)))
    missing, extra = (PI05_ALONE, PI0_ALONE) if config.is_pi05 else (PI0_ALONE, PI05_ALONE)
    assert refused(path, config) == (
        f"{path} does not hold the weights of this {config.family} model: missing {', '.join(missing)};"
        f" left over {', '.join(extra)}; these are weights of {file}: set model.variant (--variant) to a {file} variant,"
        f" or give weights of {config.family}."
    )
    assert family_of(golden_params(file)) == file


def test_other_sizes_name_the_misshapen_and_what_to_set(tmp_path):
    path = tmp_path / "params"
    save_params(path, unflatten(golden_params()))
    larger = dataclasses.replace(CONFIG, vocab_size=2048)
    assert refused(path, larger) == (
        f"{path} does not hold the weights of this pi05 model: misshapen PaliGemma/llm/embedder/input_embedding [1024, 64]"
        " instead of [2048, 64]; these are weights of pi05 in another size: set model.overrides (--model-overrides) to"
        ' {"vocab_size": 1024}.'
    )
    deeper = dataclasses.replace(
        CONFIG, siglip=SiglipConfig(width=64, depth=3, mlp_dim=80, num_heads=2, image_size=112)
    )
    encoder = "PaliGemma/img/Transformer/encoder"
    assert refused(path, deeper) == (
        f"{path} does not hold the weights of this pi05 model: misshapen {encoder}_norm/bias [32] instead of [64],"
        f" {encoder}_norm/scale [32] instead of [64], {encoder}block/LayerNorm_0/bias [2, 32] instead of [3, 64],"
        f" {encoder}block/LayerNorm_0/scale [2, 32] instead of [3, 64] and 18 more; these are weights of pi05 in another size:"
        ' set model.overrides (--model-overrides) to {"siglip.width": 32, "siglip.depth": 2, "siglip.image_size": 224}.'
    )
    told = json.loads(
        refused(path, make_config("pi05")).split("--model-overrides) to ")[1].removesuffix(".")
    )
    assert load_params(path, make_config("pi05", **told))


def with_lora(rank: int) -> Pi0Config:
    lora = LoraConfig(rank, 4.0, 4, 4.0)
    return dataclasses.replace(
        CONFIG, action_expert=dataclasses.replace(CONFIG.action_expert, lora=lora)
    )


def test_lora_where_none_is_wanted_and_back(tmp_path):
    plain, adapted = tmp_path / "plain", tmp_path / "lora"
    save_params(plain, unflatten(golden_params()))
    save_params(
        adapted,
        unflatten(
            {name: np.zeros(shape, np.float32) for name, (shape, _) in table(with_lora(4)).items()}
        ),
    )
    attention = [
        f"attn/{kind}_einsum_1/lora_{end}" for kind in ("attn_vec", "kv", "q") for end in "ab"
    ]
    forward = [f"mlp_1/{name}_lora_{end}" for name in ("gating_einsum", "linear") for end in "ab"]
    names = ", ".join(f"PaliGemma/llm/layers/{name}" for name in attention + forward)
    assert refused(adapted, CONFIG) == (
        f"{adapted} does not hold the weights of this pi05 model: left over {names}; these are weights of pi05 with LoRA:"
        " set model.variant (--variant) to one with LoRA, such as pi05_lora."
    )
    assert refused(plain, with_lora(4)) == (
        f"{plain} does not hold the weights of this pi05 model: missing {names}; these are weights of pi05 without LoRA:"
        " set model.variant (--variant) to one without LoRA, such as pi05."
    )
    assert refused(adapted, with_lora(2)).endswith(
        'set model.overrides (--model-overrides) to {"action_expert.lora.attention_rank": 4}.'
    )


def test_a_state_token_where_none_is_wanted(tmp_path):
    path = tmp_path / "params"
    save_params(path, unflatten(golden_params()))
    assert refused(path, dataclasses.replace(CONFIG, continuous_state_token=True)) == (
        f"{path} does not hold the weights of this pi05 model: missing state_proj/bias, state_proj/kernel; these are weights of"
        " pi05 without a state token: set model.continuous_state_token to false."
    )


def test_a_part_of_the_weights_and_other_weights(tmp_path):
    part = {name: value for name, value in golden_params().items() if "/mlp/" not in name}
    save_params(tmp_path / "part", unflatten(part))
    assert refused(tmp_path / "part", CONFIG) == (
        f"{tmp_path}/part does not hold the weights of this pi05 model: missing PaliGemma/llm/layers/mlp/gating_einsum,"
        " PaliGemma/llm/layers/mlp/linear; these are weights of pi05, but not all of them or not they alone: copy or make them again."
    )
    save_params(tmp_path / "other", {"encoder": {"kernel": np.zeros(3)}})
    assert refused(tmp_path / "other", CONFIG).endswith(
        " and 47 more; left over encoder/kernel; these are not weights of Pi0 or Pi0.5: set model.weights to a checkpoint of one."
    )


def test_a_missing_checkpoint_is_a_sentence(tmp_path):
    path = tmp_path / "3/params"
    assert (
        refused(path, CONFIG)
        == f"{path} does not exist; a checkpoint keeps its weights in <step>/params."
    )
    path.mkdir(parents=True)
    assert refused(path, CONFIG) == (
        f"{path} holds no weights, or not all of them: it has no file _METADATA; copy or make it again."
    )


@pytest.mark.parametrize("cut", ["_METADATA", "manifest.ocdbt", "d/*", "ocdbt.process_0/d/*"])
def test_a_cut_checkpoint_is_a_sentence_and_nothing_else(tmp_path, cut, capfd):
    path = tmp_path / "params"
    shutil.copytree(CHECKPOINT / "params", path)
    file = max(path.glob(cut), key=lambda file: file.stat().st_size)
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    said = refused(path, CONFIG)
    of_array = r"array PaliGemma/\S+ of " if cut.startswith("ocdbt") else ""
    assert re.fullmatch(
        rf"{of_array}{path} cannot be read \(.+\): it is incomplete; copy or make it again\.", said
    ), said
    assert "\n" not in said
    # Orbax, reading all arrays at once, would leave a traceback for each of the others.
    assert "Traceback" not in capfd.readouterr().err


def test_configuration_overrides_name_the_nearest():
    assert make_config("pi05_tiny", **{"siglip.width": 128}).siglip.width == 128
    with pytest.raises(UserError, match="'action_horizon'"):
        make_config("pi05", action_horizont=3)
    with pytest.raises(UserError, match="pi05"):
        make_config("pi5")
