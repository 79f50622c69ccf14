"""Hugging Face safetensors to openpi's layout and back: every published form, and memory."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from golden_weights import GOLDEN, PI0, PI05, golden_params, lerobot_file, with_lora
from safetensors.numpy import load_file, save_file

from demo2eval.checkpoints.huggingface import (
    from_huggingface,
    main,
    open_huggingface,
    to_huggingface,
)
from demo2eval.checkpoints.huggingface_layout import (
    EMBEDDING,
    EXPERT_HEAD,
    TIED_EMBEDDING,
    huggingface_shapes,
)
from demo2eval.checkpoints.openpi import load_params, open_params, save_params
from demo2eval.checkpoints.policy_metadata import PolicyMetadata
from demo2eval.errors import UserError
from demo2eval.pi0.config import GemmaConfig, Pi0Config, SiglipConfig
from demo2eval.pi0.params import flatten, param_table, unflatten

FLOAT32, BFLOAT16 = np.dtype(np.float32), np.dtype(ml_dtypes.bfloat16)


@pytest.fixture(scope="module")
def tensors() -> dict[str, np.ndarray]:
    """What LeRobot's own file holds, names without `model.`."""
    return {name.removeprefix("model."): value for name, value in load_file(lerobot_file()).items()}


def read_arrays(source: Path, config: Pi0Config = PI05) -> dict[str, np.ndarray]:
    return {name: array.read() for name, array in open_huggingface(source, config).items()}


