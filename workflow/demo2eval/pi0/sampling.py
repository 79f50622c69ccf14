"""Sampling: the flow integrated from noise to actions, and the weights in the form in which a GPU reads them fastest.

`fold` is done once for a checkpoint; it changes no result beyond rounding:

- each layer has arrays of its own, so that none is cut out of a stack for every use, in the dtype of the computation;
- query, key and value are one matrix, and so are the gate and the upward half of the feed-forward, which makes half as many products;
- low-rank updates are added to their matrices;
- what the adaptive norms get from time is computed for the steps' times, the same for every observation.

`sample` then skips what no action depends on: the prefix's last layer but for its keys and values, and the prefix's final norm.
"""

import jax
import jax.numpy as jnp
import numpy as np

from demo2eval.pi0 import gemma
from demo2eval.pi0.config import GemmaConfig, Pi0Config
from demo2eval.pi0.layers import dense, has_fused_attention, unstack
from demo2eval.pi0.model import (
    Observation,
    attention_mask,
    embed_prefix,
    embed_suffix,
    positions_of,
    time_condition,
    velocity,
)

LARGE_BATCH = 8
ADAPTIVE_NORMS = ("pre_attention_norm_1", "pre_ffw_norm_1")


def times_of(num_steps: int) -> np.ndarray:
    """Return the time at the start of each Euler step, from 1 down, float32 [num_steps]; summed up in float32 as openpi does."""
    return np.cumsum([1.0] + [-1 / num_steps] * (num_steps - 1), dtype=np.float32)


def fold(config: Pi0Config, params: dict, num_steps: int = 10) -> dict:
    """Return the weights as `sample` takes them; their size in memory is that of the model in the dtype of its computation.

    Args:
        params: the model's parameters, openpi's tree.
        num_steps: of `sample`.
    """
    dtype, weights = jnp.dtype(config.dtype), params["PaliGemma"]
    llm, towers = weights["llm"], (config.paligemma, config.action_expert)
    embedding = llm["embedder"]["input_embedding"]
    scaled = (embedding * jnp.sqrt(config.paligemma.width).astype(embedding.dtype)).astype(dtype)
    folded = {
        **{name: value for name, value in params.items() if name != "PaliGemma"},
        "PaliGemma": {
            "img": _fold_siglip(weights["img"], dtype),
            "llm": {
                "embedder": {"scaled_embedding": scaled},
                "layers": [_fold_layer(towers, layer, dtype) for layer in unstack(llm["layers"])],
            },
        },
    }
    steps = {"time": jnp.asarray(times_of(num_steps))}
    if config.is_pi05:
        condition = time_condition(params, steps["time"], config.action_expert.width).astype(dtype)
        norms = {
            name: jax.vmap(dense, in_axes=(0, None))(llm["layers"][name]["Dense_0"], condition)
            for name in ADAPTIVE_NORMS
        }
        # [num_steps, 1, 3 width] of each layer, the 1 to go with any batch.
        steps["layers"] = [
            {name: norms[name][index][:, None] for name in ADAPTIVE_NORMS}
            for index in range(towers[1].depth)
        ]
        steps["final_norm_1"] = dense(llm["final_norm_1"]["Dense_0"], condition)[:, None]
    else:
        folded["PaliGemma"]["llm"]["final_norm_1"] = llm["final_norm_1"]
    return folded | {"steps": steps}


