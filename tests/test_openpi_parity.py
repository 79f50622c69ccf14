"""The model against openpi's own numbers.

The folder in the environment variable GOLDEN_DIR (default tests/golden) says in its golden.json of what size it is.
"""

import dataclasses
import json
import os
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from demo2eval.pi0 import gemma, model, sampling
from demo2eval.pi0.config import GemmaConfig, LoraConfig, Pi0Config, SiglipConfig, make_config
from demo2eval.pi0.parameters import flatten, init_params, table, unflatten
from demo2eval.training.optimizer import make_schedule

GOLDEN = Path(os.environ.get("GOLDEN_DIR", Path(__file__).parent / "golden"))
SPEC = json.loads((GOLDEN / "golden.json").read_text())
FAMILIES = ("pi05", "pi0")
PRECISIONS = ("float32", "bfloat16", "bfloat16_params")
TOWERS = {"paligemma": "paligemma", "action_expert": "expert"}
RANKS = ("attn_rank", "attn_alpha", "ffn_rank", "ffn_alpha")
WITH_LORA = pytest.mark.skipif(not (GOLDEN / "pi05_lora_float32.npz").exists(), reason="GOLDEN_DIR has no numbers of LoRA")


flow_loss = jax.jit(model.flow_loss, static_argnums=0)
sample_actions = jax.jit(sampling.sample_actions, static_argnums=0)


def config_of(family: str, precision: str = "float32") -> Pi0Config:
    sizes = SPEC["config"]
    siglip = sizes["siglip"]
    return Pi0Config(
        family,
        GemmaConfig(**sizes["paligemma"]),
        GemmaConfig(**sizes["action_expert"]),
        SiglipConfig(
            *(siglip[key] for key in ("width", "depth", "mlp_dim", "num_heads")), siglip["patch_size"][0], siglip["image"][0]
        ),
        vocab_size=sizes["vocab_size"],
        action_dim=SPEC["action_dim"],
        action_horizon=SPEC["action_horizon"],
        dtype="float32" if precision == "float32" else "bfloat16",
        remat=False,
    )


def lora_config_of(family: str) -> Pi0Config:
    config = config_of(family)
    ranks = {name: LoraConfig(*(SPEC["lora"][key][kind] for kind in RANKS)) for name, key in TOWERS.items()}
    return dataclasses.replace(
        config, **{name: dataclasses.replace(getattr(config, name), lora=lora) for name, lora in ranks.items()}
    )


def read(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDEN / f"{name}.npz") as file:
        return {key: file[key] for key in file.files}


def params_of(name: str, precision: str = "float32") -> dict:
    dtype = jnp.bfloat16 if precision == "bfloat16_params" else jnp.float32
    return unflatten({name: jnp.asarray(value, dtype) for name, value in read(f"{name}_params").items()})


def observation_of(inputs: dict, cameras=None, tokens: int | None = None) -> model.Observation:
    cameras = SPEC["cams"] if cameras is None else cameras
    return model.Observation(
        images={name: jnp.asarray(inputs[f"image/{name}"] / 255.0 * 2 - 1, jnp.float32) for name in cameras},
        state=jnp.asarray(inputs["state"]),
        tokenized_prompt=jnp.asarray(inputs["tokenized_prompt"])[:, :tokens],
        tokenized_prompt_mask=jnp.asarray(inputs["tokenized_prompt_mask"])[:, :tokens],
        image_masks={name: jnp.asarray(inputs[f"image_mask/{name}"]) for name in cameras},
    )


