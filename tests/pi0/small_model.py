"""A small Pi0.5 with random weights, and a batch for it."""

import dataclasses

import jax
import jax.numpy as jnp

from demo2eval.pi0 import model
from demo2eval.pi0.config import LoraConfig, Pi0Config, make_config
from demo2eval.pi0.params import flatten, init_params, unflatten

OVERRIDES = {
    "action_horizon": 4,
    "siglip.image_size": 32,
    "vocab_size": 50,
    "continuous_state_token": True,
}
CONFIG = make_config("pi05_tiny", **OVERRIDES)


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


def random_batch(config: Pi0Config) -> tuple[model.Observation, jax.Array, jax.Array]:
    """Return an observation, actions and noise: a batch of two with prompts of unlike lengths."""
    keys = jax.random.split(jax.random.key(2), 5)
    size = config.siglip.image_size
    observation = model.Observation(
        images={"base_0_rgb": jax.random.uniform(keys[0], (2, size, size, 3)) * 2 - 1},
        state=jax.random.normal(keys[1], (2, config.action_dim)),
        tokenized_prompt=jnp.array([[2, 7, 9, 0], [2, 8, 9, 11]]),
        tokenized_prompt_mask=jnp.array([[True, True, True, False], [True] * 4]),
    )
    actions, noise = (
        jax.random.normal(key, (2, config.action_horizon, config.action_dim)) for key in keys[2:4]
    )
    return observation, actions, noise


def with_lora(config: Pi0Config) -> Pi0Config:
    """Return the model with LoRA in both experts."""
    lora = LoraConfig(
        attention_rank=4, attention_alpha=8.0, feed_forward_rank=3, feed_forward_alpha=1.5
    )
    experts = {
        name: dataclasses.replace(getattr(config, name), lora=lora)
        for name in ("paligemma", "action_expert")
    }
    return dataclasses.replace(config, **experts)
