"""Weights in and out: openpi's checkpoint, Hugging Face's safetensors, and sentences for what does not fit."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import load_file

from demo2eval.errors import UserError
from demo2eval.pi0.checkpoint import family_of, load_params, save_params
from demo2eval.pi0.config import GemmaConfig, Pi0Config, SiglipConfig, make_config
from demo2eval.pi0.convert import from_huggingface, read_tree, to_huggingface
from demo2eval.pi0.parameters import flatten, unflatten

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
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
    with np.load(GOLDEN / f"{family}_params.npz") as file:
        return {name: file[name] for name in file.files}


def refused(*arguments) -> str:
    with pytest.raises(UserError) as caught:
        load_params(*arguments)
    return str(caught.value)


def test_openpis_checkpoint_is_read():
    flat = flatten(load_params(CHECKPOINT / "params", CONFIG))
    with np.load(GOLDEN / "pi05_ema_train3.npz") as file:
        assert {f"ema_after3/{name}" for name in flat} == {name for name in file.files if name.startswith("ema_after3/")}
        for name, value in flat.items():
            np.testing.assert_array_equal(value, file[f"ema_after3/{name}"])


def test_what_is_written_is_read_the_way_openpi_does(tmp_path):
    save_params(tmp_path / "params", unflatten(golden_params()))
    # As openpi's loader does: every array as numpy, by name.
    arguments = {"params": unflatten(dict.fromkeys(golden_params(), ocp.RestoreArgs(restore_type=np.ndarray)))}
    with ocp.PyTreeCheckpointer() as checkpointer:
        template = {"params": checkpointer.metadata(tmp_path / "params").item_metadata["params"]}
        restored = checkpointer.restore(tmp_path / "params", ocp.args.PyTreeRestore(item=template, restore_args=arguments))[
            "params"
        ]
    for name, value in golden_params().items():
        np.testing.assert_array_equal(flatten(restored)[name], value)


def test_safetensors_are_read_bit_for_bit():
    flat = read_tree(GOLDEN / "hf_pi05", CONFIG)
    golden = golden_params()
    assert flat.keys() == golden.keys()
    for name, value in golden.items():
        np.testing.assert_array_equal(flat[name], value)


def test_safetensors_go_round(tmp_path):
    from_huggingface(GOLDEN / "hf_pi05/model.safetensors", tmp_path / "params", CONFIG)
    to_huggingface(tmp_path / "params", tmp_path / "model.safetensors", CONFIG)
    original = {name.removeprefix("model."): value for name, value in load_file(GOLDEN / "hf_pi05/model.safetensors").items()}
    again = load_file(tmp_path / "model.safetensors")
    assert again.keys() <= original.keys()
    assert all("lm_head" in name or "embed_tokens" in name for name in original.keys() - again.keys())
    for name, value in again.items():
        np.testing.assert_array_equal(value, original[name])


def test_a_pi0_checkpoint_in_a_pi05_run_names_what_is_missing_and_left_over(tmp_path):
    save_params(tmp_path / "params", unflatten(golden_params("pi0")))
    said = refused(tmp_path / "params", CONFIG)
    assert "missing PaliGemma/llm/final_norm_1/Dense_0/bias" in said
    assert "time_mlp_in/kernel" in said
    assert "left over" in said
    assert "state_proj/kernel" in said
    assert "weights of pi0: set model.variant to a pi0 variant" in said
    assert family_of(golden_params("pi0")) == "pi0"


def test_other_sizes_name_the_misshapen(tmp_path):
    save_params(tmp_path / "params", unflatten(golden_params()))
    said = refused(tmp_path / "params", dataclasses.replace(CONFIG, vocab_size=2048))
    assert "misshapen PaliGemma/llm/embedder/input_embedding [1024, 64] instead of [2048, 64]" in said


@pytest.mark.parametrize("damage", ["missing", "cut"])
def test_a_missing_or_cut_checkpoint_is_a_sentence(tmp_path, damage):
    path = tmp_path / "3/params"
    if damage == "cut":
        shutil.copytree(CHECKPOINT / "params", path)
        largest = max(path.rglob("*"), key=lambda file: file.stat().st_size if file.is_file() else 0)
        largest.write_bytes(largest.read_bytes()[:1000])
    assert str(path) in refused(path, CONFIG)


def test_pi0_safetensors_in_a_pi05_run(tmp_path):
    pi0 = dataclasses.replace(CONFIG, family="pi0")
    save_params(tmp_path / "params", unflatten(golden_params("pi0")))
    to_huggingface(tmp_path / "params", tmp_path / "model.safetensors", pi0)
    with pytest.raises(UserError, match="holds weights of pi0, and the run's model is pi05"):
        read_tree(tmp_path / "model.safetensors", CONFIG)
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(UserError, match="incomplete"):
        read_tree(tmp_path / "cut.safetensors", CONFIG)


def test_configuration_overrides_name_the_nearest():
    assert make_config("pi05_tiny", **{"siglip.width": 128}).siglip.width == 128
    with pytest.raises(UserError, match="'action_horizon'"):
        make_config("pi05", action_horizont=3)
    with pytest.raises(UserError, match="pi05"):
        make_config("pi5")
