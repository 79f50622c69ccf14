"""Two Gemma towers that attend together: PaliGemma's language model and the action expert (Black et al., 2024).

Tokens of the towers are concatenated for attention only; each tower has its own weights. The expert's norms may be conditioned on
time (adaptive RMSNorm; Pi0.5).
"""

import jax
import jax.numpy as jnp

from demo2eval.pi0.config import GemmaConfig
from demo2eval.pi0.layers import dense, fused_attention, has_fused_attention, over_layers

MASKED_LOGIT = -2.3819763e38
ROPE_BASE = 10_000


def rms_norm(
    params: dict, x: jax.Array, condition: jax.Array | None
) -> tuple[jax.Array, jax.Array | None]:
    """RMS normalisation in float32, eps 1e-6.

    Args:
        params: the norm's scale; for an adaptive norm the Dense that gives scale, shift and gate, or what it gave, `modulation`
            [b or 1, 3 width].
        x: [b, n, width].
        condition: [b, width] for an adaptive norm's Dense; else None.

    Returns:
        (normed x in x's dtype, gate [b, 1, width] for the residual or None).
    """
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    if "scale" in params:
        return (normed * (1 + params["scale"].astype(jnp.float32))).astype(x.dtype), None
    modulation = (
        params["modulation"]
        if "modulation" in params
        else dense(params["Dense_0"], condition.astype(x.dtype))
    )
    scale, shift, gate = jnp.split(modulation[:, None, :], 3, axis=-1)
    return (normed * (1 + scale) + shift).astype(x.dtype), gate


