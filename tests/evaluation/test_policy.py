"""The policy sees what training saw, and its answer to a look depends on that look alone."""

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from demo2eval.checkpoints.openpi import load_params, save_params
from demo2eval.data import dataset, norm_stats
from demo2eval.data import image_cache as training_cache
from demo2eval.data.chunks import chunk_rows, last_rows
from demo2eval.data.loader import TrainingData, looks_of
from demo2eval.errors import UserError
from demo2eval.evaluation.policy import Policy
from demo2eval.training import init_checkpoint

PROMPT = "push the blue cube into the red and white target region"
MASK = [True] * 7 + [False]
HORIZON, SAMPLES = 8, 6


@pytest.fixture(scope="module")
def run(pushcube_replay, tmp_path_factory) -> Path:
    """A folder with a training cache, norm stats and two checkpoints of untrained policies."""
    folder = tmp_path_factory.mktemp("policy")
    data, stats = folder / "dataset/manifest.json", folder / "norm_stats/manifest.json"
    dataset.dataset(
        dataset.Settings(prompt=PROMPT, cameras=["base_camera"], state=["qpos"]),
        [pushcube_replay],
        data,
    )
    # Twice the model's size, so that resizing is part of the comparison.
    training_cache.training_cache(
        training_cache.Settings(image_size=128), data, folder / "cache/manifest.json"
    )
    chunk = {
        "action_horizon": HORIZON,
        "delta_action_mask": MASK,
        "per_timestep_action_stats": True,
        "min_scale": 0.02,
    }
    norm_stats.norm_stats(norm_stats.Settings(**chunk), data, stats)
    for name, discrete in (("state_token", False), ("state_in_prompt", True)):
        settings = init_checkpoint.Settings(
            task="PushCube-v1",
            prompt=PROMPT,
            variant="pi05_tiny",
            model_overrides={
                "action_horizon": HORIZON,
                "discrete_state_input": discrete,
                "continuous_state_token": not discrete,
            },
            cameras={"base_0_rgb": "base_camera"},
            image_size=128,
            state=["qpos"],
            control_mode="pd_joint_pos",
            delta_action_mask=MASK,
        )
        init_checkpoint.init_checkpoint(settings, stats, folder / name / "0.json")
    return folder


@pytest.fixture(scope="module")
def observations(run) -> list[dict]:
    """What a simulator would report at the looks of the first training batch."""
    looks = looks_of(0, SAMPLES, 0, len(np.load(run / "cache/look_row.npy")))
    pictures, rows = (
        np.load(run / "cache/images_base_camera.npy"),
        np.load(run / "cache/look_row.npy")[looks],
    )
    states = np.load(run / "cache/state.npy")[rows]
    return [
        {"images": {"base_camera": picture}, "state": state}
        for picture, state in zip(pictures[looks], states, strict=True)
    ]


@pytest.fixture(scope="module")
def policy(run) -> Policy:
    return Policy(run / "state_token/0", num_steps=3)


@pytest.mark.parametrize("name", ["state_token", "state_in_prompt"])
def test_the_model_sees_what_it_saw_in_training(run, observations, name):
    batch = TrainingData.for_policy(run / "cache", run / name / "0").batch(0, SAMPLES, 0)
    seen = Policy(run / name / "0").inputs(observations)
    assert seen.images.keys() == batch["images"].keys()
    for camera, pixels in batch["images"].items():
        assert pixels.std() > 10
        np.testing.assert_array_equal(seen.images[camera], pixels)
    for key in ("state", "tokenized_prompt"):
        np.testing.assert_array_equal(getattr(seen, key), batch[key])
    # Prompts without the state in them are all of one length, so that there is no padding to mask.
    mask = seen.tokenized_prompt_mask
    assert (mask is None) == (name == "state_token")
    np.testing.assert_array_equal(
        np.ones_like(batch["tokenized_prompt_mask"]) if mask is None else mask,
        batch["tokenized_prompt_mask"],
    )


def test_perfect_answers_are_the_demonstrations_actions(run, observations, policy):
    batch = TrainingData.for_policy(run / "cache", run / "state_token/0").batch(0, SAMPLES, 0)
    rows = np.load(run / "cache/look_row.npy")[
        looks_of(0, SAMPLES, 0, len(np.load(run / "cache/look_row.npy")))
    ]
    chunks = chunk_rows(rows, last_rows(np.load(run / "cache/episode.npy")), HORIZON)
    actions = policy.actions(batch["actions"], np.stack([item["state"] for item in observations]))
    assert actions.shape == (SAMPLES, HORIZON, 8)
    assert actions.dtype == np.float32
    np.testing.assert_allclose(actions, np.load(run / "cache/action.npy")[chunks], atol=1e-6)


def test_an_answer_does_not_depend_on_who_else_asks(observations, policy):
    assert policy.batch_size < SAMPLES, "or more than one batch is not tested"
    noise = [policy.noise(0, seed, 0) for seed in range(SAMPLES)]
    together = policy.act(observations, noise)
    for index in range(SAMPLES):
        np.testing.assert_array_equal(
            policy.act([observations[index]], [noise[index]])[0], together[index]
        )
    assert np.abs(together[0] - policy.act([observations[0]], [noise[1]])[0]).max() > 1e-3


def test_noise_follows_from_the_three_numbers(policy):
    drawn = [policy.noise(*numbers) for numbers in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    np.testing.assert_array_equal(drawn[0], policy.noise(0, 0, 0))
    assert len({item.tobytes() for item in drawn}) == 4
    assert drawn[0].shape == (HORIZON, 32)


def test_a_diverged_policy_is_a_sentence(run, observations, policy, tmp_path):
    shutil.copytree(run / "state_token/0/assets", tmp_path / "assets")
    diverged = jax.tree.map(
        lambda array: np.full_like(array, np.nan), load_params(run / "state_token/0/params")
    )
    save_params(tmp_path / "params", diverged)
    with pytest.raises(UserError, match="not finite"):
        Policy(tmp_path, num_steps=3).act(observations[:1], [policy.noise(0, 0, 0)])
