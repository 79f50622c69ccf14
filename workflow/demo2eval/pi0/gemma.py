"""Two Gemma experts that attend together: PaliGemma's language model and the action expert.

Tokens of the experts are concatenated for attention only; each expert has its own weights (Black et
al., 2024). The action expert's norms may be conditioned on time (adaptive RMSNorm; Pi0.5).
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jaxtyping import Array, Bool, Float, Int

from demo2eval.pi0.config import GemmaConfig
from demo2eval.pi0.layers import dense, fused_attention, has_fused_attention

MASKED_LOGIT = -2.3819763e38
ROPE_BASE = 10_000

Keys = Float[Array, "b n kv_heads head_dim"]
Values = Float[Array, "b n kv_heads head_dim"]
KVCache = tuple[Float[Array, "b _ kv_heads head_dim"], Float[Array, "b _ kv_heads head_dim"]]


def rms_norm(
    params: dict, x: Float[Array, "b n d"], adarms_cond: Float[Array, "b c"] | None
) -> tuple[Float[Array, "b n d"], Float[Array, "#b 1 d"] | None]:
    """RMS normalization in float32, eps 1e-6.

    Args:
        params: the norm's scale; for an adaptive norm the Dense that gives scale, shift and gate,
            or what it gave, `modulation` [b or 1, 3 d].
        adarms_cond: what an adaptive norm's Dense is given; else None.

    Returns:
        (normed x in x's dtype, gate for the residual or None).
    """
    wide = x.astype(jnp.float32)
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + 1e-6)
    if "scale" in params:
        return (normed * (1 + params["scale"].astype(jnp.float32))).astype(x.dtype), None
    if "modulation" in params:  # computed once by sampling.fold_params
        modulation = params["modulation"]
    else:
        assert adarms_cond is not None
        modulation = dense(params["Dense_0"], adarms_cond.astype(x.dtype))
    scale, shift, gate = jnp.split(modulation[:, None, :], 3, axis=-1)
    return (normed * (1 + scale) + shift).astype(x.dtype), gate


def apply_rope(
    x: Float[Array, "b n heads head_dim"], positions: Int[Array, "#b n"]
) -> Float[Array, "b n heads head_dim"]:
    """Rotate x by its positions (Su et al., 2021); the halves of head_dim are the pairs."""
    half = x.shape[-1] // 2
    timescale = ROPE_BASE ** (jnp.arange(half, dtype=jnp.float32) / half)
    angle = positions[..., None, None].astype(jnp.float32) / timescale
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate(
        [first * cosine - second * sine, second * cosine + first * sine], axis=-1
    ).astype(x.dtype)


def lora_einsum(
    equation: str, x: Float[Array, "..."], params: dict, config: GemmaConfig
) -> Float[Array, "..."]:
    """einsum with the matrix of a projection, and its low-rank update if there is one.

    Hu et al., 2021. As in openpi, the update's first factor maps to the equation's output with the
    rank in place of its last axis. For the output projection this adds up the heads before the
    second factor, so that the update of all heads has that rank.
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


def feed_forward(
    params: dict, x: Float[Array, "b n d"], config: GemmaConfig
) -> Float[Array, "b n d"]:
    """Gated GELU feed-forward (Shazeer, 2020)."""

    def matmul(name: str, values: jax.Array, index=()) -> jax.Array:
        result = values @ params[name][index].astype(x.dtype)
        if config.lora is None:
            return result
        low = values @ params[f"{name}_lora_a"][index].astype(x.dtype)
        # openpi scales the updates of attention by alpha / rank, but not these.
        return result + low @ params[f"{name}_lora_b"][index].astype(x.dtype)

    if "gate_and_up" in params:  # joined by sampling.fold_params
        gate, up = jnp.split(x @ params["gate_and_up"], 2, axis=-1)
        return (jax.nn.gelu(gate, approximate=True) * up) @ params["down"]
    gate, up = (checkpoint_name(matmul("gating_einsum", x, index), "hidden") for index in (0, 1))
    return matmul("linear", jax.nn.gelu(gate, approximate=True) * up)


def attend(
    query: Float[Array, "b q heads head_dim"],
    key: Keys,
    value: Values,
    attn_mask: Bool[Array, "#b q n"] | None,
) -> Float[Array, "b q heads head_dim"]:
    """Grouped-query attention with float32 logits.

    Args:
        query: already scaled.
        attn_mask: True where a query may attend to a key; None: everywhere.

    Returns:
        the mixed values, in query's dtype.
    """
    batch, length, heads, head_dim = query.shape
    if attn_mask is None and has_fused_attention(query.dtype):
        if key.shape[2] > 1 or length == key.shape[1]:
            return fused_attention(query, key, value, scale=1.0)
        # Few queries and one head of keys: all heads' queries together fill the kernel's tiles
        # better.
        return fused_attention(
            query.reshape(batch, -1, 1, head_dim), key, value, scale=1.0
        ).reshape(query.shape)
    groups = query.reshape(batch, length, key.shape[2], heads // key.shape[2], head_dim).transpose(
        0, 2, 3, 1, 4
    )
    # Written out, not as einsum, so that the logits of one query lie side by side, which makes the
    # softmax several times faster.
    rows = groups.reshape(batch, key.shape[2], -1, head_dim)
    logits = jax.lax.dot_general(
        rows, key, (((3,), (3,)), ((0, 1), (0, 2))), preferred_element_type=jnp.float32
    )
    if attn_mask is not None:
        by_query = logits.reshape(*groups.shape[:4], -1)
        logits = jnp.where(attn_mask[:, None, None], by_query, MASKED_LOGIT).reshape(logits.shape)
    weights = jax.nn.softmax(logits, axis=-1).astype(value.dtype)
    encoded = jax.lax.dot_general(weights, value, (((3,), (1,)), ((0, 1), (0, 2))))
    return encoded.reshape(groups.shape).transpose(0, 3, 1, 2, 4).reshape(query.shape)


def block(
    configs: Sequence[GemmaConfig],
    params: dict,
    tokens: Sequence[Float[Array, "b _ _"] | None],
    adarms_cond: Sequence[Float[Array, "b _"] | None],
    positions: Int[Array, "#b n"],
    attn_mask: Bool[Array, "#b n m"] | None,
    kv_cache: KVCache | None = None,
    cache_offset: int | None = None,
) -> tuple[list, KVCache]:
    """One layer of all experts.

    Args:
        params: the layer's parameters, of all experts.
        tokens: of each expert, n in all; or None for an expert without tokens.
        adarms_cond: of each expert, or None where norms are plain.
        attn_mask: which of the m tokens, those of the cache included, each token attends to.
        kv_cache: keys and values of tokens that were computed before.
        cache_offset: where in the cache this call's keys and values are written; None: they are
            appended to it.

    Returns:
        (tokens of each expert, keys and values of all tokens that were attended to).
    """
    suffixes = [("" if index == 0 else f"_{index}") for index in range(len(tokens))]
    queries, keys, values, gates = [], [], [], {}
    for index, x in enumerate(tokens):
        if x is None:
            continue
        pre_norm = params[f"pre_attention_norm{suffixes[index]}"]
        normed, gates[index] = rms_norm(pre_norm, x, adarms_cond[index])
        query, key, value = project_qkv(normed, params["attn"], suffixes[index], configs[index])
        queries.append(query)
        keys.append(key)
        values.append(value)
    query = jnp.concatenate(queries, axis=1)
    query = apply_rope(query, positions) * configs[0].head_dim ** -0.5
    key = apply_rope(jnp.concatenate(keys, axis=1), positions)
    value = jnp.concatenate(values, axis=1)
    query, key, value = (checkpoint_name(array, "qkv") for array in (query, key, value))
    if kv_cache is not None:
        key, value = (
            jnp.concatenate([cached, new], axis=1)
            if cache_offset is None
            else jax.lax.dynamic_update_slice_in_dim(cached, new, cache_offset, axis=1)
            for cached, new in zip(kv_cache, (key, value), strict=True)
        )
    encoded = attend(query, key, value, attn_mask)
    start, outputs = 0, list(tokens)
    for index, x in enumerate(tokens):
        if x is None:
            continue
        config, suffix, end = configs[index], suffixes[index], start + x.shape[1]
        attention_out = project_out(encoded[:, start:end], params["attn"], suffix, config)
        x = checkpoint_name(gated_residual(x, attention_out, gates[index]), "residual")
        normed, gate = rms_norm(params[f"pre_ffw_norm{suffix}"], x, adarms_cond[index])
        outputs[index] = gated_residual(
            x, feed_forward(params[f"mlp{suffix}"], normed, config), gate
        )
        start = end
    return outputs, (key, value)


def project_qkv(
    x: Float[Array, "b n d"], params: dict, suffix: str, config: GemmaConfig
) -> tuple[Float[Array, "b n heads head_dim"], Keys, Values]:
    """Project tokens to query, key and value."""
    if f"qkv{suffix}" in params:  # joined by sampling.fold_params
        heads = (x @ params[f"qkv{suffix}"]).reshape(*x.shape[:2], -1, config.head_dim)
        ends = config.num_heads, config.num_heads + config.num_kv_heads
        query, key, value = jnp.split(heads, ends, axis=2)
        return query, key, value
    if config.num_kv_heads == config.num_heads:
        query, key, value = lora_einsum("btd,chdk->cbthk", x, params[f"qkv_einsum{suffix}"], config)
        return query, key, value
    query = lora_einsum("btd,hdk->bthk", x, params[f"q_einsum{suffix}"], config)
    key, value = lora_einsum("btd,chdk->cbthk", x, params[f"kv_einsum{suffix}"], config)
    return query, key, value


def project_out(
    encoded: Float[Array, "b n heads head_dim"], params: dict, suffix: str, config: GemmaConfig
) -> Float[Array, "b n d"]:
    """Project the heads back to tokens."""
    if f"out{suffix}" in params:  # merged by sampling.fold_params
        return encoded.reshape(*encoded.shape[:2], -1) @ params[f"out{suffix}"]
    return lora_einsum("bthk,hkd->btd", encoded, params[f"attn_vec_einsum{suffix}"], config)


def gated_residual(
    x: Float[Array, "b n d"], y: Float[Array, "b n d"], gate: Float[Array, "#b 1 d"] | None
) -> Float[Array, "b n d"]:
    """x + y, or x + y * gate."""
    return x + y if gate is None else x + y * gate


def embed(
    config: GemmaConfig, params: dict, tokens: Int[Array, "b l"], dtype
) -> Float[Array, "b l d"]:
    """Look up prompt tokens, times sqrt(d)."""
    if "scaled_embedding" in params["embedder"]:  # scaled by sampling.fold_params
        return params["embedder"]["scaled_embedding"][tokens]
    embedded = params["embedder"]["input_embedding"][tokens]
    return (embedded * jnp.sqrt(config.width).astype(embedded.dtype)).astype(dtype)


def compute_kv(
    config: GemmaConfig, params: dict, x: Float[Array, "b n d"], positions: Int[Array, "#b n"]
) -> KVCache:
    """Return the keys and values of PaliGemma's tokens x in a layer."""
    normed, _ = rms_norm(params["pre_attention_norm"], x, None)
    _, key, value = project_qkv(normed, params["attn"], "", config)
    return apply_rope(key, positions), value
