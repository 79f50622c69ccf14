"""The figures of a dataset show what is in it."""

import numpy as np
import pandas as pd
from PIL import Image

from demo2eval.config import Actions
from demo2eval.data.dataset_figures import NUM_IMAGES, make_dataset_figures


def test_tables_and_contact_sheet(pushcube_run, tmp_path):
    make_dataset_figures(
        pushcube_run / "dataset/manifest.json",
        pushcube_run / "norm_stats/manifest.json",
        pushcube_run / "cache_64/manifest.json",
        tmp_path,
        cameras=["base_camera"],
        image_size=64,
        max_episode_steps=120,
        actions=Actions(action_horizon=8),
    )
    lengths = pd.read_csv(tmp_path / "demo_lengths.csv")
    rows = len(np.load(pushcube_run / "cache_64/episode.npy"))
    assert (len(lengths), lengths.steps.sum()) == (3, rows)
    histograms = pd.read_csv(tmp_path / "action_histograms.csv")
    counts = histograms.groupby("dimension", sort=False)["count"].sum()
    assert counts.index[-1] == "gripper"
    assert (counts == 8 * rows).all()
    for name in ("demo_lengths", "action_histograms", "contact_sheet"):
        with Image.open(tmp_path / f"{name}.png") as image:
            assert len(image.convert("RGB").getcolors(1 << 24)) > 20
    # A row of images for each of the three demos.
    sheet = np.asarray(Image.open(tmp_path / "contact_sheet.png").convert("RGB"))
    table = (sheet.astype(int) - [255, 255, 255]).any(axis=2)
    assert table.mean() > 0.4, f"{NUM_IMAGES} images a row leave little white"
