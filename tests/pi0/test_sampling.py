"""Sampling must integrate the flow that is trained."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from small_model import CONFIG, random_params

from demo2eval.pi0 import model, sampling
from demo2eval.pi0.params import flatten, round_params, unflatten

pytestmark = pytest.mark.slow


def test_sampling_integrates_the_flow_that_is_trained():
    """One Euler step from noise is noise minus v_t at time 1, and `flow_loss` is its error."""
    params = random_params(CONFIG)
    observation = model.Observation(
        images={"base_0_rgb": jnp.zeros((1, 32, 32, 3))},
        state=jnp.ones((1, CONFIG.action_dim)),
        tokenized_prompt=jnp.array([[2, 7]]),
        tokenized_prompt_mask=jnp.ones((1, 2), bool),
    )
    noise = jax.random.normal(jax.random.key(3), (1, CONFIG.action_horizon, CONFIG.action_dim))
    sample_actions = jax.jit(sampling.sample_actions, static_argnums=(0, 4))
    flow_loss = jax.jit(model.flow_loss, static_argnums=0)
    actions = sample_actions(CONFIG, params, observation, noise, 1)
    loss = flow_loss(CONFIG, params, observation, actions, noise, jnp.ones(1))
    np.testing.assert_allclose(loss, 0, atol=1e-9)


def test_weights_that_are_stored_in_bfloat16_are_sampled_with_the_same_bits():
    config = dataclasses.replace(CONFIG, dtype="bfloat16")
    params = random_params(config)
    rounded = unflatten(round_params(flatten(params)))
    folded, expected = (sampling.fold_params(config, tree, 2) for tree in (rounded, params))
    jax.tree.map(np.testing.assert_array_equal, folded, expected)
    assert "bfloat16" in {str(leaf.dtype) for leaf in jax.tree.leaves(rounded)}
