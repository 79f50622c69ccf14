"""What a policy is taught, to look at: images as the model sees them, actions, lengths.

In:  the manifests of a dataset, of its norm stats and of its image cache.
Out: in one folder, contact_sheet.png, some images of each camera in the model's size;
     action_histograms.png and .csv, the actions of all chunks in their own units, with q01 and q99;
     demo_lengths.png and .csv, the control steps of each demo, and the limit of an evaluation.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from demo2eval.cli import run
from demo2eval.config import Actions
from demo2eval.data.lerobot_reader import dataset_root, read_columns, read_info
from demo2eval.data.norm_stats import ACTION, EPISODE, STATE, action_chunks, find_delta_mask
from demo2eval.figures import BLUE, VERMILION, new_figure
from demo2eval.pi0.image import resize_with_pad
from demo2eval.provenance import read_manifest, write_atomic

if TYPE_CHECKING:
    import pandas as pd

NUM_DEMOS, NUM_IMAGES = 4, 8
"""Rows of each camera, and columns, of the contact sheet."""
NUM_BINS = 60


def make_dataset_figures(
    dataset: Path,
    norm_stats: Path,
    image_cache: Path,
    folder: Path,
    *,
    cameras: list[str],
    image_size: int,
    max_episode_steps: int,
    actions: Actions = Actions(),
) -> None:
    """Draw the figures of a run's dataset.

    Args:
        dataset, norm_stats, image_cache: manifests.
        folder: to write into.
        cameras: ManiSkill's cameras that the model sees.
        image_size: side of the model's images, pixels.
        max_episode_steps: of the evaluation.
        actions: what a chunk is.
    """
    folder = Path(folder)
    root, seeds = dataset_root(dataset), read_manifest(dataset)["metadata"]["seeds"]
    columns = read_columns(root, [STATE, ACTION, EPISODE])
    lengths = count_steps(columns[EPISODE], seeds)
    draw_lengths(lengths, max_episode_steps, folder / "demo_lengths.png")
    write_atomic(folder / "demo_lengths.csv", to_csv(lengths))

    mask = find_delta_mask(dataset, actions)
    chunks = action_chunks(columns, actions.action_horizon, mask)
    names = read_info(root)["features"][ACTION]["names"]
    histograms = count_actions(chunks.reshape(-1, chunks.shape[-1]), names)
    quantiles = read_ranges(Path(norm_stats).parent / "ranges.csv")
    draw_histograms(histograms, quantiles, folder / "action_histograms.png")
    write_atomic(folder / "action_histograms.csv", to_csv(histograms))

    draw_contact_sheet(
        Path(image_cache).parent, cameras, image_size, seeds, folder / "contact_sheet.png"
    )


def to_csv(rows: "pd.DataFrame") -> str:
    """Return a table as text."""
    return rows.to_csv(index=False, lineterminator="\n", float_format="%.6g")


def count_steps(episode: np.ndarray, seeds: list[int]) -> "pd.DataFrame":
    """Return the control steps of each demo.

    Args:
        episode: [rows] the demo of each row.
        seeds: of the demos, in their order.
    """
    import pandas as pd

    steps = np.bincount(episode)
    return pd.DataFrame({"episode": range(len(steps)), "seed": seeds, "steps": steps})


def draw_lengths(lengths: "pd.DataFrame", limit: int, file: Path) -> None:
    """Draw how long demos are, and the limit of an episode of the evaluation."""
    with new_figure(file, figsize=(6.4, 3.2)) as (_, axes):
        axes.hist(lengths.steps, bins=30, color=BLUE)
        axes.axvline(limit, color=VERMILION, linestyle="--", label=f"evaluation ends at {limit}")
        axes.set(xlabel="control steps of a demo", ylabel="demos", xlim=(0, 1.05 * limit))
        longest = lengths.steps.max()
        axes.set_title(f"{len(lengths)} demos, the longest takes {longest} steps", fontsize=11)
        axes.yaxis.get_major_locator().set_params(integer=True)
        axes.legend(frameon=False, fontsize=9)


def count_actions(values: np.ndarray, names: list[str]) -> "pd.DataFrame":
    """Return the histogram of each action dimension, a row per bin.

    Args:
        values: [n, dim] in their own units.
        names: of the dimensions.
    """
    import pandas as pd

    tables = []
    for name, numbers in zip(names, values.T, strict=True):
        counts, edges = np.histogram(numbers, bins=NUM_BINS)
        bins = {"dimension": name, "low": edges[:-1], "high": edges[1:], "count": counts}
        tables.append(pd.DataFrame(bins))
    return pd.concat(tables, ignore_index=True)


def read_ranges(path: Path) -> "pd.DataFrame":
    """Return q01 and q99 of each action dimension, by its name."""
    import pandas as pd

    ranges = pd.read_csv(path)
    return ranges[ranges.column == ACTION].set_index("dimension")


def draw_histograms(histograms: "pd.DataFrame", ranges: "pd.DataFrame", file: Path) -> None:
    """Draw the histogram of each action dimension, with its q01 and q99."""
    dimensions = histograms.groupby("dimension", sort=False)
    num_columns = 4
    num_rows = -(-len(dimensions) // num_columns)
    size = {"nrows": num_rows, "ncols": num_columns, "figsize": (10, 0.6 + 2.2 * num_rows)}
    with new_figure(file, squeeze=False, **size) as (figure, axes):
        panels = axes.ravel()
        for (name, bins), panel in zip(dimensions, panels, strict=False):
            edges = [*bins.low, bins.high.iloc[-1]]
            panel.stairs(bins["count"], edges, fill=True, color=BLUE, alpha=0.6)
            for quantile in ("q01", "q99"):
                panel.axvline(ranges[quantile][name], color=VERMILION, linestyle="--", linewidth=1)
            panel.set(yscale="log", ylim=(0.5, None))
            panel.set_title(str(name), fontsize=9)
            panel.tick_params(labelsize=8)
            panel.locator_params(axis="x", nbins=4)
        for panel in panels[len(dimensions) :]:
            panel.remove()
        figure.suptitle(
            "actions of all chunks, in their own units; dashed: q01 and q99", fontsize=11
        )
        figure.supylabel("actions", fontsize=9)


def draw_contact_sheet(
    cache: Path, cameras: list[str], image_size: int, seeds: list[int], file: Path
) -> None:
    """Draw some images of each camera, as training gives them to the model before augmentation.

    Args:
        cache: folder of the image cache.
        cameras: ManiSkill's.
        image_size: side of the model's images, pixels.
        seeds: of the demos.
    """
    rows, episode = (np.load(cache / f"{name}.npy") for name in ("sample_row", "episode"))
    of_sample = episode[rows]
    demos = np.unique(np.linspace(0, len(seeds) - 1, NUM_DEMOS).round().astype(int))
    lines = [(camera, int(demo)) for camera in cameras for demo in demos]
    size = {"nrows": len(lines), "ncols": NUM_IMAGES, "figsize": (10, 0.6 + 1.35 * len(lines))}
    with new_figure(file, squeeze=False, **size) as (figure, axes):
        for (camera, demo), panels in zip(lines, axes, strict=True):
            images: Any = np.load(cache / f"images_{camera}.npy", mmap_mode="r")
            samples = np.flatnonzero(of_sample == demo)
            chosen = samples[np.linspace(0, len(samples) - 1, NUM_IMAGES).round().astype(int)]
            start = np.searchsorted(episode, demo)
            for sample, panel in zip(chosen, panels, strict=True):
                image = resize_with_pad(np.asarray(images[sample]), image_size, image_size)
                panel.imshow(image, interpolation="nearest")
                panel.set(xticks=[], yticks=[])
                panel.grid(visible=False)
                panel.set_title(f"step {rows[sample] - start}", fontsize=7, pad=2)
            panels[0].set_ylabel(f"{camera}\nseed {seeds[demo]}", fontsize=7)
        title = f"{image_size} x {image_size} pixels, as the model sees them before augmentation"
        figure.suptitle(title, fontsize=11)


if __name__ == "__main__":
    run(make_dataset_figures)
