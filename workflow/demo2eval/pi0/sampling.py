"""Sampling: the flow integrated from noise to actions, with weights in a GPU's fastest form.

`fold_params` is done once for a checkpoint; it changes no result beyond rounding:

- each layer has arrays of its own, so that none is cut out of a stack for every use, in the dtype
  of the computation;
- query, key and value are one matrix, and so are the gate and the upward half of the feed-forward,
  which makes half as many products;
- low-rank updates are added to their matrices;
- what the adaptive norms get from time is computed for the steps' times, the same for every
  observation.

`sample_folded` then skips what no action depends on: the prefix's last layer but for its keys and
values, and the prefix's final norm.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from demo2eval.pi0 import gemma
from demo2eval.pi0.config import GemmaConfig, Pi0Config
from demo2eval.pi0.layers import dense, has_fused_attention, unstack
from demo2eval.pi0.model import (
    Actions,
    Observation,
    embed_prefix,
    embed_suffix,
    make_adarms_cond,
    make_attn_mask,
    make_positions,
    make_suffix_attn_mask,
    predict_v_t,
)

LARGE_BATCH = 8
ADAPTIVE_NORMS = ("pre_attention_norm_1", "pre_ffw_norm_1")


def make_times(num_steps: int) -> Float[np.ndarray, " {num_steps}"]:
    """Return the time at the start of each Euler step, from 1 down, summed up as openpi does."""
    return np.cumsum([1.0] + [-1 / num_steps] * (num_steps - 1), dtype=np.float32)


def sample_actions(
    config: Pi0Config,
    params: dict,
    observation: Observation,
    noise: Actions,
    num_steps: int = 10,
) -> Actions:
    """Sample actions with the parameters as they are; for a single use. See `sample_folded`."""
    return sample_folded(config, fold_params(config, params, num_steps), observation, noise)


def sample_folded(
    config: Pi0Config, folded: dict, observation: Observation, noise: Actions
) -> Actions:
    """Integrate the flow from noise at time 1 to actions at time 0 by Euler's method.

    The prefix is computed once.

    Args:
        folded: from `fold_params`, which sets the number of steps.
        noise: float32.

    Returns:
        actions, float32, normalized and padded.
    """
    experts = (config.paligemma, config.action_expert)
    llm, steps = folded["PaliGemma"]["llm"], folded["steps"]
    num_steps = steps["time"].shape[0]
    prefix_tokens, prefix_mask = embed_prefix(config, folded, observation)
    suffix_length = config.action_horizon + (0 if config.is_pi05 else 1)
    prefix_length = prefix_tokens.shape[1]
    cache_length = prefix_length + suffix_length
    # One block that sees everything needs no mask. The kernel for that is worth its while if it is
    # given enough to do.
    unmasked = (
        prefix_mask is None
        and config.is_pi05
        and noise.shape[0] >= LARGE_BATCH
        and has_fused_attention(prefix_tokens.dtype)
    )
    if not unmasked:
        # Lengths that are no multiple of 8 are copied before each matrix product on a GPU.
        cache_length = -(cache_length // -8) * 8
    kv_caches = prefill(config, llm["layers"], prefix_tokens, prefix_mask, cache_length)
    if prefix_mask is None:
        prefix_mask = jnp.ones((1, prefix_length), bool)
    positions = prefix_mask.sum(axis=1)[:, None] + jnp.arange(suffix_length)
    unused = cache_length - prefix_length - suffix_length

    def euler_step(carry, step):
        x_t, kv_caches = carry
        time = jnp.broadcast_to(step["time"], x_t.shape[:1])
        suffix_tokens, ar_mask, _ = embed_suffix(config, folded, observation.state, x_t, time)
        attn_mask = None
        if not unmasked:
            attn_mask = make_suffix_attn_mask(prefix_mask, ar_mask)
            attn_mask = jnp.pad(attn_mask, ((0, 0), (0, 0), (0, unused)))
        tokens, filled_caches = [None, suffix_tokens], []
        for index, (layer, kv_cache) in enumerate(zip(llm["layers"], kv_caches, strict=True)):
            if config.is_pi05:
                modulations = step["layers"][index].items()
                layer = layer | {name: {"modulation": value} for name, value in modulations}
            tokens, kv_cache = gemma.block(
                experts, layer, tokens, [None, None], positions, attn_mask, kv_cache, prefix_length
            )
            filled_caches.append(kv_cache)
        final = {"modulation": step["final_norm_1"]} if config.is_pi05 else llm["final_norm_1"]
        suffix_out, _ = gemma.rms_norm(final, tokens[1], None)
        v_t = predict_v_t(config, folded, suffix_out)
        return (x_t - v_t / num_steps, filled_caches), None

    (actions, _), _ = jax.lax.scan(euler_step, (noise, kv_caches), steps)
    return actions


def prefill(
    config: Pi0Config,
    layers: list[dict],
    prefix_tokens: Float[Array, "b n d"],
    prefix_mask: Bool[Array, "b n"] | None,
    cache_length: int,
) -> list[gemma.KVCache]:
    """Run the prefix through PaliGemma and return each layer's keys and values.

    Args:
        layers: folded parameters of each.
        prefix_mask: False for padding; None: there is none.
        cache_length: of the caches to return, with room at the end.
    """
    if prefix_mask is None:
        attn_mask, positions = None, jnp.arange(prefix_tokens.shape[1])[None]
    else:
        attn_mask = make_attn_mask(prefix_mask, jnp.zeros(prefix_tokens.shape[1], bool))
        positions = make_positions(prefix_mask)
    tokens, kv_caches = [prefix_tokens], []
    for layer in layers[:-1]:
        tokens, kv_cache = gemma.block(
            (config.paligemma,), layer, tokens, [None], positions, attn_mask
        )
        kv_caches.append(kv_cache)
    kv_caches.append(gemma.compute_kv(config.paligemma, layers[-1], tokens[0], positions))
    room = ((0, 0), (0, cache_length - prefix_tokens.shape[1]), (0, 0), (0, 0))
    return jax.tree.map(lambda array: jnp.pad(array, room), kv_caches)


def compiler_options(batch: int) -> dict[str, bool]:
    """Return XLA's options for `sample_folded` on this device.

    For large batches, cuBLAS alone is faster than with Triton's products beside it.
    """
    large = jax.default_backend() == "gpu" and batch >= LARGE_BATCH
    return {"xla_gpu_enable_triton_gemm": False} if large else {}


def fold_params(config: Pi0Config, params: dict, num_steps: int = 10) -> dict:
    """Return the weights as `sample_folded` takes them.

    In memory they are as large as the model in the dtype of its computation.

    Args:
        params: the model's parameters, openpi's tree.
        num_steps: Euler steps from noise to actions.
    """
    dtype, paligemma = jnp.dtype(config.dtype), params["PaliGemma"]
    llm, experts = paligemma["llm"], (config.paligemma, config.action_expert)
    embedding = llm["embedder"]["input_embedding"]
    scaled = (embedding * jnp.sqrt(config.paligemma.width).astype(embedding.dtype)).astype(dtype)
    folded = {
        **{name: value for name, value in params.items() if name != "PaliGemma"},
        "PaliGemma": {
            "img": _fold_siglip(paligemma["img"], dtype),
            "llm": {
                "embedder": {"scaled_embedding": scaled},
                "layers": [_fold_layer(experts, layer, dtype) for layer in unstack(llm["layers"])],
            },
        },
    }
    if not config.is_pi05:
        folded["PaliGemma"]["llm"]["final_norm_1"] = llm["final_norm_1"]
    return folded | {"steps": _fold_steps(config, params, num_steps)}


def _fold_steps(config: Pi0Config, params: dict, num_steps: int) -> dict:
    """Return what each Euler step needs: its time and, for Pi0.5, the modulation of every norm."""
    time = jnp.asarray(make_times(num_steps))
    if not config.is_pi05:
        return {"time": time}
    llm = params["PaliGemma"]["llm"]
    adarms_cond = make_adarms_cond(params, time, config.action_expert.width).astype(config.dtype)
    norms = {
        name: jax.vmap(dense, in_axes=(0, None))(llm["layers"][name]["Dense_0"], adarms_cond)
        for name in ADAPTIVE_NORMS
    }
    # [num_steps, 1, 3 d] of each layer, the 1 to go with any batch.
    layers = [
        {name: norms[name][index][:, None] for name in ADAPTIVE_NORMS}
        for index in range(config.action_expert.depth)
    ]
    final_norm = dense(llm["final_norm_1"]["Dense_0"], adarms_cond)[:, None]
    return {"time": time, "layers": layers, "final_norm_1": final_norm}


def _fold_siglip(params: dict, dtype) -> dict:
    """Join query, key and value of the vision encoder's blocks: kernel [d, 3 heads head_dim]."""
    blocks = []
    for block in unstack(params["Transformer"]["encoderblock"]):
        attention = block.pop("MultiHeadDotProductAttention_0")
        heads = [attention[name] for name in ("query", "key", "value")]
        qkv = {
            "kernel": jnp.concatenate([_matrix(head["kernel"], 1) for head in heads], axis=1),
            "bias": jnp.concatenate([head["bias"].reshape(-1) for head in heads]),
        }
        out = {"kernel": _matrix(attention["out"]["kernel"], 2), "bias": attention["out"]["bias"]}
        block["MultiHeadDotProductAttention_0"] = _cast({"qkv": qkv, "out": out}, dtype)
        block["MlpBlock_0"] = _cast(block["MlpBlock_0"], dtype)
        blocks.append(block)
    transformer = params["Transformer"] | {"encoderblock": blocks}
    return params | {"Transformer": transformer, "head": _cast(params["head"], dtype)}


