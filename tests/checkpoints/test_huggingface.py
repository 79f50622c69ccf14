"""Hugging Face safetensors in and out: every form in which they come, each way in which they are damaged, and memory."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest
from golden_data import lerobot_folder
from safetensors.numpy import load_file, save_file
from test_openpi import CONFIG, GOLDEN, PI0, golden_params, with_lora

from demo2eval.checkpoints import openpi as checkpoint
from demo2eval.checkpoints.huggingface import (
    EMBEDDING,
    EXPERT_HEAD,
    TIED_EMBEDDING,
    from_huggingface,
    main,
    open_huggingface,
    to_huggingface,
)
from demo2eval.checkpoints.openpi import (
    LazyArray,
    load_params,
    open_params,
    save_lazily,
    save_params,
)
from demo2eval.checkpoints.policy_metadata import PolicyDescription
from demo2eval.checkpoints.safetensors_files import INDEX
from demo2eval.errors import UserError
from demo2eval.pi0.config import GemmaConfig, Pi0Config, SiglipConfig
from demo2eval.pi0.params import flatten, table, unflatten


@pytest.fixture(scope="module")
def lerobot_file(tmp_path_factory) -> Path:
    """The file that LeRobot wrote."""
    return lerobot_folder(tmp_path_factory.mktemp("lerobot"), CONFIG, GOLDEN) / "model.safetensors"


@pytest.fixture(scope="module")
def tensors(lerobot_file) -> dict[str, np.ndarray]:
    """What LeRobot's own file holds, names without `model.`."""
    return {name.removeprefix("model."): value for name, value in load_file(lerobot_file).items()}


def opened(source: Path, config: Pi0Config = CONFIG) -> dict[str, np.ndarray]:
    return {name: array.read() for name, array in open_huggingface(source, config).items()}


def refused(source: Path, config: Pi0Config = CONFIG) -> str:
    with pytest.raises(UserError) as caught:
        open_huggingface(source, config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def equal(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> bool:
    """Whether two sets of arrays have the same names, types and bits."""
    same = (
        one[name].dtype == other[name].dtype and one[name].tobytes() == other[name].tobytes()
        for name in one
    )
    return one.keys() == other.keys() and all(same)


def write_shards(folder: Path, tensors: dict[str, np.ndarray], count: int = 3) -> dict[str, str]:
    """Write tensors as `count` files with an index, as Hugging Face does, and return {tensor: file}."""
    names = sorted(tensors)
    places = {
        name: f"model-{1 + index % count:05d}-of-{count:05d}.safetensors"
        for index, name in enumerate(names)
    }
    for file in set(places.values()):
        save_file({name: tensors[name] for name in names if places[name] == file}, folder / file)
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 0}, "weight_map": places}))
    return places


def test_lerobots_file_gives_openpis_arrays(lerobot_file):
    assert equal(opened(lerobot_file), golden_params())
    assert equal(opened(lerobot_file.parent), golden_params())


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
        assert equal(opened(tmp_path / f"{number}.safetensors"), golden_params())


def test_shards_and_the_files_beside_weights(tensors, tmp_path):
    write_shards(tmp_path, tensors)
    # LeRobot keeps its normalisation beside the weights.
    save_file(
        {"action.q01": np.zeros(7, np.float32)},
        tmp_path / "policy_preprocessor_step_2_normalizer_processor.safetensors",
    )
    assert equal(opened(tmp_path), golden_params())
    assert equal(opened(tmp_path / INDEX), golden_params())


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16])
def test_there_and_back_gives_the_same_bits(tensors, tmp_path, dtype):
    stored = {name: value.astype(dtype) for name, value in tensors.items()}
    save_file(stored, tmp_path / "model.safetensors")
    from_huggingface(tmp_path / "model.safetensors", tmp_path / "params", CONFIG, None)
    assert {
        value.dtype for value in flatten(load_params(tmp_path / "params", CONFIG)).values()
    } == {np.dtype(dtype)}
    to_huggingface(tmp_path / "params", tmp_path / "back/model.safetensors", CONFIG)
    # LeRobot's policy owns a head of the expert that nothing uses, and asks for it.
    again = load_file(tmp_path / "back/model.safetensors")
    assert not again.pop(EXPERT_HEAD).astype(np.float32).any()
    del stored[EXPERT_HEAD]
    assert equal(again, stored)