def open_error(source: Path, config: Pi0Config = PI05) -> str:
    with pytest.raises(UserError) as caught:
        open_huggingface(source, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def equal(arrays: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> bool:
    """Whether two sets of arrays have the same names, types and bits."""
    return arrays.keys() == expected.keys() and all(
        array.dtype == expected[name].dtype and array.tobytes() == expected[name].tobytes()
        for name, array in arrays.items()
    )


def test_lerobots_file_gives_openpis_arrays():
    assert equal(read_arrays(lerobot_file()), golden_params())
    assert equal(read_arrays(lerobot_file().parent), golden_params())


def test_the_tensors_are_those_of_lerobot():
    written = json.loads((GOLDEN / "hf_pi05/tensors.json").read_text())["tensors"]
    shapes = {
        name.removeprefix("model."): tuple(
            json.loads(digest[digest.index("[") :].split("]")[0] + "]")
        )
        for name, digest in written.items()
    }
    assert huggingface_shapes(PI05) == shapes


def test_every_published_form_gives_the_same(tensors, tmp_path):
    without_head = {name: value for name, value in tensors.items() if name != EXPERT_HEAD}
    only_embedding = {
        EMBEDDING if name == TIED_EMBEDDING else name: value for name, value in without_head.items()
    }
    forms = {
        "plain names": tensors,
        "no head of the expert": without_head,
        "embed_tokens alone": only_embedding,
        "both embeddings": {**tensors, EMBEDDING: tensors[TIED_EMBEDDING]},
        "model. before every name": {
            f"model.{name}": value for name, value in only_embedding.items()
        },
    }
    for number, form in enumerate(forms.values()):
        save_file(form, tmp_path / f"{number}.safetensors")
        assert equal(read_arrays(tmp_path / f"{number}.safetensors"), golden_params())


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_there_and_back_gives_the_same_bits(tensors, tmp_path, dtype):
    stored = {name: value.astype(dtype) for name, value in tensors.items()}
    save_file(stored, tmp_path / "model.safetensors")
    from_huggingface(tmp_path / "model.safetensors", tmp_path / "params", PI05, None)
    params = flatten(load_params(tmp_path / "params", PI05))
    assert {value.dtype for value in params.values()} == {np.dtype(dtype)}
    to_huggingface(tmp_path / "params", tmp_path / "back/model.safetensors", PI05)
    # LeRobot's policy owns a head of the expert that nothing uses, and asks for it.
    back = load_file(tmp_path / "back/model.safetensors")
    assert not back.pop(EXPERT_HEAD).astype(np.float32).any()
    del stored[EXPERT_HEAD]
    assert equal(back, stored)


def test_arrays_of_two_types_keep_theirs(tensors, tmp_path):
    # As LeRobot stores a policy that it trained in bfloat16: norms and vision stay float32.
    mixed = {
        name: value if "norm" in name else value.astype(BFLOAT16) for name, value in tensors.items()
    }
    save_file(mixed, tmp_path / "model.safetensors")
    from_huggingface(tmp_path, tmp_path / "params", PI05, None)
    to_huggingface(tmp_path / "params", tmp_path / "back.safetensors", PI05)
    back = load_file(tmp_path / "back.safetensors")
    assert equal({**back, EXPERT_HEAD: mixed[EXPERT_HEAD]}, mixed)


def test_another_type_can_be_asked_for(tmp_path):
    from_huggingface(lerobot_file(), tmp_path / "params", PI05, BFLOAT16)
    expected = {name: value.astype(BFLOAT16) for name, value in golden_params().items()}
    assert equal(flatten(load_params(tmp_path / "params", PI05)), expected)
    to_huggingface(tmp_path / "params", tmp_path / "model.safetensors", PI05, FLOAT32)
    back = load_file(tmp_path / "model.safetensors")
    assert {value.dtype for value in back.values()} == {FLOAT32}


def test_what_is_written_array_by_array_is_read_the_way_openpi_does(tmp_path):
    from_huggingface(lerobot_file(), tmp_path / "params", PI05)
    with ocp.PyTreeCheckpointer() as checkpointer:
        template = {"params": checkpointer.metadata(tmp_path / "params").item_metadata["params"]}
        arguments = {
            "params": unflatten(
                dict.fromkeys(golden_params(), ocp.RestoreArgs(restore_type=np.ndarray))
            )
        }
        restored = checkpointer.restore(
            tmp_path / "params", ocp.args.PyTreeRestore(item=template, restore_args=arguments)
        )
    assert equal(flatten(restored["params"]), golden_params())
    arrays = open_params(tmp_path / "params", PI05)
    assert equal({name: array.read() for name, array in arrays.items()}, golden_params())


def test_pi0_goes_round_too(tmp_path):
    save_params(tmp_path / "params", unflatten(golden_params("pi0")))
    to_huggingface(tmp_path / "params", tmp_path / "model.safetensors", PI0)
    assert equal(read_arrays(tmp_path / "model.safetensors", PI0), golden_params("pi0"))


LAYER = "paligemma_with_expert.gemma_expert.model.layers.0-3."
NORMS = [f"{LAYER}{name}" for name in ("input_layernorm", "post_attention_layernorm")]
NORMS += ["paligemma_with_expert.gemma_expert.model.norm"]
PI05_ALONE = [f"{name}.dense.{tensor}" for name in NORMS for tensor in ("bias", "weight")]
PI05_ALONE += [f"time_mlp_{end}.{tensor}" for end in ("in", "out") for tensor in ("bias", "weight")]
PI0_ALONE = [
    f"action_time_mlp_{end}.{tensor}" for end in ("in", "out") for tensor in ("bias", "weight")
]
PI0_ALONE += [*(f"{name}.weight" for name in NORMS), "state_proj.bias", "state_proj.weight"]


@pytest.mark.parametrize("family", ["pi05", "pi0"])
def test_weights_of_the_other_family_are_named_array_by_array(tmp_path, family):
    if family == "pi05":
        source, config, missing, unexpected = lerobot_file(), PI0, PI0_ALONE, PI05_ALONE
    else:
        source, config = tmp_path / "model.safetensors", PI05
        missing, unexpected = PI05_ALONE, PI0_ALONE
        save_params(tmp_path / "params", unflatten(golden_params("pi0")))
        to_huggingface(tmp_path / "params", source, PI0)
    assert open_error(source, config) == (
        f"{source} does not hold the weights of this {config.family} model:"
        f" missing {', '.join(missing)}; unexpected {', '.join(unexpected)};"
        f" these are weights of {family}: set model.variant (--variant) to a {family} variant,"
        f" or give weights of {config.family}."
    )


def test_other_sizes_name_the_tensors_and_what_to_set():
    assert open_error(lerobot_file(), dataclasses.replace(PI05, vocab_size=2048)) == (
        f"{lerobot_file()} does not hold the weights of this pi05 model:"
        f" shape mismatch {TIED_EMBEDDING} [1024, 64] instead of [2048, 64];"
        " these are weights of pi05 in another size: set model.overrides (--model-overrides) to"
        ' {"vocab_size": 1024}.'
    )
    deeper = dataclasses.replace(PI05, paligemma=dataclasses.replace(PI05.paligemma, depth=6))
    layers = "paligemma_with_expert.paligemma.model.language_model.layers.4-5."
    names = [
        "input_layernorm",
        *(f"mlp.{name}_proj" for name in ("down", "gate", "up")),
        "post_attention_layernorm",
    ]
    names += [f"self_attn.{name}_proj" for name in "koqv"]
    assert open_error(lerobot_file(), deeper) == (
        f"{lerobot_file()} does not hold the weights of this pi05 model:"
        f" missing {', '.join(f'{layers}{name}.weight' for name in names)};"
        " these are weights of pi05 in another size: set model.overrides (--model-overrides) to"
        ' {"paligemma.depth": 4}.'
    )


def test_missing_and_unexpected_tensors_are_named(tensors, tmp_path):
    file = tmp_path / "model.safetensors"
    some = {name: value for name, value in tensors.items() if "action_out" not in name}
    save_file({**some, "extra": np.zeros(1, np.float32)}, file)
    assert open_error(file) == (
        f"{file} does not hold the weights of this pi05 model:"
        " missing action_out_proj.bias, action_out_proj.weight; unexpected extra;"
        " these are weights of pi05, but not all of them or not they alone:"
        " copy or make them again."
    )


def test_two_embeddings_that_differ(tensors, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({**tensors, EMBEDDING: tensors[TIED_EMBEDDING] + 1}, file)
    assert open_error(file) == (
        f"{file} holds a {TIED_EMBEDDING} that is not {EMBEDDING};"
        " in Pi0 and Pi0.5 they are one array."
    )


def test_what_has_no_form_in_safetensors(tmp_path):
    save_params(tmp_path / "params", unflatten(golden_params()))
    for config, kind in (
        (with_lora(4), "LoRA arrays"),
        (dataclasses.replace(PI05, continuous_state_token=True), "a continuous state token"),
    ):
        with pytest.raises(
            UserError,
            match=f"^a model with {kind} has no form in safetensors; "
            "train without, or keep openpi's layout.$",
        ):
            to_huggingface(tmp_path / "params", tmp_path / "model.safetensors", config)
    assert not (tmp_path / "model.safetensors").exists()


@pytest.mark.slow
def test_the_command_line_goes_both_ways_and_overwrites_nothing(tmp_path, monkeypatch):
    def convert(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["huggingface", *map(str, arguments)])
        main()

    overrides: dict[str, int] = {"vocab_size": PI05.vocab_size}
    for key in ("paligemma", "action_expert", "siglip"):
        overrides |= {
            f"{key}.{name}": value
            for name, value in dataclasses.asdict(getattr(PI05, key)).items()
            if name != "lora"
        }
    checkpoint, file = tmp_path / "base", tmp_path / "out/model.safetensors"
    there = ("--from-safetensors", lerobot_file().parent, "--output", checkpoint)
    there += ("--model-overrides", json.dumps(overrides))
    convert(*there)
    with pytest.raises(
        UserError, match=f"^{checkpoint}/params exists; remove it or give another output.$"
    ):
        convert(*there)
    # A checkpoint of demo2eval says itself what it is.
    (checkpoint / "assets/me").mkdir(parents=True)
    metadata = PolicyMetadata("pi05", overrides, "me", "", "", "", {}, 0, [], "", None, 7, True)
    metadata.write(checkpoint)
    back = ("--to-safetensors", checkpoint, "--output", file, "--dtype", "bfloat16")
    convert(*back)
    assert {value.dtype for value in load_file(file).values()} == {BFLOAT16}
    again = subprocess.run(
        [sys.executable, "-m", "demo2eval.checkpoints.huggingface", *map(str, back)],
        capture_output=True,
        text=True,
    )
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == f"demo2eval: error: {file} exists; remove it or give another output.\n"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


# Pi0.5 with a quarter of its widths and of its vocabulary: the largest array is as large a share.
LARGE = Pi0Config(
    "pi05",
    GemmaConfig(width=512, depth=18, mlp_dim=4096, num_heads=8, num_kv_heads=1, head_dim=64),
    GemmaConfig(width=256, depth=18, mlp_dim=1024, num_heads=8, num_kv_heads=1, head_dim=64),
    SiglipConfig(width=288, depth=27, mlp_dim=1076, num_heads=16),
    vocab_size=64_288,
)
MEASURE = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
from demo2eval.checkpoints.huggingface import from_huggingface, to_huggingface
from golden_weights import PI05, lerobot_file
from test_huggingface import LARGE

def status(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024

folder = Path({folder!r})
# A small model first, so that libraries and threads do not count.
from_huggingface(lerobot_file(), folder / "warm-{name}/params", PI05)
to_huggingface(folder / "warm-{name}/params", folder / "warm-{name}/model.safetensors", PI05)
before = status("VmRSS")
{name}(folder / "{source}", folder / "{output}", LARGE)
print(status("VmHWM") - before)
"""


def peak_memory(folder: Path, name: str, source: str, output: str) -> int:
    """Return by how many bytes memory rises in a process of its own that converts."""
    code = MEASURE.format(
        path=sys.path, folder=str(folder), name=name, source=source, output=output
    )
    process = subprocess.run(
        [sys.executable, "-c", code], check=True, capture_output=True, text=True
    )
    return int(process.stdout)


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_stays_below_1_3_copies_of_the_weights(tmp_path):
    random = np.random.default_rng(0)
    shapes = {name: shape for name, (shape, _) in param_table(LARGE).items()}
    arrays = {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
    weights = sum(array.nbytes for array in arrays.values())
    save_params(tmp_path / "made", unflatten(arrays))
    del arrays
    peaks = {
        "to safetensors": ("to_huggingface", "made", "model.safetensors"),
        "from safetensors": ("from_huggingface", "model.safetensors", "params"),
    }
    for direction, arguments in peaks.items():
        copies = peak_memory(tmp_path, *arguments) / weights
        print(f"{weights / 2**20:.0f} MiB of weights: peak {copies:.2f} copies {direction}")
        assert copies < 1.3
