"""Transforms, prompts and statistics against openpi's own numbers."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from demo2eval.errors import UserError
from demo2eval.pi0.normalization import exact_stats, load_norm_stats, save_norm_stats
from demo2eval.pi0.tokenizer import Tokenizer, clean, discretize
from demo2eval.pi0.transforms import absolute_actions, augment, delta_actions, normalize, pad, resize_with_pad, unnormalize

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
FACTS = json.loads((GOLDEN / "data.json").read_text())
SIZES = ["480x640", "180x320", "640x480", "100x100", "300x224", "225x223"]
PROMPT = "push the blue cube into the red and white target region"


@pytest.fixture(scope="module")
def data() -> dict[str, np.ndarray]:
    with np.load(GOLDEN / "data.npz") as file:
        return {name: file[name] for name in file.files}


@pytest.fixture(scope="module")
def stats():
    return load_norm_stats(GOLDEN / "norm_stats_example/norm_stats.json")


@pytest.mark.parametrize("size", SIZES)
def test_resize(data, size):
    np.testing.assert_array_equal(resize_with_pad(data[f"img_{size}"][0], 224, 224), data[f"pil_{size}"][0])


@pytest.mark.parametrize(("kind", "use_quantiles"), [("z", False), ("q", True)])
def test_normalisation(data, stats, kind, use_quantiles):
    for name in ("state", "actions"):
        np.testing.assert_allclose(
            normalize(data[f"x_{name}"], stats[name], use_quantiles), data[f"norm_{kind}_{name}"], rtol=1e-12
        )
    padded = pad(normalize(data["x_actions"], stats["actions"], use_quantiles), 32)
    np.testing.assert_allclose(padded, data[f"padded_{kind}_actions"], rtol=1e-12)
    back = unnormalize(data[f"padded_{kind}_actions"] + 0.25, stats["actions"], use_quantiles)
    np.testing.assert_allclose(back, data[f"unnorm_{kind}_actions_plus.25"], atol=1e-6)


def test_delta_actions(data):
    mask = [True] * 6 + [False]
    np.testing.assert_array_equal(delta_actions(data["x_actions"], data["x_state"], mask), data["delta_actions"])
    np.testing.assert_array_equal(absolute_actions(data["delta_actions"], data["x_state"], mask), data["abs_actions"])


def test_statistics(data, stats):
    values = np.concatenate([data[f"stats_chunk{index}"] for index in range(5)]).reshape(-1, 7)
    mine, golden = exact_stats(values), stats["actions"]
    np.testing.assert_allclose(mine.mean, golden.mean, atol=1e-9)
    np.testing.assert_allclose(mine.std, golden.std, atol=1e-9)
    # openpi reads quantiles off a histogram; they are as good as its bins are wide.
    for name in ("q01", "q99"):
        assert (np.abs(getattr(mine, name) - getattr(golden, name)) < 0.01 * (values.max(0) - values.min(0))).all()


def test_norm_stats_file(tmp_path, stats):
    save_norm_stats(tmp_path / "norm_stats.json", stats)
    again = load_norm_stats(tmp_path / "norm_stats.json")
    np.testing.assert_array_equal(again["state"].q99, stats["state"].q99)
    without = load_norm_stats(GOLDEN / "norm_stats_example_noq/norm_stats.json")
    assert without["state"].q01 is None
    with pytest.raises(UserError, match="quantiles"):
        normalize(np.zeros(2), without["state"], use_quantiles=True)


def test_state_bins():
    facts = FACTS["discretise"]
    np.testing.assert_array_equal(discretize(np.array(facts["x"])), facts["bins"])


@pytest.mark.parametrize(
    "example", FACTS["prompts"], ids=lambda example: f"{example['prompt']!r:.12}-{example['state'] is not None}"
)
def test_prompt_wording(example):
    """What openpi hands to SentencePiece: the words with BOS, then the line break, or everything at once with the state."""
    if example["state"] is None:
        assert clean(example["prompt"]) == example["calls"][0][0]
    else:
        numbers = " ".join(str(value) for value in discretize(np.array(example["state"])))
        assert f"Task: {clean(example['prompt'])}, State: {numbers};\nAction: " == example["calls"][0][0]


def test_a_small_tokenizer_is_the_same_each_time_and_loses_nothing(tmp_path):
    tokenizer = Tokenizer.train([PROMPT], with_state=True)
    tokenizer.save(tmp_path / "tokenizer.model")
    again = Tokenizer.train([PROMPT], with_state=True)
    again.save(tmp_path / "again.model")
    assert (tmp_path / "tokenizer.model").read_bytes() == (tmp_path / "again.model").read_bytes()
    length = tokenizer.needed_length([PROMPT], 9)
    states = np.random.default_rng(0).uniform(-1.2, 1.2, (200, 9))
    seen = set()
    for state in states:
        tokens, mask = tokenizer.tokenize(PROMPT, state, length + 5)
        assert mask.sum() <= length
        seen.add(tuple(tokens))
    assert len(seen) == len(states)
    tokens, mask = tokenizer.tokenize(PROMPT, None, 6)
    assert mask.all()
    assert tokens[0] == 2
    assert tokenizer.vocab_size < 1000


def test_augmentation_keeps_shape_and_range_and_never_moves_a_wrist():
    picture = jax.random.uniform(jax.random.key(0), (4, 32, 32, 3)) * 2 - 1
    images = {"base_0_rgb": picture, "left_wrist_0_rgb": picture}
    moved = augment(jax.random.key(1), images)
    again = augment(jax.random.key(1), images)
    for camera in images:
        assert moved[camera].shape == picture.shape
        assert float(jnp.abs(moved[camera]).max()) <= 1 + 1e-5
        np.testing.assert_array_equal(moved[camera], again[camera])
    # Half of the wrist's pictures are not jittered, and then they are the same.
    unchanged = jnp.abs(moved["left_wrist_0_rgb"] - picture).max(axis=(1, 2, 3)) < 1e-5
    assert 0 < int(unchanged.sum()) < 4
    assert not bool((jnp.abs(moved["base_0_rgb"] - picture).max(axis=(1, 2, 3)) < 1e-3).any())
