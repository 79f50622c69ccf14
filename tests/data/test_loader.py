"""The loader: every look once an epoch, batches that follow from seed and step alone, and noise that leads back."""

import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from demo2eval.checkpoints.policy_metadata import PolicyMetadata
from demo2eval.data.dataset import Settings as DatasetSettings
from demo2eval.data.dataset import dataset
from demo2eval.data.image_cache import Settings as CacheSettings
from demo2eval.data.image_cache import training_cache
from demo2eval.data.loader import Prompt, TrainingData, looks_of, prefetch, trained_looks
from demo2eval.data.norm_stats import Settings as NormStatsSettings
from demo2eval.data.norm_stats import norm_stats
from demo2eval.errors import UserError
from demo2eval.pi0.image import resize_with_pad
from demo2eval.pi0.normalize import load_norm_stats
from demo2eval.pi0.tokenizer import Tokenizer

MASK = [True] * 7 + [False]
HORIZON = 16
WIDTH = 32
PROMPT = "push the cube to the goal"


@pytest.fixture(scope="module")
def made(pushcube_replay, tmp_path_factory) -> dict[str, Path]:
    """Folders of a cache of 64-pixel pictures, one of whole pictures, and norm stats, all of the same three demonstrations."""
    root = tmp_path_factory.mktemp("loader")
    source = root / "dataset" / "manifest.json"
    dataset(
        DatasetSettings(
            prompt=PROMPT, cameras=["base_camera"], state=["qpos"], image_storage="png"
        ),
        [pushcube_replay],
        source,
    )
    for name, image_size in (("small", 64), ("whole", 224)):
        training_cache(CacheSettings(image_size=image_size), source, root / name / "manifest.json")
    norm_stats(
        NormStatsSettings(action_horizon=HORIZON, delta_action_mask=MASK),
        source,
        root / "stats" / "manifest.json",
    )
    return {name: root / name for name in ("small", "whole", "stats")}


def prompt(with_state: bool = False) -> Prompt:
    return Prompt(Tokenizer.train([PROMPT], with_state=with_state), PROMPT, 80, with_state)


def open_data(made, cache: str = "small", **changes) -> TrainingData:
    arguments = {
        "prompt": prompt(),
        "cameras": {"base_0_rgb": "base_camera"},
        "image_size": 64 if cache == "small" else 224,
        "action_horizon": HORIZON,
        "action_dim": WIDTH,
        "delta_action_mask": MASK,
        "use_quantiles": True,
    }
    return TrainingData(
        made[cache], load_norm_stats(made["stats"] / "norm_stats.json"), **(arguments | changes)
    )


def arrays(made, cache: str = "small") -> dict[str, np.ndarray]:
    return {path.stem: np.load(path) for path in made[cache].glob("*.npy")}


def same(one: dict, other: dict) -> bool:
    flat = [
        {**batch, **{f"images/{name}": image for name, image in batch["images"].items()}}
        for batch in (one, other)
    ]
    return all(np.array_equal(flat[0][name], flat[1][name]) for name in flat[0] if name != "images")


@pytest.mark.parametrize("batch_size", [1, 7, 64])
def test_every_look_comes_once_an_epoch(batch_size):
    looks = 50
    steps = 3 * looks * batch_size // np.gcd(looks, batch_size) // batch_size
    drawn = np.concatenate([looks_of(step, batch_size, 5, looks) for step in range(steps)])
    epochs = drawn.reshape(-1, looks)
    assert (np.sort(epochs, axis=1) == np.arange(looks)).all()
    assert not np.array_equal(epochs[0], epochs[1])


def test_the_seed_decides_the_order():
    assert not np.array_equal(looks_of(0, 50, 0, 50), looks_of(0, 50, 1, 50))


def test_a_batch_follows_from_seed_and_step_alone(made):
    straight, resumed = (open_data(made, state_noise=0.03) for _ in range(2))
    batches = [straight.batch(step, 8, seed=3) for step in range(12)]
    assert same(resumed.batch(11, 8, seed=3), batches[11])
    assert same(resumed.batch(2, 8, seed=3), batches[2])
    assert not same(resumed.batch(2, 8, seed=4), batches[2])


