"""Datasets and norm stats beside those of LeRobot's writer and of openpi's histograms.

benchmarks/data.py compares them in the same way.
"""

from pathlib import Path

import numpy as np
import pytest
from benchmark_modules import load_benchmark

from demo2eval.config import Actions, Dataset
from demo2eval.data.lerobot_reader import read_columns
from demo2eval.data.norm_stats import action_chunks, compute_stats

data_benchmark = load_benchmark("data")
MASK, HORIZON = data_benchmark.MASK, data_benchmark.HORIZON


@pytest.fixture(scope="module")
def roots(pushcube_replay, tmp_path_factory) -> dict[str, tuple[Path, Path]]:
    """{storage: (root of our dataset, root of the same by LeRobot's `add_frame`)}."""
    found = {}
    for storage in ("png", "video"):
        folder = tmp_path_factory.mktemp(storage)
        dataset = Dataset.model_validate({"image_storage": storage, "video_crf": 10})
        conversion = data_benchmark.Conversion(pushcube_replay, "push", dataset)
        conversion.build(folder / "ours" / "manifest.json")
        data_benchmark.lerobot_convert(conversion, folder / "theirs")
        found[storage] = folder / "ours" / "lerobot", folder / "theirs"
    return found


def test_lerobots_own_writer_makes_the_same_dataset(roots):
    assert data_benchmark.columns_equal(*roots["png"])
    assert data_benchmark.image_differences(*roots["png"]) == (0, 0.0)


def test_video_is_as_good_as_lerobots(roots):
    """It encodes each episode by itself, we a shard at once, with key frames elsewhere."""
    ours, theirs = roots["video"]
    assert data_benchmark.columns_equal(ours, theirs)
    exact, _ = roots["png"]
    psnr = data_benchmark.measure_psnr(ours, exact), data_benchmark.measure_psnr(theirs, exact)
    assert min(psnr) > 40, psnr
    assert abs(psnr[0] - psnr[1]) < 0.5, psnr


def test_norm_stats_are_exact_and_openpis_within_a_bin(roots):
    root, _ = roots["png"]
    columns = read_columns(root, ["observation.state", "action", "episode_index"])
    chunks = action_chunks(columns, HORIZON, MASK)
    stats = compute_stats(columns["observation.state"], chunks, Actions(), MASK)
    exact = data_benchmark.exact_stats(root, MASK)
    # All rows in one batch, so that the bins are not filled anew, which moves what they hold.
    running = data_benchmark.openpi_stats(
        root, 20, MASK, workers=0, batch_size=len(columns["action"])
    )
    for name, values in data_benchmark.sorted_values(root, MASK).items():
        for key, value in exact[name].items():
            assert np.allclose(getattr(stats[name], key), value, rtol=0, atol=1e-9), (name, key)
        for key in ("mean", "std"):
            found = getattr(running[name], key)
            assert np.allclose(found, exact[name][key], rtol=0, atol=1e-5), (name, key)
        for quantile in data_benchmark.QUANTILES:
            off = data_benchmark.bins_off(running[name], values, quantile)
            assert (off <= 1.01).all(), (name, quantile)