def test_arrays_of_two_types_keep_theirs(tensors, tmp_path):
    # As LeRobot stores a policy that it trained in bfloat16: norms and vision stay float32.
    mixed = {
        name: value if "norm" in name else value.astype(ml_dtypes.bfloat16)
        for name, value in tensors.items()
    }
    save_file(mixed, tmp_path / "model.safetensors")
    from_huggingface(tmp_path, tmp_path / "params", CONFIG, None)
    to_huggingface(tmp_path / "params", tmp_path / "back.safetensors", CONFIG)
    again = load_file(tmp_path / "back.safetensors")
    assert equal({**again, EXPERT_HEAD: mixed[EXPERT_HEAD]}, mixed)


def test_another_type_can_be_asked_for(lerobot_file, tmp_path):
    half = np.dtype(ml_dtypes.bfloat16)
    from_huggingface(lerobot_file, tmp_path / "params", CONFIG, half)
    expected = {name: value.astype(half) for name, value in golden_params().items()}
    assert equal(flatten(load_params(tmp_path / "params", CONFIG)), expected)
    to_huggingface(
        tmp_path / "params", tmp_path / "model.safetensors", CONFIG, np.dtype(np.float32)
    )
    assert {value.dtype for value in load_file(tmp_path / "model.safetensors").values()} == {
        np.dtype(np.float32)
    }


def test_what_is_written_array_by_array_is_read_the_way_openpi_does(lerobot_file, tmp_path):
    from_huggingface(lerobot_file, tmp_path / "params", CONFIG)
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
    assert equal(
        {name: array.read() for name, array in open_params(tmp_path / "params", CONFIG).items()},
        golden_params(),
    )


def test_arrays_of_several_chunks_are_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoint, "CHUNK_BYTES", 2**14)
    value = np.random.default_rng(0).standard_normal((9, 301, 127), np.float32)
    save_lazily(tmp_path / "params", {"a/b": LazyArray(value.shape, value.dtype, lambda: value)})
    np.testing.assert_array_equal(load_params(tmp_path / "params")["a"]["b"], value)


def test_pi0_goes_round_too(tmp_path):
    save_params(tmp_path / "params", unflatten(golden_params("pi0")))
    to_huggingface(tmp_path / "params", tmp_path / "model.safetensors", PI0)
    assert equal(opened(tmp_path / "model.safetensors", PI0), golden_params("pi0"))


LAYER = "paligemma_with_expert.gemma_expert.model.layers.0-3."
NORMS = [f"{LAYER}{name}" for name in ("input_layernorm", "post_attention_layernorm")]
NORMS += ["paligemma_with_expert.gemma_expert.model.norm"]
PI05_ALONE = [f"{name}.dense.{part}" for name in NORMS for part in ("bias", "weight")]
PI05_ALONE += [f"time_mlp_{end}.{part}" for end in ("in", "out") for part in ("bias", "weight")]
PI0_ALONE = [
    f"action_time_mlp_{end}.{part}" for end in ("in", "out") for part in ("bias", "weight")
]
PI0_ALONE += [*(f"{name}.weight" for name in NORMS), "state_proj.bias", "state_proj.weight"]


@pytest.mark.parametrize("family", ["pi05", "pi0"])
def test_weights_of_the_other_family_are_named_array_by_array(lerobot_file, tmp_path, family):
    if family == "pi05":
        source, config, missing, extra = lerobot_file, PI0, PI0_ALONE, PI05_ALONE
    else:
        source, config, missing, extra = (
            tmp_path / "model.safetensors",
            CONFIG,
            PI05_ALONE,
            PI0_ALONE,
        )
        save_params(tmp_path / "params", unflatten(golden_params("pi0")))
        to_huggingface(tmp_path / "params", source, PI0)
    assert refused(source, config) == (
        f"{source} does not hold the weights of this {config.family} model: missing {', '.join(missing)}; left over"
        f" {', '.join(extra)}; these are weights of {family}: set model.variant (--variant) to a {family} variant,"
        f" or give weights of {config.family}."
    )