def rope(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Rotate [b, n, heads, head_dim] by positions [b, n] (Su et al., 2021); the halves of head_dim are the pairs."""
    half = x.shape[-1] // 2
    timescale = ROPE_BASE ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) / timescale
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    ).astype(x.dtype)


def project(equation: str, x: jax.Array, params: dict, config: GemmaConfig) -> jax.Array:
    """einsum with the matrix of an attention projection, and its low-rank update (Hu et al., 2021) if there is one.

    As in openpi, the update's first factor maps to the equation's output with the rank in place of its last axis. For the output
    projection this adds up the heads before the second factor, so that the update of all heads has that rank.
    """
    result = jnp.einsum(equation, x, params["w"].astype(x.dtype))
    if config.lora is None:
        return result
    inputs, matrix, output = equation.replace("->", ",").split(",")
    before, after = matrix[-2:]
    low = output.replace(after, "r")
    update = jnp.einsum(
        f"{inputs},{matrix.replace(after, 'r')}->{low}", x, params["lora_a"].astype(x.dtype)
    )
    update = jnp.einsum(
        f"{low},{matrix.replace(before, 'r')}->{output}", update, params["lora_b"].astype(x.dtype)
    )
    return result + update * (config.lora.attention_alpha / config.lora.attention_rank)


def feed_forward(params: dict, x: jax.Array, config: GemmaConfig) -> jax.Array:
    """Gated GELU feed-forward (Shazeer, 2020), [b, n, width] -> [b, n, width]."""

    def matrix(name: str, values: jax.Array, index=()) -> jax.Array:
        result = values @ params[name][index].astype(x.dtype)
        if config.lora is None:
            return result
        low = values @ params[f"{name}_lora_a"][index].astype(x.dtype)
        # openpi scales the updates of attention by alpha / rank, but not these.
        return result + low @ params[f"{name}_lora_b"][index].astype(x.dtype)

    if "gate_and_up" in params:
        gate, up = jnp.split(x @ params["gate_and_up"], 2, axis=-1)
        return (jax.nn.gelu(gate, approximate=True) * up) @ params["down"]
    hidden = jax.nn.gelu(matrix("gating_einsum", x, 0), approximate=True) * matrix(
        "gating_einsum", x, 1
    )
    return matrix("linear", hidden)


def attend(query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None) -> jax.Array:
    """Grouped-query attention with float32 logits.

    Args:
        query: [b, q, heads, head_dim], already scaled.
        key, value: [b, n, kv heads, head_dim].
        mask: bool [b or 1, q, n], True where a query may look; None: everywhere.

    Returns:
        [b, q, heads, head_dim] in query's dtype.
    """
    batch, length, heads, head_dim = query.shape
    if mask is None and has_fused_attention(query.dtype):
        if key.shape[2] > 1 or length == key.shape[1]:
            return fused_attention(query, key, value, scale=1.0)
        # Few queries and one head of keys: all heads' queries together fill the kernel's tiles better.
        return fused_attention(
            query.reshape(batch, -1, 1, head_dim), key, value, scale=1.0
        ).reshape(query.shape)
    groups = query.reshape(batch, length, key.shape[2], heads // key.shape[2], head_dim).transpose(
        0, 2, 3, 1, 4
    )
    # Written out, not as einsum, so that the logits of one query lie side by side, which makes the softmax several times faster.
    rows = groups.reshape(batch, key.shape[2], -1, head_dim)
    logits = jax.lax.dot_general(
        rows, key, (((3,), (3,)), ((0, 1), (0, 2))), preferred_element_type=jnp.float32
    )
    if mask is not None:
        by_query = logits.reshape(*groups.shape[:4], -1)
        logits = jnp.where(mask[:, None, None], by_query, MASKED_LOGIT).reshape(logits.shape)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    mixed = jax.lax.dot_general(weights, value, (((3,), (1,)), ((0, 1), (0, 2))))
    return mixed.reshape(groups.shape).transpose(0, 3, 1, 2, 4).reshape(query.shape)


def layer(
    configs,
    params: dict,
    tokens: list,
    conditions: list,
    positions: jax.Array,
    mask,
    cache=None,
    start: int | None = None,
):
    """One layer of all towers.

    Args:
        params: the layer's parameters, of all towers.
        tokens: [b, n_i, width_i] of each tower, or None for a tower without tokens.
        cache: (keys, values), each [b, n, kv heads, head_dim], of tokens that were computed before; or None.
        start: where in the cache there is room for this call's tokens; None: they are put behind it.

    Returns:
        (tokens, (keys, values) of all tokens that were looked at).
    """
    suffixes = [("" if index == 0 else f"_{index}") for index in range(len(tokens))]
    present = [index for index, x in enumerate(tokens) if x is not None]
    queries, keys, values, gates = [], [], [], {}
    for index in present:
        config, suffix, attention = configs[index], suffixes[index], params["attn"]
        normed, gates[index] = rms_norm(
            params[f"pre_attention_norm{suffix}"], tokens[index], conditions[index]
        )
        query, key, value = project_inputs(normed, attention, suffix, config)
        queries.append(query)
        keys.append(key)
        values.append(value)
    query = rope(jnp.concatenate(queries, axis=1), positions) * configs[0].head_dim ** -0.5
    key, value = rope(jnp.concatenate(keys, axis=1), positions), jnp.concatenate(values, axis=1)
    if cache is not None:
        pairs = zip(cache, (key, value), strict=True)
        key, value = (
            jnp.concatenate(pair, axis=1)
            if start is None
            else jax.lax.dynamic_update_slice_in_dim(*pair, start, axis=1)
            for pair in pairs
        )
    mixed, first, result = attend(query, key, value, mask), 0, list(tokens)
    for index in present:
        config, suffix, x = configs[index], suffixes[index], tokens[index]
        own = mixed[:, first : first + x.shape[1]]
        first += x.shape[1]
        x = gated(x, project_outputs(own, params["attn"], suffix, config), gates[index])
        normed, gate = rms_norm(params[f"pre_ffw_norm{suffix}"], x, conditions[index])
        result[index] = gated(x, feed_forward(params[f"mlp{suffix}"], normed, config), gate)
    return result, (key, value)


def project_inputs(
    x: jax.Array, params: dict, suffix: str, config: GemmaConfig
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Project tokens [b, n, width] to query [b, n, heads, head_dim], key and value [b, n, kv heads, head_dim]."""
    if f"qkv{suffix}" in params:
        split = (x @ params[f"qkv{suffix}"]).reshape(*x.shape[:2], -1, config.head_dim)
        ends = config.num_heads, config.num_heads + config.num_kv_heads
        return tuple(jnp.split(split, ends, axis=2))
    if config.num_kv_heads == config.num_heads:
        query, key, value = project("btd,chdk->cbthk", x, params[f"qkv_einsum{suffix}"], config)
        return query, key, value
    query = project("btd,hdk->bthk", x, params[f"q_einsum{suffix}"], config)
    key, value = project("btd,chdk->cbthk", x, params[f"kv_einsum{suffix}"], config)
    return query, key, value


def project_outputs(mixed: jax.Array, params: dict, suffix: str, config: GemmaConfig) -> jax.Array:
    """Project the heads back, [b, n, heads, head_dim] -> [b, n, width]."""
    if f"out{suffix}" in params:
        return mixed.reshape(*mixed.shape[:2], -1) @ params[f"out{suffix}"]
    return project("bthk,hkd->btd", mixed, params[f"attn_vec_einsum{suffix}"], config)


def gated(x: jax.Array, y: jax.Array, gate: jax.Array | None) -> jax.Array:
    """The residual x + y, or x + y * gate."""
    return x + y if gate is None else x + y * gate


def embed(config: GemmaConfig, params: dict, tokens: jax.Array, dtype) -> jax.Array:
    """Look up prompt tokens [b, l] -> [b, l, width], times sqrt(width)."""
    if "scaled_embedding" in params["embedder"]:
        return params["embedder"]["scaled_embedding"][tokens]
    embedded = params["embedder"]["input_embedding"][tokens]
    return (embedded * jnp.sqrt(config.width).astype(embedded.dtype)).astype(dtype)


def keys_and_values(
    config: GemmaConfig, params: dict, x: jax.Array, positions: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Return what the first tower's tokens x [b, n, width] show to others in a layer, each [b, n, kv heads, head_dim]."""
    normed, _ = rms_norm(params["pre_attention_norm"], x, None)
    _, key, value = project_inputs(normed, params["attn"], "", config)
    return rope(key, positions), value


def run(
    configs,
    params: dict,
    tokens: list,
    conditions: list,
    positions: jax.Array,
    mask: jax.Array,
    remat: bool = False,
) -> list:
    """Run all layers and the final norms.

    Args:
        configs: `GemmaConfig` of each tower.
        params: the tree below PaliGemma/llm.
        tokens: [b, n_i, width_i] of each tower.
        conditions: [b, width_i] of each tower, or None where norms are plain.
        positions: int32 [b, sum of n_i].
        mask: bool [b or 1, sum of n_i, sum of n_i].
        remat: recompute each layer in the backward pass.

    Returns:
        normed outputs of each tower.
    """

    def step(layer_params, carry):
        return layer(configs, layer_params, carry, conditions, positions, mask)[0]

    outputs = over_layers(step, params["layers"], tokens, remat=remat)
    names = ["final_norm" if index == 0 else f"final_norm_{index}" for index in range(len(outputs))]
    return [
        rms_norm(params[name], x, condition)[0]
        for name, x, condition in zip(names, outputs, conditions, strict=True)
    ]
