"""Which of Hugging Face's tensors make up which of openpi's arrays, and how they are laid out.

Hugging Face has a tensor for each layer, with PyTorch's order of axes. openpi has one array for all
layers, with a leading axis for them, and some projections share an array.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from demo2eval.checkpoints.mismatch import Shapes, read_sizes
from demo2eval.errors import UserError
from demo2eval.pi0.config import GemmaConfig, Pi0Config, SiglipConfig
from demo2eval.pi0.params import param_table

PALIGEMMA = "paligemma_with_expert.paligemma.model."
VISION = PALIGEMMA + "vision_tower.vision_model."
LANGUAGE = PALIGEMMA + "language_model."
EXPERT = "paligemma_with_expert.gemma_expert.model."
# One array under two names: published files have one of them, or both.
TIED_EMBEDDING = "paligemma_with_expert.paligemma.lm_head.weight"
EMBEDDING = LANGUAGE + "embed_tokens.weight"
# LeRobot's policies own it and never use it.
EXPERT_HEAD = "paligemma_with_expert.gemma_expert.lm_head.weight"


@dataclass(frozen=True)
class Layout:
    """How one tensor's axes are turned into openpi's, and back."""

    to_openpi: Callable[[np.ndarray], np.ndarray]
    to_huggingface: Callable[[np.ndarray], np.ndarray]


# In the comments: Hugging Face's axes <-> openpi's; h heads of k dims.
SAME = Layout(lambda tensor: tensor, lambda array: array)
# [o, i] <-> [i, o]
TRANSPOSED = Layout(np.transpose, np.transpose)
# [n, d] <-> [1, n, d]
POSITIONS = Layout(lambda tensor: tensor[None], lambda array: array[0])
# [o, channels, rows, columns] <-> [rows, columns, channels, o]
PATCHES = Layout(
    lambda tensor: tensor.transpose(2, 3, 1, 0), lambda array: array.transpose(3, 2, 0, 1)
)


def query_layout(heads: int) -> Layout:
    """[h k, d] <-> [h, d, k]: query, key and value of an expert."""
    return Layout(
        lambda tensor: tensor.reshape(heads, -1, tensor.shape[-1]).transpose(0, 2, 1),
        lambda array: array.transpose(0, 2, 1).reshape(-1, array.shape[1]),
    )


def vision_query_layout(heads: int) -> Layout:
    """[h k, d] <-> [d, h, k]: query, key and value of the vision encoder."""
    return Layout(
        lambda tensor: tensor.T.reshape(tensor.shape[1], heads, -1),
        lambda array: array.reshape(array.shape[0], -1).T,
    )


def vision_bias_layout(heads: int) -> Layout:
    """[h k] <-> [h, k]: the biases of query, key and value of the vision encoder."""
    return Layout(lambda tensor: tensor.reshape(heads, -1), np.ravel)


def output_layout(heads: int) -> Layout:
    """[d, h k] <-> [h, k, d]: the output of attention."""
    return Layout(
        lambda tensor: tensor.T.reshape(heads, -1, tensor.shape[0]),
        lambda array: array.reshape(-1, array.shape[-1]).T,
    )


@dataclass(frozen=True)
class Rule:
    """One of openpi's arrays and the tensors that it is made of.

    Attributes:
        name: the array's name.
        tensors: the tensors' names, in order; those of each layer one after the other.
        layout: of each tensor.
        stack_axes: leading axes of the array along which tensors are stacked: 0, or 1 for layers,
            or 2 for layers and the tensors of a layer.
    """

    name: str
    tensors: tuple[str, ...]
    layout: Layout
    stack_axes: int = 0


Row = tuple[str, str, Layout]


def dense_rows(name: str, tensor: str) -> list[Row]:
    """Return a Dense layer's kernel and bias."""
    return [
        (f"{name}/kernel", f"{tensor}.weight", TRANSPOSED),
        (f"{name}/bias", f"{tensor}.bias", SAME),
    ]