def test_other_sizes_name_the_misshapen_and_what_to_set(lerobot_file):
    assert refused(lerobot_file, dataclasses.replace(CONFIG, vocab_size=2048)) == (
        f"{lerobot_file} does not hold the weights of this pi05 model: misshapen {TIED_EMBEDDING} [1024, 64] instead of [2048, 64];"
        ' these are weights of pi05 in another size: set model.overrides (--model-overrides) to {"vocab_size": 1024}.'
    )
    deeper = dataclasses.replace(CONFIG, paligemma=dataclasses.replace(CONFIG.paligemma, depth=6))
    tower = "paligemma_with_expert.paligemma.model.language_model.layers.4-5."
    names = [
        "input_layernorm",
        *(f"mlp.{name}_proj" for name in ("down", "gate", "up")),
        "post_attention_layernorm",
    ]
    names += [f"self_attn.{name}_proj" for name in "koqv"]
    assert refused(lerobot_file, deeper) == (
        f"{lerobot_file} does not hold the weights of this pi05 model: missing {', '.join(f'{tower}{name}.weight' for name in names)};"
        ' these are weights of pi05 in another size: set model.overrides (--model-overrides) to {"paligemma.depth": 4}.'
    )


def test_missing_and_left_over_tensors_are_named(tensors, tmp_path):
    file = tmp_path / "model.safetensors"
    rest = {name: value for name, value in tensors.items() if "action_out" not in name}
    save_file({**rest, "extra": np.zeros(1)}, file)
    assert refused(file) == f"{file} holds extra as F64; weights are of type F32, BF16, F16."
    save_file({**rest, "extra": np.zeros(1, np.float32)}, file)
    assert refused(file) == (
        f"{file} does not hold the weights of this pi05 model: missing action_out_proj.bias, action_out_proj.weight;"
        " left over extra; these are weights of pi05, but not all of them or not they alone: copy or make them again."
    )


def test_two_embeddings_that_differ(tensors, tmp_path):
    file = tmp_path / "model.safetensors"
    save_file({**tensors, EMBEDDING: tensors[TIED_EMBEDDING] + 1}, file)
    assert (
        refused(file)
        == f"{file} holds a {TIED_EMBEDDING} that is not {EMBEDDING}; in Pi0 and Pi0.5 they are one array."
    )


def test_cut_files(lerobot_file, tmp_path):
    whole, file = lerobot_file.read_bytes(), tmp_path / "model.safetensors"
    for length, said in (
        (
            len(whole) - 1,
            f"{file} is cut off: it holds {len(whole) - 1} bytes of {len(whole)}; copy it again.",
        ),
        (
            5000,
            f"{file} is cut off within its header, at 5000 bytes, or is no safetensors file; copy it again.",
        ),
        (
            0,
            f"{file} is cut off within its header, at 0 bytes, or is no safetensors file; copy it again.",
        ),
    ):
        file.write_bytes(whole[:length])
        assert refused(file) == said
    file.write_bytes((8).to_bytes(8, "little") + b"no JSON " + whole)
    assert refused(file).endswith("it is no safetensors file, or damaged.")
    # What Git LFS leaves when it has not fetched the file itself.
    file.write_text("version https://git-lfs.github.com/spec/v1\n")
    assert refused(file).endswith("or is no safetensors file; copy it again.")


def test_missing_files(tensors, tmp_path):
    advice = "set model.weights to an openpi checkpoint, a folder with params/, or to safetensors."
    assert refused(tmp_path / "nowhere") == f"{tmp_path}/nowhere does not exist; {advice}"
    assert refused(tmp_path) == f"{tmp_path} has no safetensors files; {advice}"
    places = write_shards(tmp_path, tensors)
    second = "model-00002-of-00003.safetensors"
    lost = sum(place == second for place in places.values())
    (tmp_path / second).rename(tmp_path / "elsewhere")
    assert (
        refused(tmp_path)
        == f"{tmp_path} lacks {second}, {lost} of the {len(places)} arrays that {INDEX} lists."
    )
    (tmp_path / second).write_bytes((tmp_path / "model-00001-of-00003.safetensors").read_bytes())
    assert refused(tmp_path).startswith(f"{tmp_path / second} lacks ")
    (tmp_path / INDEX).write_text("{}")
    assert (
        refused(tmp_path)
        == f"{tmp_path / INDEX} is no index of safetensors ('weight_map'); copy it again."
    )


def test_what_has_no_form_in_safetensors(tmp_path):
    save_params(tmp_path / "params", unflatten(golden_params()))
    for config, kind in (
        (with_lora(4), "LoRA arrays"),
        (dataclasses.replace(CONFIG, continuous_state_token=True), "a continuous state token"),
    ):
        with pytest.raises(
            UserError,
            match=f"^a model with {kind} has no form in safetensors; train without, or keep openpi's",
        ):
            to_huggingface(tmp_path / "params", tmp_path / "model.safetensors", config)
    assert not (tmp_path / "model.safetensors").exists()


