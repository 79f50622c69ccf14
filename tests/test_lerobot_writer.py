"""Datasets and statistics beside those of LeRobot's own writer and of openpi's histograms, as benchmarks/data.py compares them."""

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest

from demo2eval.dataset import Settings, dataset
from demo2eval.lerobot_reader import read_columns
from demo2eval.norm_stats import Settings as StatsSettings
from demo2eval.norm_stats import compute

ROOT = Path(__file__).resolve().parent.parent
_spec = importlib.util.spec_from_file_location("data_benchmark", ROOT / "benchmarks" / "data.py")
data_benchmark = importlib.util.module_from_spec(_spec)
sys.modules[_spec.name] = data_benchmark
_spec.loader.exec_module(data_benchmark)
MASK = [True] * 7 + [False]


@pytest.fixture(scope="module", params=["png", "video"])
def both(request, pushcube_replay, tmp_path_factory) -> tuple[str, Path, Path]:
    """(how pictures are stored, our dataset's root, the root of the same dataset by LeRobot's `add_frame` and `save_episode`)."""
    folder = tmp_path_factory.mktemp(request.param)
    settings = Settings(prompt="push", cameras=["base_camera"], state=["qpos"], image_storage=request.param)
    dataset(settings, [pushcube_replay], folder / "ours" / "manifest.json")
    data_benchmark.lerobot_convert(settings, pushcube_replay, folder / "theirs")
    return request.param, folder / "ours" / "lerobot", folder / "theirs"


def test_lerobots_own_writer_makes_the_same_dataset(both):
    storage, ours, theirs = both
    assert data_benchmark.columns_equal(ours, theirs)
    largest, mean = data_benchmark.picture_differences(ours, theirs)
    assert largest == 0, (storage, largest, mean)


def test_statistics_are_exact_and_openpis_within_a_bin(both):
    _, root, _ = both
    stats = compute(
        read_columns(root, ["observation.state", "action", "episode_index"]),
        StatsSettings(action_horizon=data_benchmark.HORIZON, delta_action_mask=MASK),
    )
    exact = data_benchmark.exact_statistics(root, MASK)
    running = data_benchmark.openpi_statistics(root, 20, MASK, workers=0)
    for name, values in exact.items():
        for key, value in values.items():
            assert np.allclose(getattr(stats[name], key), value, rtol=0, atol=1e-9), (name, key)
        for key in ("mean", "std"):
            assert np.allclose(getattr(running[name], key), values[key], atol=1e-5)
        for quantile in data_benchmark.QUANTILES:
            bins = np.abs(running[name].quantile(quantile) - values[f"q{round(quantile * 100):02d}"]) / running[name].bin_width
            assert (bins <= 1.01).all(), (name, quantile, bins)
