"""What the model must be whatever its weights.

It is the same with activations kept or recomputed, with LoRA apart or merged.
"""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, OVERRIDES, random_batch, random_params, with_lora

from demo2eval.pi0 import model
from demo2eval.pi0.config import Pi0Config, make_config
from demo2eval.pi0.params import flatten, unflatten

pytestmark = pytest.mark.slow


@partial(jax.jit, static_argnums=0)
def flow_loss(config: Pi0Config, params: dict) -> jax.Array:
    return model.flow_loss(config, params, *random_batch(config), jnp.array([0.2, 0.9]))


def test_recomputed_activations_give_the_same_gradients():
    params = random_params(CONFIG)

    def gradients(remat: str) -> dict:
        config = dataclasses.replace(CONFIG, remat=remat)
        return flatten(jax.grad(lambda tree: flow_loss(config, tree).mean())(params))

    plain = gradients("none")
    for remat in ("elementwise", "vision", "all"):
        for name, gradient in gradients(remat).items():
            np.testing.assert_allclose(gradient, plain[name], atol=1e-5, err_msg=name)


def test_the_state_token_matters():
    params = random_params(CONFIG)
    without = unflatten(
        {
            name: jnp.zeros_like(value) if "state_proj" in name else value
            for name, value in flatten(params).items()
        }
    )
    assert float(jnp.abs(flow_loss(CONFIG, params) - flow_loss(CONFIG, without)).max()) > 1e-4


def merged(flat: dict) -> dict:
    """Add each low-rank update to its matrix.

    In attention it is scaled by alpha / rank, and the heads share the second factor behind them.
    """
    result = {}
    for name in (name for name in flat if "lora" not in name):
        prefix = name.removesuffix("w") if name.endswith("/w") else name + "_"
        result[name] = flat[name]
        if f"{prefix}lora_a" in flat:
            first, second = flat[f"{prefix}lora_a"], flat[f"{prefix}lora_b"]
            second = second.sum(axis=1, keepdims=True) if "attn_vec" in name else second
            result[name] += (8.0 / 4 if name.endswith("/w") else 1.0) * (first @ second)
    return result


def test_lora_equals_its_merged_weights():
    params = random_params(with_lora(CONFIG))
    flat = flatten(params)
    plain = {name: value for name, value in flat.items() if "lora" not in name}
    assert len(flat) - len(plain) == 20
    loss = flow_loss(with_lora(CONFIG), params)
    np.testing.assert_allclose(loss, flow_loss(CONFIG, unflatten(merged(flat))), rtol=1e-4)
    assert float(jnp.abs(loss - flow_loss(CONFIG, unflatten(plain))).max()) > 1e-4


def test_as_many_key_heads_as_query_heads():
    """openpi keeps query, key and value in one array then, which changes nothing."""
    experts = {
        name: dataclasses.replace(getattr(CONFIG, name), num_kv_heads=4)
        for name in ("paligemma", "action_expert")
    }
    params = random_params(dataclasses.replace(CONFIG, **experts))
    assert not any("/q_einsum" in name or "/kv_einsum" in name for name in flatten(params))
    attention = params["PaliGemma"]["llm"]["layers"]["attn"]
    # One head of keys and values, four times over, is grouped-query attention with one.
    grouped = {name: value for name, value in attention.items() if "qkv" not in name}
    for suffix in ("", "_1"):
        query, key, value = (attention[f"qkv_einsum{suffix}"]["w"][:, index] for index in range(3))
        key, value = (jnp.broadcast_to(array[:, :1], array.shape) for array in (key, value))
        attention[f"qkv_einsum{suffix}"] = {"w": jnp.stack([query, key, value], axis=1)}
        grouped |= {
            f"q_einsum{suffix}": {"w": query},
            f"kv_einsum{suffix}": {"w": jnp.stack([key, value], axis=1)[:, :, :1]},
        }
    loss = flow_loss(dataclasses.replace(CONFIG, **experts), params)
    params["PaliGemma"]["llm"]["layers"]["attn"] = grouped
    np.testing.assert_allclose(loss, flow_loss(CONFIG, params), rtol=1e-5)


@pytest.mark.parametrize("family", ["pi05", "pi0"])
def test_several_draws_after_one_prefix_are_as_many_losses(family):
    own = {"discrete_state_input": False, "continuous_state_token": family == "pi05"}
    own |= {f"{name}.depth": 1 for name in ("paligemma", "action_expert", "siglip")}
    config = make_config(f"{family}_tiny", **OVERRIDES | own)
    params = random_params(config)
    observation, actions, noise = random_batch(config)
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