def _fold_siglip(params: dict, dtype) -> dict:
    """Join query, key and value of the vision tower's blocks: kernel [width, 3 heads head_dim]."""
    blocks = []
    for block in unstack(params["Transformer"]["encoderblock"]):
        attention = block.pop("MultiHeadDotProductAttention_0")
        joined = {
            "kernel": jnp.concatenate(
                [_matrix(attention[part]["kernel"], 1) for part in ("query", "key", "value")],
                axis=1,
            ),
            "bias": jnp.concatenate(
                [attention[part]["bias"].reshape(-1) for part in ("query", "key", "value")]
            ),
        }
        out = {"kernel": _matrix(attention["out"]["kernel"], 2), "bias": attention["out"]["bias"]}
        block["MultiHeadDotProductAttention_0"] = _cast({"qkv": joined, "out": out}, dtype)
        block["MlpBlock_0"] = _cast(block["MlpBlock_0"], dtype)
        blocks.append(block)
    transformer = params["Transformer"] | {"encoderblock": blocks}
    return params | {"Transformer": transformer, "head": _cast(params["head"], dtype)}


def _fold_layer(towers: tuple[GemmaConfig, GemmaConfig], layer: dict, dtype) -> dict:
    """Join and cast the matrices of both towers in one layer."""
    attention, result = layer["attn"], {"attn": {}}
    for suffix, config in zip(("", "_1"), towers, strict=True):
        if config.num_heads == config.num_kv_heads:
            heads = list(_merge(attention[f"qkv_einsum{suffix}"], config))
        else:
            heads = [
                _merge(attention[f"q_einsum{suffix}"], config),
                *_merge(attention[f"kv_einsum{suffix}"], config),
            ]
        qkv = jnp.concatenate([_matrix(head.transpose(1, 0, 2), 1) for head in heads], axis=1)
        out = _matrix(_merge_outputs(attention[f"attn_vec_einsum{suffix}"], config), 2)
        result["attn"] |= {f"qkv{suffix}": qkv.astype(dtype), f"out{suffix}": out.astype(dtype)}
        mlp = layer[f"mlp{suffix}"]
        gate_and_up = jnp.concatenate(
            list(_merge_feed_forward(mlp, "gating_einsum", config)), axis=1
        )
        down = _merge_feed_forward(mlp, "linear", config)
        result[f"mlp{suffix}"] = {
            "gate_and_up": gate_and_up.astype(dtype),
            "down": down.astype(dtype),
        }
        for norm in (f"pre_attention_norm{suffix}", f"pre_ffw_norm{suffix}"):
            if "scale" in layer[norm]:
                result[norm] = layer[norm]
    return result


def _merge(params: dict, config: GemmaConfig) -> jax.Array:
    """Add the low-rank update of an attention projection to its matrix."""
    if config.lora is None:
        return params["w"]
    wide = {name: value.astype(jnp.float32) for name, value in params.items()}
    return wide["w"] + (wide["lora_a"] @ wide["lora_b"]) * (
        config.lora.attention_alpha / config.lora.attention_rank
    )


def _merge_outputs(params: dict, config: GemmaConfig) -> jax.Array:
    """The same for the output projection, where the heads are summed before the second factor; see `gemma.project`."""
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