@partial(jax.jit, static_argnums=0)
def forward(config: Pi0Config, params: dict, inputs: dict, condition=None) -> dict:
    """Run the model's own parts one by one and return what each gives."""
    observation, time = observation_of(inputs), jnp.asarray(inputs["time"])
    at = time[:, None, None]
    noisy = at * inputs["noise"] + (1 - at) * inputs["actions"]
    prefix, prefix_valid = model.embed_prefix(config, params, observation)
    suffix, opens_block, own_condition = model.embed_suffix(config, params, observation.state, noisy, time)
    valid = jnp.concatenate([prefix_valid, jnp.ones(suffix.shape[:2], bool)], axis=1)
    mask = model.attention_mask(valid, jnp.concatenate([jnp.zeros(prefix.shape[1], bool), opens_block]))
    positions = model.positions_of(valid)
    prefix_out, out = gemma.run(
        (config.paligemma, config.action_expert),
        params["PaliGemma"]["llm"],
        [prefix, suffix],
        [None, own_condition if condition is None else condition],
        positions,
        mask,
    )
    return {
        "prefix_embs": prefix,
        "prefix_mask": prefix_valid,
        "suffix_embs": suffix,
        "adarms_cond": own_condition,
        "attn_mask": mask,
        "positions": positions,
        "prefix_out": prefix_out,
        "suffix_out": out,
        "x_t": noisy,
        "u_t": inputs["noise"] - inputs["actions"],
        "v_t": model.velocity(config, params, out),
    }


def difference(value, golden: np.ndarray) -> float:
    return float(np.abs(np.asarray(value, np.float32) - np.asarray(golden, np.float32)).max())


def compare(config: Pi0Config, params: dict, inputs: dict, golden: dict, tolerance: float) -> None:
    """Compare all that `golden` holds of a forward pass, loss and sampling."""
    mine = forward(config, params, inputs)
    assert {"v_t", "loss", "actions_10"} <= golden.keys()
    for name in golden.keys() & {"attn_mask", "positions", "prefix_mask"}:
        np.testing.assert_array_equal(mine[name], golden[name])
    for name in golden.keys() & {"suffix_embs", "adarms_cond", "suffix_out", "x_t", "u_t", "v_t"}:
        assert difference(mine[name], golden[name]) < tolerance, name
    seen = np.asarray(mine["prefix_mask"])[..., None]
    for name in golden.keys() & {"prefix_embs", "prefix_out"}:
        assert difference(np.where(seen, mine[name], 0), np.where(seen, golden[name], 0)) < tolerance, name
    observation, actions = observation_of(inputs), inputs["actions"]
    loss = flow_loss(config, params, observation, actions, inputs["noise"], inputs["time"])
    assert difference(loss, golden["loss"]) < tolerance
    assert difference(sample_actions(config, params, observation, inputs["noise"]), golden["actions_10"]) < tolerance
    if "compute_loss_key7" in golden:
        drawn = model.compute_loss(config, params, jax.random.key(7), observation, actions)
        assert difference(drawn, golden["compute_loss_key7"]) < tolerance


def compare_gradients(config: Pi0Config, params: dict, inputs: dict, golden: dict) -> set[str]:
    """Compare the gradients that `golden` holds, and return the names of all parameters."""

    def mean_loss(params):
        return model.flow_loss(config, params, observation_of(inputs), inputs["actions"], inputs["noise"], inputs["time"]).mean()

    gradients = flatten(jax.jit(jax.grad(mean_loss))(params))
    for name in (name.removeprefix("grad/") for name in golden if name.startswith("grad/")):
        assert difference(gradients[name], golden[f"grad/{name}"]) < 1e-4, name
    return set(gradients)


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("family", FAMILIES)
def test_forward_pass(family, precision):
    golden = read(f"{family}_{precision}")
    inputs, tolerance = read(f"{family}_inputs"), 1e-4 if precision == "float32" else 0.1
    compare(config_of(family, precision), params_of(family, precision), inputs, golden, tolerance)


@WITH_LORA
def test_lora():
    config, params, inputs, golden = (
        lora_config_of("pi05"),
        params_of("pi05_lora"),
        read("pi05_inputs"),
        read("pi05_lora_float32"),
    )
    assert {name: value.shape for name, value in flatten(params).items()} == {
        name: shape for name, (shape, _) in table(config).items()
    }
    compare(config, params, inputs, golden, 1e-4)
    compare_gradients(config, params, inputs, golden)


