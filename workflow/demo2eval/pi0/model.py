"""Pi0 and Pi0.5: flow matching over action chunks, given images, prompt and state.

The prefix (images, prompt) goes through PaliGemma, the suffix (noisy actions, in Pi0 the state
before them) through the action expert. Time 1 is noise: x_t = t noise + (1 - t) actions, and the
model's v_t should be u_t = noise - actions (Black et al., 2024; Physical Intelligence, 2025).

Shapes: b is the batch, n tokens, ah `action_horizon`, ad `action_dim`.
"""

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, UInt8

from demo2eval.pi0 import gemma, siglip
from demo2eval.pi0.config import Pi0Config
from demo2eval.pi0.layers import apply_layers, dense, has_fused_attention, unstack

MIN_PERIOD, MAX_PERIOD = 4e-3, 4.0

Actions = Float[Array | np.ndarray, "b ah ad"]
Time = Float[Array | np.ndarray, " b"]


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Observation:
    """What the policy sees, a batch of b.

    Attributes:
        images: camera -> float32 in [-1, 1], or uint8; only cameras that exist.
        state: normalized and padded.
        tokenized_prompt: padded to l tokens.
        tokenized_prompt_mask: False for padding; None where there is none.
        image_masks: camera -> False where an image is missing; None where all are there.
    """

    images: dict[str, Float[Array, "b h w 3"] | UInt8[Array, "b h w 3"]]
    state: Float[Array, "b ad"]
    tokenized_prompt: Int[Array, "b l"]
    tokenized_prompt_mask: Bool[Array, "b l"] | None = None
    image_masks: dict[str, Bool[Array, " b"]] | None = None