def _fold_layer(experts: tuple[GemmaConfig, GemmaConfig], layer: dict, dtype) -> dict:
    """Join and cast the matrices of both experts in one layer."""
    attention, folded = layer["attn"], {"attn": {}}
    for suffix, config in zip(("", "_1"), experts, strict=True):
        if config.num_heads == config.num_kv_heads:
            heads = list(_merge(attention[f"qkv_einsum{suffix}"], config))
        else:
            heads = [
                _merge(attention[f"q_einsum{suffix}"], config),
                *_merge(attention[f"kv_einsum{suffix}"], config),
            ]
        qkv = jnp.concatenate([_matrix(head.transpose(1, 0, 2), 1) for head in heads], axis=1)
        out = _matrix(_merge_outputs(attention[f"attn_vec_einsum{suffix}"], config), 2)
        folded["attn"] |= {f"qkv{suffix}": qkv.astype(dtype), f"out{suffix}": out.astype(dtype)}
        mlp = layer[f"mlp{suffix}"]
        gate_and_up = jnp.concatenate(
            list(_merge_feed_forward(mlp, "gating_einsum", config)), axis=1
        )
        down = _merge_feed_forward(mlp, "linear", config)
        folded[f"mlp{suffix}"] = {
            "gate_and_up": gate_and_up.astype(dtype),
            "down": down.astype(dtype),
        }
        for norm in (f"pre_attention_norm{suffix}", f"pre_ffw_norm{suffix}"):
            if "scale" in layer[norm]:
                folded[norm] = layer[norm]
    return folded


