"""Normalisation statistics of a dataset's states and action chunks, in openpi's norm_stats.json, with exact quantiles.

In:  the manifest of a LeRobot dataset.
Out: norm_stats.json beside the output, and ranges.csv for people: each dimension's smallest and largest value, its mean, standard deviation
     and quantiles, in its own units, before noise and floor and over all steps of the chunks.

As in openpi, the state counts once a row, and the actions are those of the chunk at every row, after the differences from the state
are taken, with the last action repeated where the episode is over. Every row counts, also one whose picture is repeated. The quantiles
are those of all values, not of a histogram. No picture is decoded.
"""

import csv
import sys
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist

import numpy as np

from demo2eval.cli import option, run, settings_from, stage_parser
from demo2eval.data.chunks import ARM_JOINTS, chunk_rows, last_rows
from demo2eval.data.lerobot_reader import (
    check_finite,
    dataset_root,
    dimension_names,
    read_columns,
    read_info,
)
from demo2eval.errors import UserError
from demo2eval.pi0.normalize import NormStats, exact_stats, save_norm_stats
from demo2eval.pi0.transforms import delta_actions
from demo2eval.provenance import Work, making

STATE, ACTION, EPISODE = "observation.state", "action", "episode_index"
RANGE_COLUMNS = ("column", "dimension", "min", "q01", "mean", "std", "q99", "max")
TINY = 1e-3
NORMAL_Q99 = NormalDist().inv_cdf(0.99)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the statistics, given the dataset."""

    action_horizon: int = option("actions in a chunk")
    delta_action_mask: list | None = option(
        "per action dimension, whether it is a difference from the state; null: none", None
    )
    per_timestep_action_stats: bool = option(
        "statistics of each step of the chunk by itself (openpi: of all together)", False
    )
    min_scale: float = option(
        "smallest std and smallest half of q99 - q01; 0: as they are (openpi)", 0.0
    )
    state_noise: float = option(
        "standard deviation of training's noise on the joints, radians; widens the statistics", 0.0
    )


def action_chunks(
    action: np.ndarray, state: np.ndarray, episode: np.ndarray, settings: Settings
) -> np.ndarray:
    """Return the action chunk at every row, float32 [rows, horizon, action width], as training sees it before normalisation."""
    rows = chunk_rows(np.arange(len(action)), last_rows(episode), settings.action_horizon)
    if settings.delta_action_mask is None:
        return action[rows]
    return delta_actions(action[rows], state, settings.delta_action_mask)


def with_noise(stats: NormStats, noise: np.ndarray) -> NormStats:
    """Return the statistics of the values with normal noise added, as state noise does in training.

    Variances add. So do the squares of the quantiles' distances, which is exact for normal values and for constant ones.

    Args:
        noise: [dim] standard deviation of the noise on each dimension.
    """
    middle, half = (stats.q99 + stats.q01) / 2, (stats.q99 - stats.q01) / 2
    wider = np.hypot(half, NORMAL_Q99 * noise)
    return NormStats(
        mean=stats.mean, std=np.hypot(stats.std, noise), q01=middle - wider, q99=middle + wider
    )


def noise_of(settings: Settings, state_dim: int, action_width: int) -> dict[str, np.ndarray]:
    """Return the noise on each dimension: on the arm joints of the state, and on the differences from them."""
    joints = np.arange(max(state_dim, action_width)) < ARM_JOINTS
    mask = np.zeros(action_width, bool)
    mask[: len(settings.delta_action_mask or [])] = settings.delta_action_mask or []
    return {
        "state": settings.state_noise * joints[:state_dim],
        "actions": settings.state_noise * (joints[:action_width] & mask),
    }


def with_floor(stats: NormStats, floor: float) -> NormStats:
    """Return the statistics with std and (q99 - q01) / 2 raised to `floor`, the middle of the quantiles kept."""
    middle, half = (stats.q99 + stats.q01) / 2, (stats.q99 - stats.q01) / 2
    low = half < floor
    return NormStats(
        mean=stats.mean,
        std=np.maximum(stats.std, floor),
        q01=np.where(low, middle - floor, stats.q01),
        q99=np.where(low, middle + floor, stats.q99),
    )


def notes(stats: NormStats, names: list[str], what: str) -> list[str]:
    """Return a sentence for each dimension that hardly varies, whose normalised values may be huge or noise."""
    width = np.atleast_2d(stats.q99 - stats.q01).min(axis=0)
    deviation = np.atleast_2d(stats.std).min(axis=0)
    return [
        f"{what} {name}: std {deviation[index]:.2g}, q99 - q01 {width[index]:.2g}"
        for index, name in enumerate(names)
        if min(width[index], deviation[index]) < TINY
    ]


def compute(columns: dict[str, np.ndarray], settings: Settings) -> dict[str, NormStats]:
    """Return {"state": [state dim], "actions": [action width] or, chunkwise, [horizon, action width]} statistics.

    Args:
        columns: `observation.state` [rows, state dim], `action` [rows, action width] and `episode_index` [rows].
    """
    return _statistics(columns, settings)[0]


def _statistics(
    columns: dict[str, np.ndarray], settings: Settings
) -> tuple[dict[str, NormStats], list[tuple]]:
    """Return what `compute` does, and a line of ranges.csv, but for the name, for each dimension of the state and of the actions."""
    chunks = action_chunks(columns[ACTION], columns[STATE], columns[EPISODE], settings)
    values = {STATE: columns[STATE], ACTION: chunks.reshape(-1, chunks.shape[-1])}
    plain = {column: exact_stats(item) for column, item in values.items()}
    ranges = []
    for column, item in values.items():
        of = plain[column]
        parts = (item.min(axis=0), of.q01, of.mean, of.std, of.q99, item.max(axis=0))
        ranges += [(column, *numbers) for numbers in zip(*parts, strict=True)]
    stats = {
        "state": plain[STATE],
        "actions": exact_stats(chunks) if settings.per_timestep_action_stats else plain[ACTION],
    }
    if settings.state_noise > 0:
        noise = noise_of(settings, columns[STATE].shape[1], columns[ACTION].shape[1])
        stats = {name: with_noise(item, noise[name]) for name, item in stats.items()}
    if settings.min_scale > 0:
        stats = {name: with_floor(item, settings.min_scale) for name, item in stats.items()}
    return stats, ranges


def write_ranges(file: Path, ranges: list[tuple], names: list[str]) -> None:
    """Write ranges.csv from its lines, (column, min, q01, mean, std, q99, max), and the names of their dimensions."""
    with open(file, "w", newline="", encoding="utf-8") as target:
        table = csv.writer(target, lineterminator="\n")
        table.writerow(RANGE_COLUMNS)
        for (column, *numbers), name in zip(ranges, names, strict=True):
            table.writerow([column, name, *(f"{number:.6g}" for number in numbers)])


def norm_stats(settings: Settings, dataset: Path, output: Path) -> None:
    """Write norm_stats.json beside the manifest `output`, from the manifest of a dataset.

    Raises:
        UserError: if the dataset is damaged or holds NaN or infinity, or the mask does not fit its actions.
    """
    with making(
        output,
        stage="norm_stats",
        module=__spec__.name,
        settings=settings,
        inputs={"dataset": dataset},
    ) as work:
        if not work.finished:
            _make(settings, Path(dataset), work)


def _make(settings: Settings, dataset: Path, work: Work) -> None:
    root = dataset_root(dataset)
    info = read_info(root)
    columns = read_columns(root, [STATE, ACTION, EPISODE])
    check_finite({name: columns[name] for name in (STATE, ACTION)}, columns[EPISODE], str(root))
    mask, width = settings.delta_action_mask, columns[ACTION].shape[1]
    if mask is not None and (len(mask) > width or len(mask) > columns[STATE].shape[1]):
        raise UserError(
            f"delta_action_mask has {len(mask)} dimensions, {root} {width} of the action and {columns[STATE].shape[1]} of the state."
        )
    stats, ranges = _statistics(columns, settings)
    names = {column: dimension_names(info, column) for column in (STATE, ACTION)}
    sentences = notes(stats["state"], names[STATE], "state") + notes(
        stats["actions"], names[ACTION], "action"
    )
    for sentence in sentences:
        print(f"hardly varies: {sentence}", file=sys.stderr)
    files = [work.folder / name for name in ("norm_stats.json", "ranges.csv")]
    save_norm_stats(work.partial / files[0].name, stats)
    write_ranges(work.partial / files[1].name, ranges, names[STATE] + names[ACTION])
    for file in files:
        (work.partial / file.name).rename(file)
    counted = (
        "each step of the chunks by itself"
        if settings.per_timestep_action_stats
        else "every step of every chunk, as openpi's"
    )
    facts = {
        "rows": len(columns[ACTION]),
        "episodes": info["total_episodes"],
        "actions_counted": counted,
        "notes": sentences,
    }
    work.finish(files, **facts)


def main() -> None:
    """Run the stage from the command line."""
    parser = stage_parser(__doc__, Settings)
    parser.add_argument("--input", type=Path, required=True, help="manifest of the dataset")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="manifest to write; norm_stats.json is made beside it",
    )
    arguments = parser.parse_args()
    norm_stats(settings_from(arguments, Settings), arguments.input, arguments.output)


if __name__ == "__main__":
    run(main)
