"""What the model must be whatever its weights: the same scanned or unrolled, remembered or recomputed, with LoRA apart or merged."""

import dataclasses
import json
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from demo2eval.pi0 import layers, model, sampling
from demo2eval.pi0.config import LoraConfig, Pi0Config, make_config
from demo2eval.pi0.params import flatten, init_params, split_trainable, unflatten

SMALL = {
    "action_horizon": 4,
    "siglip.image_size": 32,
    "vocab_size": 50,
    "continuous_state_token": True,
}


def random_params(config: Pi0Config) -> dict:
    """Return parameters none of which is zero, since fresh ones shut every adaptive norm."""
    flat = flatten(init_params(config, jax.random.key(0)))
    keys = jax.random.split(jax.random.key(1), len(flat))
    return unflatten(
        {
            name: value + 0.02 * jax.random.normal(key, value.shape)
            for key, (name, value) in zip(keys, flat.items(), strict=True)
        }
    )


def sample_of(config: Pi0Config) -> tuple[model.Observation, jax.Array, jax.Array]:
    """Return an observation, actions and noise, a batch of two with prompts of different lengths."""
    keys = jax.random.split(jax.random.key(2), 5)
    size = config.siglip.image_size
    observation = model.Observation(
        images={"base_0_rgb": jax.random.uniform(keys[0], (2, size, size, 3)) * 2 - 1},
        state=jax.random.normal(keys[1], (2, config.action_dim)),
        tokenized_prompt=jnp.array([[2, 7, 9, 0], [2, 8, 9, 11]]),
        tokenized_prompt_mask=jnp.array([[True, True, True, False], [True] * 4]),
    )
    return observation, *(
        jax.random.normal(key, (2, config.action_horizon, config.action_dim)) for key in keys[2:4]
    )


@partial(jax.jit, static_argnums=0)
def loss_of(config: Pi0Config, params: dict) -> jax.Array:
    return model.flow_loss(config, params, *sample_of(config), jnp.array([0.2, 0.9]))


@pytest.fixture(scope="module")
def config() -> Pi0Config:
    return make_config("pi05_tiny", **SMALL)


def test_scanned_layers_equal_unrolled_ones(config, monkeypatch):
    params = random_params(config)
    unrolled = loss_of(config, params)
    monkeypatch.setattr(layers, "UNROLLED_DEPTH", 0)
    loss_of.clear_cache()
    np.testing.assert_allclose(loss_of(config, params), unrolled, rtol=1e-5)


def test_recomputed_activations_give_the_same_gradients(config):
    params = random_params(config)
    changed = [dataclasses.replace(config, remat=remat) for remat in (False, True)]
    plain, recomputed = (
        flatten(jax.grad(lambda tree, one=one: loss_of(one, tree).mean())(params))
        for one in changed
    )
    for name, gradient in plain.items():
        np.testing.assert_allclose(recomputed[name], gradient, atol=1e-5, err_msg=name)


def test_the_state_token_is_seen(config):
    params = random_params(config)
    without = unflatten(
        {
            name: jnp.zeros_like(value) if "state_proj" in name else value
            for name, value in flatten(params).items()
        }
    )
    assert float(jnp.abs(loss_of(config, params) - loss_of(config, without)).max()) > 1e-4


def with_lora(config: Pi0Config) -> Pi0Config:
    lora = LoraConfig(
        attention_rank=4, attention_alpha=8.0, feed_forward_rank=3, feed_forward_alpha=1.5
    )
    towers = {
        name: dataclasses.replace(getattr(config, name), lora=lora)
        for name in ("paligemma", "action_expert")
    }
    return dataclasses.replace(config, **towers)


def merged(flat: dict) -> dict:
    """Add each low-rank update to its matrix: scaled by alpha / rank in attention alone, with one second factor for all heads behind it."""
    result = {}
    for name in (name for name in flat if "lora" not in name):
        prefix = name.removesuffix("w") if name.endswith("/w") else name + "_"
        result[name] = flat[name]
        if f"{prefix}lora_a" in flat:
            first, second = flat[f"{prefix}lora_a"], flat[f"{prefix}lora_b"]
            second = second.sum(axis=1, keepdims=True) if "attn_vec" in name else second
            result[name] += (8.0 / 4 if name.endswith("/w") else 1.0) * (first @ second)
    return result


def test_lora_equals_its_merged_weights(config):
    params = random_params(with_lora(config))
    flat = flatten(params)
    plain = {name: value for name, value in flat.items() if "lora" not in name}
    assert len(flat) - len(plain) == 20
    loss = loss_of(with_lora(config), params)
    np.testing.assert_allclose(loss, loss_of(config, unflatten(merged(flat))), rtol=1e-4)
    assert float(jnp.abs(loss - loss_of(config, unflatten(plain))).max()) > 1e-4


