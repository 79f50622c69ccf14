"""The loader: each sample once per epoch, batches from seed and step alone, noise leads back."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from demo2eval.checkpoints.policy_metadata import PolicyMetadata
from demo2eval.config import Actions
from demo2eval.data.dataset import build_dataset
from demo2eval.data.image_cache import build_image_cache
from demo2eval.data.loader import (
    BatchLoader,
    PromptTokenizer,
    count_training_samples,
    draw_samples,
    prefetch,
)
from demo2eval.data.norm_stats import compute_norm_stats
from demo2eval.errors import UserError
from demo2eval.pi0.image import resize_with_pad
from demo2eval.pi0.normalize import load_norm_stats
from demo2eval.pi0.tokenizer import Tokenizer

MASK = [True] * 7 + [False]
HORIZON = 16
ACTION_DIM = 32
PROMPT = "push the cube to the goal"


@pytest.fixture(scope="module")
def made(pushcube_replay, tmp_path_factory) -> dict[str, Path]:
    """Folders of caches of 64-pixel and of whole images, and of norm stats, of the same demos."""
    root = tmp_path_factory.mktemp("loader")
    dataset = root / "dataset" / "manifest.json"
    build_dataset([pushcube_replay], dataset, prompt=PROMPT)
    for name, image_size in (("small", 64), ("whole", 224)):
        build_image_cache(dataset, root / name / "manifest.json", image_size=image_size)
    actions = Actions(action_horizon=HORIZON)
    compute_norm_stats(dataset, root / "stats" / "manifest.json", actions=actions)
    return {name: root / name for name in ("small", "whole", "stats")}


def make_prompt(with_state: bool = False) -> PromptTokenizer:
    tokenizer = Tokenizer.train([PROMPT], with_state=with_state)
    return PromptTokenizer(tokenizer, PROMPT, 80, with_state)


def open_cache(made, cache: str = "small", **changes) -> BatchLoader:
    arguments = {
        "prompt": make_prompt(),
        "cameras": {"base_0_rgb": "base_camera"},
        "image_size": 64 if cache == "small" else 224,
        "action_horizon": HORIZON,
        "action_dim": ACTION_DIM,
        "delta_action_mask": MASK,
        "use_quantiles": True,
    }
    stats = load_norm_stats(made["stats"] / "norm_stats.json")
    return BatchLoader(made[cache], stats, **(arguments | changes))


def read_arrays(made, cache: str = "small") -> dict[str, np.ndarray]:
    return {path.stem: np.load(path) for path in made[cache].glob("*.npy")}


def same(first: dict, second: dict) -> bool:
    flat = [
        {**batch, **{f"images/{name}": image for name, image in batch["images"].items()}}
        for batch in (first, second)
    ]
    return all(np.array_equal(flat[0][name], flat[1][name]) for name in flat[0] if name != "images")


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_every_sample_comes_once_per_epoch(batch_size):
    num_samples = 50
    steps = 3 * num_samples * batch_size // np.gcd(num_samples, batch_size) // batch_size
    drawn = np.concatenate(
        [draw_samples(step, batch_size, 5, num_samples) for step in range(steps)]
    )
    epochs = drawn.reshape(-1, num_samples)
    assert (np.sort(epochs, axis=1) == np.arange(num_samples)).all()
    assert not np.array_equal(epochs[0], epochs[1])


def test_the_seed_decides_the_order():
    assert not np.array_equal(draw_samples(0, 50, 0, 50), draw_samples(0, 50, 1, 50))


def test_a_batch_follows_from_seed_and_step_alone(made):
    straight, resumed = (open_cache(made, state_noise=0.03) for _ in range(2))
    batches = [straight.load_batch(step, 8, seed=3) for step in range(12)]
    assert same(resumed.load_batch(11, 8, seed=3), batches[11])
    assert same(resumed.load_batch(2, 8, seed=3), batches[2])
    assert not same(resumed.load_batch(2, 8, seed=4), batches[2])


def test_a_batch_is_its_samples(made):
    loader, cache = open_cache(made), read_arrays(made)
    stats = load_norm_stats(made["stats"] / "norm_stats.json")
    batch = loader.load_batch(0, 16, seed=0)
    for index, sample in enumerate(draw_samples(0, 16, 0, len(loader))):
        row = cache["sample_row"][sample]
        assert np.array_equal(
            batch["images"]["base_0_rgb"][index], cache["images_base_camera"][sample]
        )
        state = cache["state"][row].astype(np.float64)
        expected = (state - stats["state"].q01) / (
            stats["state"].q99 - stats["state"].q01 + 1e-6
        ) * 2 - 1
        assert np.allclose(batch["state"][index, :9], expected, atol=1e-4)
        for ahead in range(HORIZON):
            there = min(row + ahead, np.flatnonzero(cache["episode"] == cache["episode"][row])[-1])
            delta = cache["action"][there] - np.append(state[:7], 0)
            low, high = stats["actions"].q01, stats["actions"].q99
            assert np.allclose(
                batch["actions"][index, ahead, :8],
                (delta - low) / (high - low + 1e-6) * 2 - 1,
                atol=1e-4,
            )
    assert batch["state"].shape == (16, ACTION_DIM)
    assert batch["actions"].shape == (16, HORIZON, ACTION_DIM)
    assert not batch["state"][:, 9:].any()
    assert not batch["actions"][..., 8:].any()
    assert batch["state"].dtype == batch["actions"].dtype == np.float32


def test_noise_on_the_state_leads_back_to_the_demonstration(made):
    stats = load_norm_stats(made["stats"] / "norm_stats.json")

    def absolute(loader: BatchLoader) -> tuple[np.ndarray, np.ndarray]:
        batch = loader.load_batch(0, 16, seed=0)

        def unnormalize(values, item):
            return (values + 1) / 2 * (item.q99 - item.q01 + 1e-6) + item.q01

        state = unnormalize(batch["state"][:, :9], stats["state"])
        actions = unnormalize(batch["actions"][..., :8], stats["actions"])
        actions[..., :7] += state[:, None, :7]
        return state, actions

    (clean, clean_actions), (noisy, noisy_actions) = (
        absolute(open_cache(made, state_noise=noise)) for noise in (0.0, 0.03)
    )
    difference = noisy - clean
    assert 0.02 < difference[:, :7].std() < 0.04
    assert not difference[:, 7:].any()
    assert np.allclose(noisy_actions, clean_actions, atol=1e-4)


def test_small_images_are_resized_to_the_models(made):
    loader, cache = open_cache(made, cache="whole"), read_arrays(made, "whole")
    batch = loader.load_batch(0, 4, seed=0)
    for index, sample in enumerate(draw_samples(0, 4, 0, len(loader))):
        expected = resize_with_pad(cache["images_base_camera"][sample], 224, 224)
        assert np.array_equal(batch["images"]["base_0_rgb"][index], expected)


def test_the_prompt_holds_the_state_only_where_the_model_reads_it_there(made):
    plain = open_cache(made).load_batch(0, 8, seed=0)
    with_state = open_cache(made, prompt=make_prompt(with_state=True)).load_batch(0, 8, seed=0)
    assert (plain["tokenized_prompt"] == plain["tokenized_prompt"][0]).all()
    assert not (with_state["tokenized_prompt"] == with_state["tokenized_prompt"][0]).all()
    for batch in (plain, with_state):
        assert batch["tokenized_prompt"].shape == batch["tokenized_prompt_mask"].shape == (8, 80)
        assert batch["tokenized_prompt"].dtype == np.int32


def test_a_checkpoints_assets_say_everything(made, tmp_path):
    policy = PolicyMetadata(
        variant="pi05_tiny",
        model_overrides={
            "action_horizon": HORIZON,
            "discrete_state_input": True,
            "max_token_len": 80,
        },
        asset_id="maniskill/PushCube-v1",
        task="PushCube-v1",
        prompt=PROMPT,
        cameras={"base_0_rgb": "base_camera"},
        image_size=128,
        state=["qpos"],
        control_mode="pd_joint_pos",
        delta_action_mask=MASK,
        action_dim=8,
        use_quantiles=True,
        robot="panda",
    )
    assets = tmp_path / "assets" / policy.asset_id
    assets.mkdir(parents=True)
    policy.write(tmp_path)
    shutil.copy(made["stats"] / "norm_stats.json", assets)
    Tokenizer.train([PROMPT], with_state=True).save(assets / "tokenizer.model")
    opened = BatchLoader.for_policy(made["small"], tmp_path, state_noise=0.03).load_batch(
        5, 8, seed=1
    )
    config = policy.config
    named = {
        "image_size": config.siglip.image_size,
        "action_dim": config.action_dim,
        "state_noise": 0.03,
    }
    assert same(
        opened,
        open_cache(made, prompt=make_prompt(with_state=True), **named).load_batch(5, 8, seed=1),
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"action_dim": 6}, "action_dim is 6, less than the 9"),
        ({"cameras": {"base_0_rgb": "hand_camera"}}, "images_hand_camera.npy cannot be read"),
    ],
)
def test_what_does_not_fit_is_a_sentence(made, changes, expected):
    with pytest.raises(UserError, match=expected):
        open_cache(made, **changes)


def test_prefetch_gives_everything_in_order_and_raises_what_was_raised():
    assert list(prefetch(range(20), depth=3)) == list(range(20))

    def failing():
        yield 1
        raise UserError("no more")

    given = prefetch(failing(), depth=2)
    assert next(given) == 1
    with pytest.raises(UserError, match="no more"):
        next(given)


def test_prefetch_ends_its_thread_when_nobody_listens_any_more():
    given = prefetch(iter(int, 1), depth=2)
    next(given)
    given.close()
    for thread in threading.enumerate():
        if thread.name == "prefetch":
            thread.join(timeout=5)
            assert not thread.is_alive()


def test_validation_demos_are_never_seen():
    episode = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    assert [count_training_samples(episode, count) for count in (0, 1, 2)] == [8, 5, 3]
    with pytest.raises(UserError, match=r"num_val_demos is 3, and there are 3 demos"):
        count_training_samples(episode, 3)
