"""The policy gets what training got, and its actions depend on the observation alone."""

import shutil

import jax
import numpy as np
import pytest

from demo2eval.checkpoints.openpi import load_params, save_params
from demo2eval.checkpoints.policy_metadata import find_assets
from demo2eval.config import Actions, Dataset, Model, Replay
from demo2eval.data.chunks import chunk_rows, last_rows
from demo2eval.data.loader import BatchLoader, draw_samples
from demo2eval.errors import UserError
from demo2eval.evaluation.policy import Policy
from demo2eval.pi0.normalize import load_norm_stats, unnormalize
from demo2eval.training.init_checkpoint import init_checkpoint

HORIZON, NUM_SAMPLES = 8, 6


@pytest.fixture(scope="module")
def checkpoints(pushcube_run, tmp_path_factory) -> dict:
    """Folders of two untrained checkpoints, by how the model gets the state."""
    output = tmp_path_factory.mktemp("discrete") / "0.json"
    init_checkpoint(
        pushcube_run / "norm_stats/manifest.json",
        output,
        task="PushCube-v1",
        prompt="push the cube",
        robot="panda",
        replay=Replay(),
        dataset=Dataset(),
        actions=Actions(action_horizon=HORIZON),
        model=Model(variant="pi05_tiny", weights=None, tokenizer=None, discrete_state_input=True),
    )
    return {
        "state_token": pushcube_run / "checkpoints/0",
        "state_in_prompt": output.with_suffix(""),
    }


@pytest.fixture(scope="module")
def cache(pushcube_run):
    """The folder of an image cache, whose images are twice the model's size."""
    return pushcube_run / "cache_128"


@pytest.fixture(scope="module")
def samples(cache) -> np.ndarray:
    """The samples of the first training batch."""
    return draw_samples(0, NUM_SAMPLES, 0, len(np.load(cache / "sample_row.npy")))


@pytest.fixture(scope="module")
def observations(cache, samples) -> list[dict]:
    """What an env would return at these samples."""
    images = np.load(cache / "images_base_camera.npy")[samples]
    states = np.load(cache / "state.npy")[np.load(cache / "sample_row.npy")[samples]]
    return [
        {"images": {"base_camera": image}, "state": state}
        for image, state in zip(images, states, strict=True)
    ]


@pytest.fixture(scope="module")
def demonstrated(cache, samples) -> np.ndarray:
    """The actions of demonstrations that follow, [samples, horizon, 8]."""
    rows, episode = np.load(cache / "sample_row.npy")[samples], np.load(cache / "episode.npy")
    return np.load(cache / "action.npy")[chunk_rows(rows, last_rows(episode), HORIZON)]


@pytest.fixture(scope="module")
def policy(checkpoints) -> Policy:
    return Policy(checkpoints["state_token"], num_steps=3)


@pytest.mark.parametrize("name", ["state_token", "state_in_prompt"])
def test_the_model_gets_what_it_got_in_training(checkpoints, cache, observations, name):
    batch = BatchLoader.for_policy(cache, checkpoints[name]).load_batch(0, NUM_SAMPLES, 0)
    inputs = Policy(checkpoints[name]).transform_inputs(observations)
    assert inputs.images.keys() == batch["images"].keys()
    for camera, images in batch["images"].items():
        assert images.std() > 10
        np.testing.assert_array_equal(inputs.images[camera], images)
    for key in ("state", "tokenized_prompt"):
        np.testing.assert_array_equal(getattr(inputs, key), batch[key])
    # Prompts without the state in them are all of one length, so that there is no padding to mask.
    mask = inputs.tokenized_prompt_mask
    assert (mask is None) == (name == "state_token")
    np.testing.assert_array_equal(
        np.ones_like(batch["tokenized_prompt_mask"]) if mask is None else mask,
        batch["tokenized_prompt_mask"],
    )


def test_perfect_outputs_are_the_demonstrations_actions(
    checkpoints, cache, observations, demonstrated, policy
):
    loader = BatchLoader.for_policy(cache, checkpoints["state_token"])
    batch = loader.load_batch(0, NUM_SAMPLES, 0)
    states = np.stack([observation["state"] for observation in observations])
    actions = policy.transform_outputs(batch["actions"], states)
    assert actions.shape == (NUM_SAMPLES, HORIZON, 8)
    assert actions.dtype == np.float32
    np.testing.assert_allclose(actions, demonstrated, atol=1e-6)


def test_seven_joints_are_differences_from_the_state_and_the_gripper_is_not(
    checkpoints, cache, observations, demonstrated
):
    """In training's batches and, the same, in the norm stats; a mask of 6 or 8 would show here."""
    checkpoint = checkpoints["state_token"]
    batch = BatchLoader.for_policy(cache, checkpoint).load_batch(0, NUM_SAMPLES, 0)
    stats = load_norm_stats(find_assets(checkpoint) / "norm_stats.json")["actions"]
    predicted = unnormalize(batch["actions"], stats, use_quantiles=True)[..., :8]
    expected = demonstrated.astype(np.float64)
    expected[..., :7] -= np.stack([item["state"][:7] for item in observations])[:, None]
    np.testing.assert_allclose(predicted, expected, atol=1e-6)
    # PushCube's gripper stays shut, at -1; its fingers are at 0 to 0.04 m.
    np.testing.assert_allclose(stats.mean[:, 7], -1)
    # Joint targets of 1.9 rad and more are some hundredths of a radian from the state.
    assert np.abs(demonstrated[..., 3]).min() > 1
    assert np.abs(stats.mean[0, :7]).max() < 0.2


def test_actions_do_not_depend_on_other_observations(observations, policy):
    assert policy.batch_size < NUM_SAMPLES, "or more than one batch is not tested"
    noise = [policy.draw_noise(0, seed, 0) for seed in range(NUM_SAMPLES)]
    together = policy.infer(observations, noise)
    for index in range(NUM_SAMPLES):
        alone = policy.infer([observations[index]], [noise[index]])
        np.testing.assert_array_equal(alone[0], together[index])
    assert np.abs(together[0] - policy.infer([observations[0]], [noise[1]])[0]).max() > 1e-3


def test_noise_follows_from_the_three_numbers(policy):
    noises = [policy.draw_noise(*n) for n in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))]
    np.testing.assert_array_equal(noises[0], policy.draw_noise(0, 0, 0))
    assert len({noise.tobytes() for noise in noises}) == 4
    assert noises[0].shape == (HORIZON, 32)


def test_a_diverged_policy_is_a_sentence(checkpoints, observations, policy, tmp_path):
    checkpoint = checkpoints["state_token"]
    shutil.copytree(checkpoint / "assets", tmp_path / "assets")
    params = load_params(checkpoint / "params")
    save_params(tmp_path / "params", jax.tree.map(lambda array: np.full_like(array, 1e30), params))
    with pytest.raises(UserError, match="not finite"):
        Policy(tmp_path, num_steps=3).infer(observations[:1], [policy.draw_noise(0, 0, 0)])