def test_as_many_key_heads_as_heads(config):
    """openpi keeps query, key and value in one array then; the same numbers in two arrays are the same model."""
    towers = {
        name: dataclasses.replace(getattr(config, name), num_kv_heads=4)
        for name in ("paligemma", "action_expert")
    }
    params = random_params(dataclasses.replace(config, **towers))
    assert not any("/q_einsum" in name or "/kv_einsum" in name for name in flatten(params))
    attention = params["PaliGemma"]["llm"]["layers"]["attn"]
    # One head of keys and values, four times over, is grouped-query attention with one.
    grouped = {name: value for name, value in attention.items() if "qkv" not in name}
    for suffix in ("", "_1"):
        query, key, value = (attention[f"qkv_einsum{suffix}"]["w"][:, part] for part in range(3))
        key, value = (jnp.broadcast_to(one[:, :1], one.shape) for one in (key, value))
        attention[f"qkv_einsum{suffix}"] = {"w": jnp.stack([query, key, value], axis=1)}
        grouped |= {
            f"q_einsum{suffix}": {"w": query},
            f"kv_einsum{suffix}": {"w": jnp.stack([key, value], axis=1)[:, :, :1]},
        }
    loss = loss_of(dataclasses.replace(config, **towers), params)
    params["PaliGemma"]["llm"]["layers"]["attn"] = grouped
    np.testing.assert_allclose(loss, loss_of(config, params), rtol=1e-5)


def test_lora_freezes_the_rest_of_both_towers(config):
    golden = json.loads((Path(__file__).parent.parent / "golden/golden.json").read_text())["report"]
    lora = with_lora(config)
    trained, frozen = split_trainable(lora, init_params(lora, jax.random.key(0)))
    assert sorted(frozen) == golden["lora/frozen"]
    assert {value.dtype for value in frozen.values()} == {jnp.dtype("bfloat16")}
    assert sorted(name for name in trained if "/llm/" in name) == golden["lora/trainable_llm"]
    # In one tower alone, the other tower trains on.
    expert_only = dataclasses.replace(lora, paligemma=config.paligemma)
    _, frozen = split_trainable(expert_only, init_params(expert_only, jax.random.key(0)))
    assert sorted(frozen) == [name for name in golden["lora/frozen"] if "_1/" in name]


def test_sampling_integrates_the_flow_that_is_trained(config):
    """One Euler step from noise is noise minus the velocity at time 1, whose loss against a known target `flow_loss` gives."""
    params = random_params(config)
    observation = model.Observation(
        images={"base_0_rgb": jnp.zeros((1, 32, 32, 3))},
        state=jnp.ones((1, config.action_dim)),
        tokenized_prompt=jnp.array([[2, 7]]),
        tokenized_prompt_mask=jnp.ones((1, 2), bool),
    )
    noise = jax.random.normal(jax.random.key(3), (1, config.action_horizon, config.action_dim))
    actions = sampling.sample_actions(config, params, observation, noise, num_steps=1)
    loss = model.flow_loss(config, params, observation, actions, noise, jnp.ones(1))
    np.testing.assert_allclose(loss, 0, atol=1e-9)


@pytest.mark.parametrize("family", ["pi05", "pi0"])
def test_several_noises_after_one_look_are_as_many_losses(family):
    own = {"discrete_state_input": False, "continuous_state_token": family == "pi05"}
    own |= {f"{tower}.depth": 1 for tower in ("paligemma", "action_expert", "siglip")}
    config = make_config(f"{family}_tiny", **SMALL | own)
    params = random_params(config)
    observation, actions, noise = sample_of(config)
    noises, times = jnp.stack([noise, -noise]), jnp.array([[0.2, 0.9], [0.5, 0.1]])

    def one_by_one(params):
        return jnp.stack(
            [
                model.flow_loss(config, params, observation, actions, *draw)
                for draw in zip(noises, times, strict=True)
            ]
        )

    def together(params):
        return model.flow_losses(config, params, observation, actions, noises, times)

    np.testing.assert_allclose(jax.jit(together)(params), jax.jit(one_by_one)(params), rtol=1e-4)
    expected = flatten(jax.jit(jax.grad(lambda tree: one_by_one(tree).mean()))(params))
    for name, gradient in flatten(
        jax.jit(jax.grad(lambda tree: together(tree).mean()))(params)
    ).items():
        np.testing.assert_allclose(gradient, expected[name], rtol=1e-3, atol=1e-6, err_msg=name)