def layer_norm_rows(name: str, tensor: str) -> list[Row]:
    """Return a layer norm's scale and bias."""
    return [(f"{name}/scale", f"{tensor}.weight", SAME), (f"{name}/bias", f"{tensor}.bias", SAME)]


def stacked_rule(
    name: str, prefix: str, depth: int, tensors: tuple[str, ...], layout: Layout
) -> Rule:
    """Return the rule of an array that stacks `tensors` of every layer."""
    names = tuple(
        f"{prefix}layers.{layer}.{tensor}" for layer in range(depth) for tensor in tensors
    )
    return Rule(name, names, layout, stack_axes=2 if len(tensors) > 1 else 1)


def vision_rules(config: SiglipConfig) -> Iterator[Rule]:
    """Yield the rules of the vision encoder and the projection behind it."""
    heads, embeddings = config.num_heads, VISION + "embeddings."
    rows = [
        ("embedding/kernel", embeddings + "patch_embedding.weight", PATCHES),
        ("embedding/bias", embeddings + "patch_embedding.bias", SAME),
        ("pos_embedding", embeddings + "position_embedding.weight", POSITIONS),
        *layer_norm_rows("Transformer/encoder_norm", VISION + "post_layernorm"),
        *dense_rows("head", PALIGEMMA + "multi_modal_projector.linear"),
    ]
    attention = "MultiHeadDotProductAttention_0"
    layer_rows = [
        *layer_norm_rows("LayerNorm_0", "layer_norm1"),
        *layer_norm_rows("LayerNorm_1", "layer_norm2"),
        *dense_rows("MlpBlock_0/Dense_0", "mlp.fc1"),
        *dense_rows("MlpBlock_0/Dense_1", "mlp.fc2"),
        (f"{attention}/out/kernel", "self_attn.out_proj.weight", output_layout(heads)),
        (f"{attention}/out/bias", "self_attn.out_proj.bias", SAME),
    ]
    for name in ("query", "key", "value"):
        tensor = f"self_attn.{name[0]}_proj"
        layer_rows += [
            (f"{attention}/{name}/kernel", f"{tensor}.weight", vision_query_layout(heads)),
            (f"{attention}/{name}/bias", f"{tensor}.bias", vision_bias_layout(heads)),
        ]
    for name, tensor, layout in rows:
        yield Rule(f"PaliGemma/img/{name}", (tensor,), layout)
    for name, tensor, layout in layer_rows:
        name = f"PaliGemma/img/Transformer/encoderblock/{name}"
        yield stacked_rule(name, VISION + "encoder.", config.depth, (tensor,), layout)


def expert_rules(config: GemmaConfig, prefix: str, suffix: str, adaptive: bool) -> Iterator[Rule]:
    """Yield the rules of one expert.

    Args:
        prefix: of its tensors' names.
        suffix: of its arrays' names.
        adaptive: whether its norms are conditioned on time.
    """
    query, key, value = (f"self_attn.{letter}_proj.weight" for letter in "qkv")
    query_heads, key_heads = query_layout(config.num_heads), query_layout(config.num_kv_heads)
    rows: list[tuple[str, tuple[str, ...], Layout]]
    if config.num_heads == config.num_kv_heads:
        rows = [(f"attn/qkv_einsum{suffix}/w", (query, key, value), query_heads)]
    else:
        rows = [
            (f"attn/q_einsum{suffix}/w", (query,), query_heads),
            (f"attn/kv_einsum{suffix}/w", (key, value), key_heads),
        ]
    gate_and_up = ("mlp.gate_proj.weight", "mlp.up_proj.weight")
    rows += [
        (
            f"attn/attn_vec_einsum{suffix}/w",
            ("self_attn.o_proj.weight",),
            output_layout(config.num_heads),
        ),
        (f"mlp{suffix}/gating_einsum", gate_and_up, TRANSPOSED),
        (f"mlp{suffix}/linear", ("mlp.down_proj.weight",), TRANSPOSED),
    ]
    norms = {"pre_attention_norm": "input_layernorm", "pre_ffw_norm": "post_attention_layernorm"}
    for norm, tensor in norms.items():
        for name, norm_tensor, layout in norm_rows(f"{norm}{suffix}", tensor, adaptive):
            rows.append((name, (norm_tensor,), layout))
    for name, tensors, layout in rows:
        yield stacked_rule(f"PaliGemma/llm/layers/{name}", prefix, config.depth, tensors, layout)
    for name, tensor, layout in norm_rows(f"final_norm{suffix}", f"{prefix}norm", adaptive):
        yield Rule(f"PaliGemma/llm/{name}", (tensor,), layout)


