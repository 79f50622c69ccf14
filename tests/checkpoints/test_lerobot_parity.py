"""The model against LeRobot's own PI05 and PI0 policies in PyTorch: same weights, noise and time.

LeRobot's policies need transformers, which nothing else here does:

    uv run --group parity pytest tests/checkpoints/test_lerobot_parity.py

Measured with lerobot 0.6.1, transformers 5.5.4 and torch 2.11 on CPU, float32, as the largest
absolute difference between the two (v_t reaches 3.1): Pi0.5 v_t 4.0e-5, actions of ten flow steps
3.7e-5; Pi0 v_t 6.4e-5, actions 2.4e-5. LeRobot takes the sines of time in float64, openpi and this
project in float32: with the same sines v_t differs by 1.3e-6 and 3.0e-6.
"""

import numpy as np
import pytest

pytest.importorskip(
    "transformers",
    reason="LeRobot's own policies need transformers: uv run --group parity pytest <this file>",
)

import jax.numpy as jnp
import torch
from golden_data import difference, lerobot_folder, read
from lerobot.configs import FeatureType, PolicyFeature
from lerobot.policies.pi0 import modeling_pi0
from lerobot.policies.pi05 import modeling_pi05
from safetensors.torch import load_file
from test_openpi_parity import SPEC, config_of, forward, observation_of, params_of

from demo2eval.checkpoints.huggingface import from_huggingface, to_huggingface
from demo2eval.checkpoints.openpi import load_params, save_params
from demo2eval.pi0 import sampling

LEROBOT = {
    "pi05": (modeling_pi05, modeling_pi05.PI05Policy, modeling_pi05.PI05Config),
    "pi0": (modeling_pi0, modeling_pi0.PI0Policy, modeling_pi0.PI0Config),
}
# LeRobot's file is read by both; or what this project writes from openpi's tree is.
CASES = [("pi05", "lerobot's file"), ("pi05", "our file"), ("pi0", "our file")]


@pytest.fixture(params=CASES, ids=[f"{family}, {source}" for family, source in CASES])
def case(request, tmp_path):
    """(family, folder with LeRobot's model.safetensors, our parameters of the same weights)."""
    family, source = request.param
    config = config_of(family)
    if source == "lerobot's file":
        folder = lerobot_folder(tmp_path, config)
        from_huggingface(folder, tmp_path / "from_lerobot", config)
        return family, folder, load_params(tmp_path / "from_lerobot", config)
    save_params(tmp_path / "params", params_of(family))
    to_huggingface(tmp_path / "params", tmp_path / "model.safetensors", config)
    return family, tmp_path, params_of(family)


def small(build, **sizes):
    """Return `build` with sizes changed in its Hugging Face configuration.

    LeRobot fixes the vocabulary and the vision encoder.
    """

    def build_small(config):
        for name, value in sizes.items():
            *parents, field = name.split("__")
            section = config
            for parent in parents:
                section = getattr(section, parent)
            setattr(section, field, value)
        return build(config=config)

    return build_small


def load_policy(family: str, folder, monkeypatch):
    """Load LeRobot's policy of the reference data's sizes with its own loader."""
    module, policy, config = LEROBOT[family]
    sizes = SPEC["config"]
    experts = {"gemma_2b": sizes["paligemma"], "gemma_300m": sizes["action_expert"]}
    monkeypatch.setattr(
        module, "get_gemma_config", lambda variant: module.GemmaConfig(**experts[variant])
    )
    vision = {
        "hidden_size": sizes["siglip"]["width"],
        "num_hidden_layers": sizes["siglip"]["depth"],
        "intermediate_size": sizes["siglip"]["mlp_dim"],
        "num_attention_heads": sizes["siglip"]["num_heads"],
        "patch_size": sizes["siglip"]["patch_size"][0],
        "projection_dim": sizes["paligemma"]["width"],
    }
    vision = {f"vision_config__{name}": value for name, value in vision.items()}
    for name, changed in (
        (
            "PaliGemmaForConditionalGenerationWithPiGemma",
            {"text_config__vocab_size": sizes["vocab_size"], **vision},
        ),
        ("PiGemmaForCausalLM", {"vocab_size": sizes["vocab_size"]}),
    ):
        monkeypatch.setattr(module, name, small(getattr(module, name), **changed))
    cameras = {
        f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, 224, 224))
        for name in SPEC["cams"]
    }
    horizon = SPEC["action_horizon"]
    return policy.from_pretrained(
        folder,
        config=config(
            chunk_size=horizon, n_action_steps=horizon, input_features=cameras, device="cpu"
        ),
    ).eval()


def v_t_and_actions(policy, inputs: dict) -> tuple[np.ndarray, np.ndarray]:
    """Return LeRobot's v_t and actions of ten flow steps, float32 [b, horizon, action_dim]."""
    tensors = {name: torch.from_numpy(value) for name, value in inputs.items()}
    images = [
        (tensors[f"image/{name}"].float() / 255 * 2 - 1).permute(0, 3, 1, 2)
        for name in SPEC["cams"]
    ]
    masks = [tensors[f"image_mask/{name}"] for name in SPEC["cams"]]
    prompt = tensors["tokenized_prompt"].long(), tensors["tokenized_prompt_mask"]
    observation = [images, masks, *prompt]
    if policy.name == "pi0":
        observation.append(tensors["state"])
    # The forward pass returns the loss alone.
    outputs = []
    handle = policy.model.action_out_proj.register_forward_hook(
        lambda module, arguments, output: outputs.append(output)
    )
    with torch.no_grad():
        policy.model(*observation, *(tensors[name] for name in ("actions", "noise", "time")))
        handle.remove()
        actions = policy.model.sample_actions(*observation, noise=tensors["noise"], num_steps=10)
    return outputs[0].numpy(), actions.numpy()


def test_lerobots_policy_gives_the_same(case, monkeypatch, capsys, record_property):
    family, folder, params = case
    policy = load_policy(family, folder, monkeypatch)
    # If its strict loading fails, LeRobot goes on with fresh weights: see that all are the file's.
    assert "All keys loaded successfully" in capsys.readouterr().out
    loaded, file = policy.state_dict(), load_file(folder / "model.safetensors")
    for name, value in file.items():
        assert torch.equal(loaded[name if name.startswith("model.") else f"model.{name}"], value), (
            name
        )
    inputs, golden = read(f"{family}_inputs"), read(f"{family}_float32")
    v_t, actions = v_t_and_actions(policy, inputs)
    config = config_of(family)
    ours = forward(config, params, inputs)["v_t"]
    sampled = sampling.sample_actions(
        config, params, observation_of(inputs), jnp.asarray(inputs["noise"])
    )
    figures = {
        "v_t": difference(v_t, ours),
        "actions": difference(actions, sampled),
        "v_t, openpi": difference(v_t, golden["v_t"]),
        "actions, openpi": difference(actions, golden["actions_10"]),
    }
    for name, value in figures.items():
        record_property(name, value)
        print(f"{family} {name}: {value:.1e}")
    assert max(figures.values()) < 1e-4, figures
