"""Pi0 and Pi0.5: flow matching over action chunks, given pictures, prompt and state (Black et al., 2024; Physical Intelligence, 2025).

The prefix (pictures, prompt) goes through PaliGemma, the suffix (noisy actions, in Pi0 the state before them) through the action
expert. Time 1 is noise: x_t = t noise + (1 - t) actions, and the model learns the velocity noise - actions.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp

from demo2eval.pi0 import gemma, siglip
from demo2eval.pi0.config import Pi0Config
from demo2eval.pi0.layers import dense, unstack

TIME_PERIODS = (4e-3, 4.0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observation:
    """What the policy sees, a batch of b.

    Attributes:
        images: camera -> float32 [b, h, w, 3] in [-1, 1], or uint8; only cameras that exist.
        state: float32 [b, action_dim], normalised and padded.
        tokenized_prompt: int32 [b, l].
        tokenized_prompt_mask: bool [b, l], False for padding; None where there is none.
        image_masks: camera -> bool [b], False where a picture is missing; None where all are there.
    """

    images: dict[str, jax.Array]
    state: jax.Array
    tokenized_prompt: jax.Array
    tokenized_prompt_mask: jax.Array | None = None
    image_masks: dict[str, jax.Array] | None = None


def time_embedding(time: jax.Array, width: int) -> jax.Array:
    """Sines and cosines of time [b] with periods from 4e-3 to 4, geometrically spaced -> float32 [b, width]."""
    shortest, longest = TIME_PERIODS
    period = shortest * (longest / shortest) ** jnp.linspace(0.0, 1.0, width // 2)
    angle = time[:, None] * (1.0 / period * 2 * jnp.pi)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def attention_mask(valid: jax.Array | None, opens_block: jax.Array) -> jax.Array:
    """Which token may look at which.

    Args:
        valid: bool [b, n], False for padding; None: there is none.
        opens_block: bool [n]; a token sees all blocks up to its own.

    Returns:
        bool [b or 1, n (looking), n (seen)].
    """
    block = jnp.cumsum(opens_block)
    seen = (block[None, :] <= block[:, None])[None]
    return seen if valid is None else seen & valid[:, None, :] & valid[:, :, None]


def embed_prefix(
    config: Pi0Config, params: dict, observation: Observation
) -> tuple[jax.Array, jax.Array | None]:
    """Return tokens [b, n, width] of pictures, prompt and, if configured, the state; and valid, bool [b, n], None if all are."""
    dtype, weights = jnp.dtype(config.dtype), params["PaliGemma"]
    batch = observation.tokenized_prompt.shape[0]
    # openpi's own order of cameras is that of their names.
    cameras = sorted(observation.images)
    pixels = jnp.concatenate([observation.images[camera] for camera in cameras])
    pixels = pixels / jnp.float32(255) * 2 - 1 if pixels.dtype == jnp.uint8 else pixels
    encoded = siglip.encode(config.siglip, weights["img"], pixels, dtype, config.remat)
    tokens = [
        *jnp.split(encoded, len(cameras)),
        gemma.embed(config.paligemma, weights["llm"], observation.tokenized_prompt, dtype),
    ]
    valid = None
    if observation.image_masks is not None or observation.tokenized_prompt_mask is not None:
        masks = (
            dict.fromkeys(cameras, jnp.ones(batch, bool))
            if observation.image_masks is None
            else observation.image_masks
        )
        prompt = observation.tokenized_prompt_mask
        prompt = jnp.ones(observation.tokenized_prompt.shape, bool) if prompt is None else prompt
        valid = [
            *(
                jnp.broadcast_to(masks[camera][:, None], (batch, encoded.shape[1]))
                for camera in cameras
            ),
            prompt,
        ]
    if config.is_pi05 and config.continuous_state_token:
        tokens.append(dense(params["state_proj"], observation.state)[:, None].astype(dtype))
        if valid is not None:
            valid.append(jnp.ones((batch, 1), bool))
    return jnp.concatenate(tokens, axis=1), None if valid is None else jnp.concatenate(
        valid, axis=1
    )


def time_condition(params: dict, time: jax.Array, width: int) -> jax.Array:
    """What Pi0.5's adaptive norms are given of time [b], float32 [b, width]."""
    hidden = jax.nn.swish(dense(params["time_mlp_in"], time_embedding(time, width)))
    return jax.nn.swish(dense(params["time_mlp_out"], hidden))


def embed_suffix(
    config: Pi0Config, params: dict, state: jax.Array, noisy_actions: jax.Array, time: jax.Array
):
    """Embed noisy actions [b, horizon, action_dim] at time [b].

    Returns:
        (tokens [b, n, width of the expert], opens_block bool [n], condition [b, width] or None).
    """
    dtype = jnp.dtype(config.dtype)
    actions = dense(params["action_in_proj"], noisy_actions)
    first = [True] + [False] * (config.action_horizon - 1)
    if config.is_pi05:
        return (
            actions.astype(dtype),
            jnp.array(first),
            time_condition(params, time, config.action_expert.width),
        )
    times = time_embedding(time, config.action_expert.width)
    both = jnp.concatenate([actions, jnp.broadcast_to(times[:, None], actions.shape)], axis=-1)
    mixed = dense(
        params["action_time_mlp_out"], jax.nn.swish(dense(params["action_time_mlp_in"], both))
    )
    own = dense(params["state_proj"], state)[:, None]
    return jnp.concatenate([own, mixed], axis=1).astype(dtype), jnp.array([True, *first]), None


