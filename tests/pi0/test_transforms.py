"""Transforms, prompts and statistics against openpi's own numbers."""

import jax
import jax.numpy as jnp
import numpy as np

from demo2eval.pi0.normalize import exact_stats, load_norm_stats, save_norm_stats
from demo2eval.pi0.tokenizer import Tokenizer
from demo2eval.pi0.transforms import augment

PROMPT = "push the blue cube into the red and white target region"


def test_norm_stats_file(tmp_path):
    values = np.random.default_rng(0).normal(size=(100, 3))
    save_norm_stats(
        tmp_path / "norm_stats.json", {"state": exact_stats(values), "actions": exact_stats(values)}
    )
    again = load_norm_stats(tmp_path / "norm_stats.json")
    np.testing.assert_array_equal(again["state"].q99, exact_stats(values).q99)


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