def _merge(params: dict, config: GemmaConfig) -> jax.Array:
    """Add the low-rank update of an attention projection to its matrix."""
    if config.lora is None:
        return params["w"]
    wide = {name: value.astype(jnp.float32) for name, value in params.items()}
    return wide["w"] + (wide["lora_a"] @ wide["lora_b"]) * (
        config.lora.attention_alpha / config.lora.attention_rank
    )


def _merge_outputs(params: dict, config: GemmaConfig) -> jax.Array:
    """The same for the output projection, whose update sums the heads: see `gemma.lora_einsum`."""
    if config.lora is None:
        return params["w"]
    return _merge(params | {"lora_b": params["lora_b"].sum(axis=0, keepdims=True)}, config)


def _merge_feed_forward(params: dict, name: str, config: GemmaConfig) -> jax.Array:
    """The same for the feed-forward, whose update openpi does not scale."""
    if config.lora is None:
        return params[name]
    first, second = (params[f"{name}_lora_{factor}"].astype(jnp.float32) for factor in "ab")
    return params[name].astype(jnp.float32) + first @ second


def _matrix(array: jax.Array, rows: int) -> jax.Array:
    """Reshape to a matrix whose rows are the first `rows` axes."""
    return array.reshape(int(np.prod(array.shape[:rows])), -1)


def _cast(tree: dict, dtype) -> dict:
    return jax.tree.map(lambda array: array.astype(dtype), tree)