def posemb_sincos(time: Time, dim: int) -> Float[Array, "b {dim}"]:
    """Sines and cosines of time with periods from 4e-3 to 4, geometrically spaced, float32."""
    period = MIN_PERIOD * (MAX_PERIOD / MIN_PERIOD) ** jnp.linspace(0.0, 1.0, dim // 2)
    angle = time[:, None] * (1.0 / period * 2 * jnp.pi)
    return jnp.concatenate([jnp.sin(angle), jnp.cos(angle)], axis=-1)


def make_attn_mask(
    input_mask: Bool[Array, "b n"] | None, ar_mask: Bool[Array, " n"]
) -> Bool[Array, "#b n n"]:
    """Return which token (row) attends to which (column).

    Args:
        input_mask: False for padding; None: there is none.
        ar_mask: True where a new block begins; a token attends to all blocks up to its own.
    """
    block = jnp.cumsum(ar_mask)
    attn_mask = (block[None, :] <= block[:, None])[None]
    if input_mask is None:
        return attn_mask
    return attn_mask & input_mask[:, None, :] & input_mask[:, :, None]


def make_suffix_attn_mask(
    prefix_mask: Bool[Array, "b p"], ar_mask: Bool[Array, " s"]
) -> Bool[Array, "b s p+s"]:
    """Return which tokens of prefix and suffix each suffix token attends to."""
    batch, (length,) = len(prefix_mask), ar_mask.shape
    prefix_attn_mask = jnp.broadcast_to(prefix_mask[:, None], (batch, length, prefix_mask.shape[1]))
    suffix_attn_mask = jnp.broadcast_to(make_attn_mask(None, ar_mask), (batch, length, length))
    return jnp.concatenate([prefix_attn_mask, suffix_attn_mask], axis=-1)


def make_positions(input_mask: Bool[Array, "b n"]) -> Int[Array, "b n"]:
    """Number the tokens, padding not counted."""
    return jnp.cumsum(input_mask, axis=1) - 1


def embed_prefix(
    config: Pi0Config, params: dict, observation: Observation
) -> tuple[Float[Array, "b n d"], Bool[Array, "b n"] | None]:
    """Embed images, prompt and, if so configured, the state.

    Returns:
        (tokens, input_mask, which is None if no token is padding).
    """
    dtype, paligemma = jnp.dtype(config.dtype), params["PaliGemma"]
    # openpi's own order of cameras is that of their names.
    cameras = sorted(observation.images)
    pixels = jnp.concatenate([observation.images[camera] for camera in cameras])
    pixels = pixels / jnp.float32(255) * 2 - 1 if pixels.dtype == jnp.uint8 else pixels
    remat = "all" if config.remat == "vision" else config.remat
    image_tokens = siglip.encode(config.siglip, paligemma["img"], pixels, dtype, remat)
    tokens = [
        *jnp.split(image_tokens, len(cameras)),
        gemma.embed(config.paligemma, paligemma["llm"], observation.tokenized_prompt, dtype),
    ]
    if config.is_pi05 and config.continuous_state_token:
        tokens.append(dense(params["state_proj"], observation.state)[:, None].astype(dtype))
    prefix_tokens = jnp.concatenate(tokens, axis=1)
    num_patches, num_tokens = image_tokens.shape[1], prefix_tokens.shape[1]
    return prefix_tokens, make_prefix_mask(observation, num_patches, num_tokens)


def make_prefix_mask(
    observation: Observation, num_patches: int, num_tokens: int
) -> Bool[Array, "b {num_tokens}"] | None:
    """Return the prefix's input_mask: False for missing images and padding; None without any."""
    if observation.image_masks is None and observation.tokenized_prompt_mask is None:
        return None
    batch = len(observation.tokenized_prompt)
    masks = []
    for camera in sorted(observation.images):
        image_masks = observation.image_masks
        image_mask = jnp.ones(batch, bool) if image_masks is None else image_masks[camera]
        masks.append(jnp.broadcast_to(image_mask[:, None], (batch, num_patches)))
    prompt_mask = observation.tokenized_prompt_mask
    if prompt_mask is None:
        prompt_mask = jnp.ones(observation.tokenized_prompt.shape, bool)
    masks.append(prompt_mask)
    # The state token, if there is one, is always there.
    state_tokens = num_tokens - sum(mask.shape[1] for mask in masks)
    return jnp.concatenate([*masks, jnp.ones((batch, state_tokens), bool)], axis=1)


def make_adarms_cond(params: dict, time: Time, dim: int) -> Float[Array, "b {dim}"]:
    """Return what Pi0.5's adaptive norms are given of time, float32."""
    hidden = jax.nn.swish(dense(params["time_mlp_in"], posemb_sincos(time, dim)))
    return jax.nn.swish(dense(params["time_mlp_out"], hidden))


def embed_suffix(
    config: Pi0Config,
    params: dict,
    state: Float[Array, "b ad"],
    x_t: Actions,
    time: Time,
) -> tuple[Float[Array, "b n d"], Bool[Array, " n"], Float[Array, "b d"] | None]:
    """Embed the noisy actions x_t; in Pi0 with the state before them and time mixed in.

    Returns:
        (tokens, ar_mask, adarms_cond, which is None for Pi0); d is the width of the action expert.
    """
    dtype, dim = jnp.dtype(config.dtype), config.action_expert.width
    action_tokens = dense(params["action_in_proj"], x_t)
    ar_mask = [True] + [False] * (config.action_horizon - 1)
    if config.is_pi05:
        adarms_cond = make_adarms_cond(params, time, dim)
        return action_tokens.astype(dtype), jnp.array(ar_mask), adarms_cond
    time_tokens = jnp.broadcast_to(posemb_sincos(time, dim)[:, None], action_tokens.shape)
    hidden = jnp.concatenate([action_tokens, time_tokens], axis=-1)
    hidden = jax.nn.swish(dense(params["action_time_mlp_in"], hidden))
    action_time_tokens = dense(params["action_time_mlp_out"], hidden)
    state_token = dense(params["state_proj"], state)[:, None]
    tokens = jnp.concatenate([state_token, action_time_tokens], axis=1)
    return tokens.astype(dtype), jnp.array([True, *ar_mask]), None


def predict_v_t(
    config: Pi0Config, params: dict, suffix_out: Float[Array, "b n d"]
) -> Float[Array, "b ah ad"]:
    """Read v_t, float32, off the action expert's outputs for the suffix."""
    action_out = suffix_out[:, -config.action_horizon :].astype(jnp.float32)
    return dense(params["action_out_proj"], action_out)


def add_noise(actions: Actions, noise: Actions, time: Time) -> tuple[Actions, Actions]:
    """Return x_t, the noisy actions at `time`, and u_t, the velocity that v_t should be."""
    time_expanded = time[:, None, None]
    return time_expanded * noise + (1 - time_expanded) * actions, noise - actions


def flow_loss(
    config: Pi0Config,
    params: dict,
    observation: Observation,
    actions: Actions,
    noise: Actions,
    time: Time,
) -> Float[Array, "b ah"]:
    """Mean square error of v_t at given noise and time, float32.

    Args:
        time: in (0, 1].

    Returns:
        the mean over all action dimensions, padding included.
    """
    return flow_losses(config, params, observation, actions, noise[None], time[None])[0]


def flow_losses(
    config: Pi0Config,
    params: dict,
    observation: Observation,
    actions: Actions,
    noise: Float[Array | np.ndarray, "k b ah ad"],
    time: Float[Array | np.ndarray, "k b"],
) -> Float[Array, "k b ah"]:
    """`flow_loss` of k draws of noise and time; images and prompt go through PaliGemma once."""
    x_t, u_t = jax.vmap(add_noise, in_axes=(None, 0, 0))(actions, noise, time)
    suffix_tokens, ar_mask, adarms_cond = jax.vmap(
        lambda x_t, time: embed_suffix(config, params, observation.state, x_t, time),
        out_axes=(0, None, 0),
    )(x_t, time)
    suffix_out = run_experts(config, params, observation, suffix_tokens, ar_mask, adarms_cond)
    v_t = jax.vmap(lambda tokens: predict_v_t(config, params, tokens))(suffix_out)
    return jnp.mean(jnp.square(v_t - u_t), axis=-1)


def run_experts(
    config: Pi0Config,
    params: dict,
    observation: Observation,
    suffix_tokens: Float[Array, "k b s d"],
    ar_mask: Bool[Array, " s"],
    adarms_cond: Float[Array, "k b d"] | None,
) -> Float[Array, "k b s d"]:
    """Run the prefix through PaliGemma, and k suffixes beside it through the action expert.

    No suffix depends on more of the prefix's last layer than its keys and values, so the rest of
    that layer is left out.

    Returns:
        the action expert's normed outputs.
    """
    prefix_tokens, prefix_mask = embed_prefix(config, params, observation)
    length, suffix_length = prefix_tokens.shape[1], suffix_tokens.shape[2]
    unmasked = prefix_mask is None and has_fused_attention(prefix_tokens.dtype, length)
    if prefix_mask is None:
        prefix_mask = jnp.ones(prefix_tokens.shape[:2], bool)
    prefix_attn_mask = None
    if not unmasked:
        prefix_attn_mask = make_attn_mask(prefix_mask, jnp.zeros(length, bool))
    suffix_attn_mask = make_suffix_attn_mask(prefix_mask, ar_mask)
    positions = make_positions(prefix_mask)
    suffix_positions = prefix_mask.sum(axis=1)[:, None] + jnp.arange(suffix_length)
    llm, experts = params["PaliGemma"]["llm"], (config.paligemma, config.action_expert)

    def apply_suffix(layer, suffix_tokens, kv_cache):
        def apply(tokens, adarms_cond):
            (_, tokens), _ = gemma.block(
                experts,
                layer,
                [None, tokens],
                [None, adarms_cond],
                suffix_positions,
                suffix_attn_mask,
                kv_cache,
            )
            return tokens

        return jax.vmap(apply)(suffix_tokens, adarms_cond)

    def apply_both(layer, tokens):
        prefix_tokens, suffix_tokens = tokens
        (prefix_out,), kv_cache = gemma.block(
            experts[:1],
            layer,
            [prefix_tokens],
            [None],
            positions,
            prefix_attn_mask,
        )
        return prefix_out, apply_suffix(layer, suffix_tokens, kv_cache)

    *layers, last_layer = unstack(llm["layers"])
    remat = "elementwise" if config.remat == "vision" else config.remat
    prefix_tokens, suffix_tokens = apply_layers(
        apply_both, layers, (prefix_tokens, suffix_tokens), remat=remat
    )
    kv_cache = gemma.compute_kv(config.paligemma, last_layer, prefix_tokens, positions)
    suffix_tokens = apply_suffix(last_layer, suffix_tokens, kv_cache)
    return jax.vmap(lambda x, cond: gemma.rms_norm(llm["final_norm_1"], x, cond)[0])(
        suffix_tokens, adarms_cond
    )


def draw_noise(
    key: jax.Array, shape: tuple[int, ...], num_noise_samples: int = 1
) -> tuple[Float[Array, "k b ah ad"], Float[Array, "k b"]]:
    """Draw noise and time for a batch, the same that openpi draws from a step's key.

    Time is Beta(1.5, 1) * 0.999 + 0.001.

    Args:
        shape: of the actions, (b, ah, ad).
        num_noise_samples: draws k per sample; openpi draws once.
    """
    # The first of the three is that of openpi's augmentation.
    _, noise_key, time_key = jax.random.split(key, 3)
    draws = () if num_noise_samples == 1 else (num_noise_samples,)
    noise = jax.random.normal(noise_key, (*draws, *shape))
    time = jax.random.beta(time_key, 1.5, 1, (*draws, *shape[:1])) * 0.999 + 0.001
    return noise.reshape(num_noise_samples, *shape), time.reshape(num_noise_samples, shape[0])