def test_a_sample_is_its_look(made):
    data, cache = open_data(made), arrays(made)
    stats = load_norm_stats(made["stats"] / "norm_stats.json")
    batch = data.batch(0, 16, seed=0)
    for index, look in enumerate(looks_of(0, 16, 0, len(data))):
        row = cache["look_row"][look]
        assert np.array_equal(
            batch["images"]["base_0_rgb"][index], cache["images_base_camera"][look]
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
    assert batch["state"].shape == (16, WIDTH)
    assert batch["actions"].shape == (16, HORIZON, WIDTH)
    assert not batch["state"][:, 9:].any()
    assert not batch["actions"][..., 8:].any()
    assert batch["state"].dtype == batch["actions"].dtype == np.float32


def test_noise_on_the_state_leads_back_to_the_demonstration(made):
    stats = load_norm_stats(made["stats"] / "norm_stats.json")

    def absolute(data: TrainingData) -> tuple[np.ndarray, np.ndarray]:
        batch = data.batch(0, 16, seed=0)

        def unnormalised(values, item):
            return (values + 1) / 2 * (item.q99 - item.q01 + 1e-6) + item.q01

        state = unnormalised(batch["state"][:, :9], stats["state"])
        actions = unnormalised(batch["actions"][..., :8], stats["actions"])
        actions[..., :7] += state[:, None, :7]
        return state, actions

    (clean, clean_actions), (noisy, noisy_actions) = (
        absolute(open_data(made, state_noise=noise)) for noise in (0.0, 0.03)
    )
    difference = noisy - clean
    assert 0.02 < difference[:, :7].std() < 0.04
    assert not difference[:, 7:].any()
    assert np.allclose(noisy_actions, clean_actions, atol=1e-4)


def test_small_pictures_are_resized_to_the_models(made):
    data, cache = open_data(made, cache="whole"), arrays(made, "whole")
    batch = data.batch(0, 4, seed=0)
    for index, look in enumerate(looks_of(0, 4, 0, len(data))):
        expected = resize_with_pad(cache["images_base_camera"][look], 224, 224)
        assert np.array_equal(batch["images"]["base_0_rgb"][index], expected)


def test_the_prompt_holds_the_state_only_where_the_model_reads_it_there(made):
    plain = open_data(made).batch(0, 8, seed=0)
    with_state = open_data(made, prompt=prompt(with_state=True)).batch(0, 8, seed=0)
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
    )
    assets = tmp_path / "assets" / policy.asset_id
    assets.mkdir(parents=True)
    policy.write(tmp_path)
    shutil.copy(made["stats"] / "norm_stats.json", assets)
    Tokenizer.train([PROMPT], with_state=True).save(assets / "tokenizer.model")
    opened = TrainingData.for_policy(made["small"], tmp_path, state_noise=0.03).batch(5, 8, seed=1)
    config = policy.config
    named = {
        "image_size": config.siglip.image_size,
        "action_dim": config.action_dim,
        "state_noise": 0.03,
    }
    assert same(
        opened, open_data(made, prompt=prompt(with_state=True), **named).batch(5, 8, seed=1)
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"action_dim": 6}, "6 wide"),
        ({"cameras": {"base_0_rgb": "hand_camera"}}, "images_hand_camera.npy cannot be read"),
    ],
)
def test_what_does_not_fit_is_a_sentence(made, changes, expected):
    with pytest.raises(UserError, match=expected):
        open_data(made, **changes)


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


def test_held_out_demonstrations_are_never_seen():
    episode = np.array([0, 0, 0, 1, 1, 2, 2, 2])
    assert [trained_looks(episode, count) for count in (0, 1, 2)] == [8, 5, 3]
    with pytest.raises(UserError, match=r"num_val_demos is 3, and there are 3 demonstrations"):
        trained_looks(episode, 3)
