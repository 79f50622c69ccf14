"""Datasets and statistics beside those of LeRobot's own writer and of openpi's histograms, as benchmarks/data.py compares them."""

from pathlib import Path

import numpy as np
import pytest
from benchmark_modules import load_benchmark

from demo2eval.data.dataset import Settings, dataset
from demo2eval.data.lerobot_reader import read_columns
from demo2eval.data.norm_stats import Settings as StatsSettings
from demo2eval.data.norm_stats import compute

data_benchmark = load_benchmark("data")
MASK = data_benchmark.MASK


@pytest.fixture(scope="module")
def roots(pushcube_replay, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """{storage: (root of our dataset, root of the same by LeRobot's `add_frame` and `save_episode`)}."""
    found = {}
    for storage in ("png", "video"):
        folder = tmp_path_factory.mktemp(storage)
        settings = Settings(
            prompt="push", cameras=["base_camera"], state=["qpos"], image_storage=storage
        )
        dataset(settings, [pushcube_replay], folder / "ours" / "manifest.json")
        data_benchmark.lerobot_convert(settings, pushcube_replay, folder / "theirs")
        found[storage] = folder / "ours" / "lerobot", folder / "theirs"
    return found


def test_lerobots_own_writer_makes_the_same_dataset(roots):
    assert data_benchmark.columns_equal(*roots["png"])
    assert data_benchmark.picture_differences(*roots["png"]) == (0, 0.0)


def test_video_is_as_good_as_lerobots(roots):
    """It encodes each episode by itself, we a shard at once: key frames stand elsewhere, and so do the losses."""
    ours, theirs = roots["video"]
    assert data_benchmark.columns_equal(ours, theirs)
    exact, _ = roots["png"]
    quality = data_benchmark.decibels(ours, exact), data_benchmark.decibels(theirs, exact)
    assert min(quality) > 40, quality
    assert abs(quality[0] - quality[1]) < 0.5, quality


def test_statistics_are_exact_and_openpis_within_a_bin(roots):
    root, _ = roots["png"]
    columns = read_columns(root, ["observation.state", "action", "episode_index"])
    stats = compute(
        columns, StatsSettings(action_horizon=data_benchmark.HORIZON, delta_action_mask=MASK)
    )
    exact = data_benchmark.exact_statistics(root, MASK)
    # All rows in one batch, so that the bins are not dealt anew, which moves what they hold.
    running = data_benchmark.openpi_statistics(
        root, 20, MASK, workers=0, batch_size=len(columns["action"])
    )
    for name, ordered in data_benchmark.sorted_values(root, MASK).items():
        for key, value in exact[name].items():
            assert np.allclose(getattr(stats[name], key), value, rtol=0, atol=1e-9), (name, key)
        for key in ("mean", "std"):
            assert np.allclose(getattr(running[name], key), exact[name][key], rtol=0, atol=1e-5), (
                name,
                key,
            )
        for quantile in data_benchmark.QUANTILES:
            assert (data_benchmark.bins_off(running[name], ordered, quantile) <= 1.01).all(), (
                name,
                quantile,
            )