def test_the_expert_given_openpis_condition():
    golden = read("pi05_float32")
    mine = forward(config_of("pi05"), params_of("pi05"), read("pi05_inputs"), condition=jnp.asarray(golden["adarms_cond"]))
    assert difference(mine["suffix_out"], golden["suffix_out"]) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_gradients_of_every_parameter(family):
    golden = read(f"{family}_float32")
    names = compare_gradients(config_of(family), params_of(family), read(f"{family}_inputs"), golden)
    assert {f"grad/{name}" for name in names} == {name for name in golden if name.startswith("grad/")}


@pytest.mark.parametrize("family", FAMILIES)
def test_left_out_cameras_and_padding_change_nothing(family):
    config, params, inputs = config_of(family), params_of(family), read(f"{family}_inputs")
    kept = [name for name in SPEC["cams"] if name != SPEC["masked_cam"]]
    tokens = int(inputs["tokenized_prompt_mask"].sum(axis=1).max())
    assert tokens < inputs["tokenized_prompt"].shape[1]
    actions = inputs["actions"], inputs["noise"], inputs["time"]
    padded = flow_loss(config, params, observation_of(inputs), *actions)
    trimmed = flow_loss(config, params, observation_of(inputs, kept, tokens), *actions)
    assert difference(trimmed, padded) < 1e-5
    sampled = [
        sample_actions(config, params, observation, inputs["noise"])
        for observation in (observation_of(inputs), observation_of(inputs, kept, tokens))
    ]
    assert difference(*sampled) < 2e-5


@pytest.mark.parametrize("variant", ["pi05", "pi0", "pi05_lora", "pi0_lora"])
def test_full_size_trees(variant):
    golden = json.loads((GOLDEN / "full_size_trees.json").read_text())
    config = make_config(variant)
    shapes = flatten(jax.eval_shape(lambda: init_params(config, jax.random.key(0))))
    assert {name: list(leaf.shape) for name, leaf in shapes.items()} == {
        name: shape for name, (shape, _) in golden[variant].items()
    }
    assert sum(leaf.size for leaf in shapes.values()) == golden[f"{variant}_num_params"]


def test_the_reference_tree_is_the_models():
    for family in FAMILIES:
        shapes = {name: shape for name, (shape, _) in table(config_of(family)).items()}
        assert shapes == {name: value.shape for name, value in read(f"{family}_params").items()}


def test_the_first_real_training_step():
    golden, inputs, config = read("pi05_ema_train3"), read("pi05_inputs"), config_of("pi05")
    facts = json.loads((GOLDEN / "pi05_ema_train3.json").read_text())
    # openpi's augmented pictures, stored in float16.
    images = {name: jnp.asarray(golden[f"aug0/{name}"], jnp.float32) for name in SPEC["cams"]}
    observation = dataclasses.replace(observation_of(inputs), images=images)

    def mean_loss(params):
        return model.flow_loss(config, params, observation, inputs["actions"], golden["noise0"], golden["time0"]).mean()

    loss, gradients = jax.jit(jax.value_and_grad(mean_loss))(params_of("pi05"))
    assert float(loss) == pytest.approx(facts["infos"][0]["loss"], abs=1e-4)
    assert float(optax.global_norm(gradients)) == pytest.approx(facts["infos"][0]["grad_norm"], rel=1e-3)


def test_schedule():
    facts = json.loads((GOLDEN / "data.json").read_text())
    for name, arguments in SCHEDULES.items():
        schedule = make_schedule(*arguments)
        for step, rate in facts[name].items():
            assert float(schedule(int(step))) == pytest.approx(rate, rel=1e-6)


SCHEDULES = {"lr_default": (1000, 2.5e-5, 30_000, 2.5e-6), "lr_pi05_libero": (10_000, 5e-5, 1_000_000, 5e-5)}