def test_the_command_line_goes_both_ways_and_overwrites_nothing(
    lerobot_file, tmp_path, monkeypatch
):
    def convert(*arguments) -> None:
        monkeypatch.setattr(sys, "argv", ["convert", *map(str, arguments)])
        main()

    sizes = {}
    for key in ("paligemma", "action_expert", "siglip"):
        sizes |= {
            f"{key}.{name}": value
            for name, value in dataclasses.asdict(getattr(CONFIG, key)).items()
            if name != "lora"
        }
    overrides = {**sizes, "vocab_size": CONFIG.vocab_size}
    checkpoint, file = tmp_path / "base", tmp_path / "out/model.safetensors"
    there = (
        "--from-safetensors",
        lerobot_file.parent,
        "--output",
        checkpoint,
        "--model-overrides",
        json.dumps(overrides),
    )
    convert(*there)
    with pytest.raises(
        UserError, match=f"^{checkpoint}/params exists; remove it or give another output.$"
    ):
        convert(*there)
    # A checkpoint of demo2eval says itself what it is.
    (checkpoint / "assets/me").mkdir(parents=True)
    PolicyDescription("pi05", overrides, "me", "", "", {}, 0, [], "", None, 7, True).write(
        checkpoint
    )
    back = ("--to-safetensors", checkpoint, "--output", file, "--dtype", "bfloat16")
    convert(*back)
    assert {value.dtype for value in load_file(file).values()} == {np.dtype(ml_dtypes.bfloat16)}
    again = subprocess.run(
        [sys.executable, "-m", "demo2eval.checkpoints.huggingface", *map(str, back)],
        capture_output=True,
        text=True,
    )
    assert (again.returncode, again.stdout) == (1, "")
    assert again.stderr == f"demo2eval: error: {file} exists; remove it or give another output.\n"
    assert [path.name for path in file.parent.iterdir()] == [file.name]


LARGE = Pi0Config(
    "pi05",
    GemmaConfig(width=512, depth=6, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=64),
    GemmaConfig(width=512, depth=6, mlp_dim=2048, num_heads=8, num_kv_heads=1, head_dim=64),
    SiglipConfig(width=384, depth=6, mlp_dim=1536, num_heads=6),
    vocab_size=32_768,
)
MEASURE = """
import sys
from pathlib import Path
sys.path[:0] = {path!r}
import numpy as np
from demo2eval.checkpoints.openpi import LazyArray, load_params, save_lazily
from demo2eval.checkpoints.huggingface import from_huggingface, to_huggingface
from test_convert import LARGE

def status(key):
    return int(Path("/proc/self/status").read_text().split(key + ":")[1].split()[0]) * 1024

folder = Path({folder!r})
save_lazily(folder / "warm-{name}", {{"a": LazyArray((3,), np.dtype(np.float32), lambda: np.zeros(3, np.float32))}})
load_params(folder / "warm-{name}")
before = status("VmRSS")
{name}(folder / "{source}", folder / "{output}", LARGE)
print(status("VmHWM") - before)
"""


def peak_memory(folder: Path, name: str, source: str, output: str) -> int:
    """Return by how many bytes memory rises in a process of its own that converts."""
    code = MEASURE.format(
        path=sys.path, folder=str(folder), name=name, source=source, output=output
    )
    return int(
        subprocess.run(
            [sys.executable, "-c", code], check=True, capture_output=True, text=True
        ).stdout
    )


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_memory_stays_below_one_copy_of_the_weights(tmp_path):
    random = np.random.default_rng(0)
    shapes = {name: shape for name, (shape, _) in table(LARGE).items()}
    save_params(
        tmp_path / "made",
        unflatten(
            {name: random.standard_normal(shape, np.float32) for name, shape in shapes.items()}
        ),
    )
    weights = sum(4 * int(np.prod(shape)) for shape in shapes.values())
    out = peak_memory(tmp_path, "to_huggingface", "made", "model.safetensors")
    back = peak_memory(tmp_path, "from_huggingface", "model.safetensors", "params")
    print(
        f"{weights / 2**20:.0f} MiB of weights; peak {out / weights:.2f} of that to safetensors, {back / weights:.2f} from them"
    )
    assert max(out, back) < weights