def norm_rows(name: str, tensor: str, adaptive: bool) -> list[Row]:
    """Return an RMS norm's scale or, if it is adaptive, its Dense layer."""
    if adaptive:
        return dense_rows(f"{name}/Dense_0", f"{tensor}.dense")
    return [(f"{name}/scale", f"{tensor}.weight", SAME)]


def make_rules(config: Pi0Config) -> list[Rule]:
    """Return the rule of every array of a model without LoRA."""
    projections = ["action_in_proj", "action_out_proj"]
    if config.is_pi05:
        projections += ["time_mlp_in", "time_mlp_out"]
    else:
        projections += ["state_proj", "action_time_mlp_in", "action_time_mlp_out"]
    return [
        *vision_rules(config.siglip),
        Rule("PaliGemma/llm/embedder/input_embedding", (TIED_EMBEDDING,), SAME),
        *expert_rules(config.paligemma, LANGUAGE, "", adaptive=False),
        *expert_rules(config.action_expert, EXPERT, "_1", adaptive=config.is_pi05),
        *(
            Rule(name, (tensor,), layout)
            for projection in projections
            for name, tensor, layout in dense_rows(projection, projection)
        ),
    ]


def huggingface_shapes(config: Pi0Config) -> Shapes:
    """Return {name: shape} of every tensor that a model is made of.

    Raises:
        UserError: if the model has arrays for which there is none.
    """
    shapes = {name: shape for name, (shape, _) in param_table(config).items()}
    rules = make_rules(config)
    if without_tensor := shapes.keys() - {rule.name for rule in rules}:
        lora = any("lora" in name for name in without_tensor)
        kind = "LoRA arrays" if lora else "a continuous state token"
        raise UserError(
            f"a model with {kind} has no form in safetensors; "
            "train without, or keep openpi's layout."
        )
    tensor_shapes = {}
    for rule in rules:
        part = np.empty(shapes[rule.name][rule.stack_axes :], np.int8)
        tensor_shapes |= dict.fromkeys(rule.tensors, rule.layout.to_huggingface(part).shape)
    return tensor_shapes


def huggingface_sizes(found: Shapes) -> dict[str, int]:
    """Return what the shapes of tensors say of a model, {"paligemma.width": 2048, ...}.

    How many heads there are cannot be told from them.
    """
    axes = {
        "vocab_size": (TIED_EMBEDDING, 0),
        "action_dim": ("action_in_proj.weight", 1),
        "paligemma.width": (TIED_EMBEDDING, 1),
        "paligemma.mlp_dim": (f"{LANGUAGE}layers.0.mlp.gate_proj.weight", 0),
        "action_expert.width": ("action_in_proj.weight", 0),
        "action_expert.mlp_dim": (f"{EXPERT}layers.0.mlp.gate_proj.weight", 0),
        "siglip.width": (f"{VISION}embeddings.patch_embedding.weight", 0),
        "siglip.patch_size": (f"{VISION}embeddings.patch_embedding.weight", 2),
        "siglip.mlp_dim": (f"{VISION}encoder.layers.0.mlp.fc1.bias", 0),
    }
    sizes = read_sizes(axes, found)
    prefixes = {"paligemma": LANGUAGE, "action_expert": EXPERT, "siglip": f"{VISION}encoder."}
    for key, prefix in prefixes.items():
        prefix = f"{prefix}layers."
        names = [name.removeprefix(prefix) for name in found if name.startswith(prefix)]
        if layers := {name.split(".")[0] for name in names}:
            sizes[f"{key}.depth"] = len(layers)
    return sizes