def sample(
    config: Pi0Config, folded: dict, observation: Observation, noise: jax.Array
) -> jax.Array:
    """Integrate the flow from noise at time 1 to actions at time 0 by Euler's method; the prefix is computed once.

    Args:
        folded: from `fold`, which sets the number of steps.
        noise: float32 [b, horizon, action_dim].

    Returns:
        actions, float32 [b, horizon, action_dim], normalised.
    """
    towers, llm, steps = (
        (config.paligemma, config.action_expert),
        folded["PaliGemma"]["llm"],
        folded["steps"],
    )
    prefix, prefix_valid = embed_prefix(config, folded, observation)
    own_length = config.action_horizon + (0 if config.is_pi05 else 1)
    start, length = prefix.shape[1], prefix.shape[1] + own_length
    # One block that sees everything needs no mask; the kernel for that is worth its while if it is given enough to do.
    unmasked = (
        prefix_valid is None
        and config.is_pi05
        and noise.shape[0] >= LARGE_BATCH
        and has_fused_attention(prefix.dtype)
    )
    if not unmasked:
        length = (
            -(length // -8) * 8
        )  # lengths that are no multiple of 8 are copied before each matrix product on a GPU
    caches = prefill(config, llm["layers"], prefix, prefix_valid, length)
    if prefix_valid is None:
        prefix_valid = jnp.ones((1, start), bool)
    seen = prefix_valid.sum(axis=1)[:, None]

    def step(carry, at):
        actions, caches = carry
        times = jnp.broadcast_to(at["time"], actions.shape[:1])
        tokens, opens_block, _ = embed_suffix(config, folded, observation.state, actions, times)
        mask = None if unmasked else _suffix_mask(prefix_valid, opens_block, length)
        positions, both, filled = seen + jnp.arange(own_length), [None, tokens], []
        for index, (params, cache) in enumerate(zip(llm["layers"], caches, strict=True)):
            norms = (
                {name: {"modulation": value} for name, value in at["layers"][index].items()}
                if config.is_pi05
                else {}
            )
            both, cache = gemma.layer(
                towers, params | norms, both, [None, None], positions, mask, cache, start
            )
            filled.append(cache)
        final = {"modulation": at["final_norm_1"]} if config.is_pi05 else llm["final_norm_1"]
        normed, _ = gemma.rms_norm(final, both[1], None)
        return (actions - velocity(config, folded, normed) / steps["time"].shape[0], filled), None

    (actions, _), _ = jax.lax.scan(step, (noise, caches), steps)
    return actions


def _suffix_mask(prefix_valid: jax.Array, opens_block: jax.Array, length: int) -> jax.Array:
    """Return what the suffix may look at in a cache of `length`: prefix, itself, and not the empty rest, bool [b or 1, own, length]."""
    own = attention_mask(None, opens_block)
    before = jnp.broadcast_to(
        prefix_valid[:, None], (prefix_valid.shape[0], own.shape[1], prefix_valid.shape[1])
    )
    mask = jnp.concatenate(
        [before, jnp.broadcast_to(own, (before.shape[0], *own.shape[1:]))], axis=-1
    )
    return jnp.pad(mask, ((0, 0), (0, 0), (0, length - mask.shape[-1])))


def prefill(
    config: Pi0Config, layers: list[dict], prefix: jax.Array, valid: jax.Array | None, length: int
) -> list:
    """Run the prefix through PaliGemma for its keys and values.

    Args:
        layers: folded parameters of each.
        prefix: tokens [b, n, width].
        valid: bool [b, n], False for padding; None: there is none.
        length: of the caches to return, with room at the end.

    Returns:
        (keys, values) of each layer, each [b, length, kv heads, head_dim].
    """
    if valid is None:
        mask, positions = None, jnp.arange(prefix.shape[1])[None]
    else:
        mask, positions = (
            attention_mask(valid, jnp.zeros(prefix.shape[1], bool)),
            positions_of(valid),
        )
    tokens, caches = [prefix], []
    for params in layers[:-1]:
        tokens, cache = gemma.layer((config.paligemma,), params, tokens, [None], positions, mask)
        caches.append(cache)
    caches.append(gemma.keys_and_values(config.paligemma, layers[-1], tokens[0], positions))
    room = length - prefix.shape[1]
    return jax.tree.map(lambda array: jnp.pad(array, ((0, 0), (0, room), (0, 0), (0, 0))), caches)


def compiler_options(batch: int) -> dict[str, bool]:
    """Return XLA's options for `sample` on this device: for large batches, cuBLAS alone is faster than with Triton's products beside it."""
    return (
        {"xla_gpu_enable_triton_gemm": False}
        if jax.default_backend() == "gpu" and batch >= LARGE_BATCH
        else {}
    )


def sample_actions(
    config: Pi0Config, params: dict, observation: Observation, noise: jax.Array, num_steps: int = 10
) -> jax.Array:
    """`sample` with the parameters as they are; for a single use."""
    return sample(config, fold(config, params, num_steps), observation, noise)