def velocity(config: Pi0Config, params: dict, suffix_out: jax.Array) -> jax.Array:
    """Read the velocity [b, horizon, action_dim], float32, off the expert's outputs."""
    return dense(
        params["action_out_proj"], suffix_out[:, -config.action_horizon :].astype(jnp.float32)
    )


def positions_of(valid: jax.Array) -> jax.Array:
    """Number the tokens, padding not counted, int32 [b, n]."""
    return jnp.cumsum(valid, axis=1) - 1


def flow_loss(
    config: Pi0Config,
    params: dict,
    observation: Observation,
    actions: jax.Array,
    noise: jax.Array,
    time: jax.Array,
):
    """Mean square error of the velocity at given noise and time.

    Args:
        actions, noise: float32 [b, horizon, action_dim].
        time: float32 [b] in (0, 1].

    Returns:
        float32 [b, horizon], the mean over all action dimensions, padding included.
    """
    at = time[:, None, None]
    noisy, target = at * noise + (1 - at) * actions, noise - actions
    prefix, prefix_valid = embed_prefix(config, params, observation)
    suffix, opens_block, condition = embed_suffix(config, params, observation.state, noisy, time)
    prefix_valid = jnp.ones(prefix.shape[:2], bool) if prefix_valid is None else prefix_valid
    valid = jnp.concatenate([prefix_valid, jnp.ones(suffix.shape[:2], bool)], axis=1)
    mask = attention_mask(valid, jnp.concatenate([jnp.zeros(prefix.shape[1], bool), opens_block]))
    _, suffix_out = gemma.run(
        (config.paligemma, config.action_expert),
        params["PaliGemma"]["llm"],
        [prefix, suffix],
        [None, condition],
        positions_of(valid),
        mask,
        remat=config.remat,
    )
    return jnp.mean(jnp.square(velocity(config, params, suffix_out) - target), axis=-1)


def compute_loss(
    config: Pi0Config,
    params: dict,
    key: jax.Array,
    observation: Observation,
    actions: jax.Array,
    num_noise_samples: int = 1,
) -> jax.Array:
    """`flow_loss` at noise and time drawn from `key`, the same that openpi draws: time is Beta(1.5, 1) * 0.999 + 0.001.

    With several `num_noise_samples` a sample, ours, the loss is their mean, and pictures and prompt are read once for all of them.
    """
    _, noise_key, time_key = jax.random.split(key, 3)  # the first is that of openpi's augmentation
    several = () if num_noise_samples == 1 else (num_noise_samples,)
    noise = jax.random.normal(noise_key, (*several, *actions.shape))
    time = jax.random.beta(time_key, 1.5, 1, (*several, *actions.shape[:1])) * 0.999 + 0.001
    if several:
        return flow_losses(config, params, observation, actions, noise, time).mean(axis=0)
    return flow_loss(config, params, observation, actions, noise, time)


def flow_losses(
    config: Pi0Config,
    params: dict,
    observation: Observation,
    actions: jax.Array,
    noise: jax.Array,
    time: jax.Array,
):
    """`flow_loss` of several draws of noise [k, b, horizon, action_dim] and time [k, b], float32 [k, b, horizon].

    Pictures and prompt go through PaliGemma once. Its layers are unrolled: this is for small models.
    """
    prefix, valid = embed_prefix(config, params, observation)
    valid = jnp.ones(prefix.shape[:2], bool) if valid is None else valid
    mask, positions = attention_mask(valid, jnp.zeros(prefix.shape[1], bool)), positions_of(valid)
    llm, towers = params["PaliGemma"]["llm"], (config.paligemma, config.action_expert)
    layers, tokens, caches = unstack(llm["layers"]), [prefix], []
    for layer in layers:
        tokens, cache = gemma.layer(towers[:1], layer, tokens, [None], positions, mask)
        caches.append(cache)

    def loss(noise, time):
        at = time[:, None, None]
        suffix, opens_block, condition = embed_suffix(
            config, params, observation.state, at * noise + (1 - at) * actions, time
        )
        own = attention_mask(None, opens_block)
        seen = [
            jnp.broadcast_to(part, (len(valid), own.shape[1], part.shape[-1]))
            for part in (valid[:, None], own)
        ]
        places = valid.sum(axis=1)[:, None] + jnp.arange(suffix.shape[1])
        both = [None, suffix]
        for layer, cache in zip(layers, caches, strict=True):
            both, _ = gemma.layer(
                towers,
                layer,
                both,
                [None, condition],
                places,
                jnp.concatenate(seen, axis=-1),
                cache,
            )
        out, _ = gemma.rms_norm(llm["final_norm_1"], both[1], condition)
        return jnp.mean(jnp.square(velocity(config, params, out) - (noise - actions)), axis=-1)

    return jax.vmap(loss)(noise, time)
