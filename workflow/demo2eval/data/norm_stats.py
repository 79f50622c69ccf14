"""Computes the norm stats of a dataset, in openpi's norm_stats.json, with exact quantiles.

In:  the manifest of a LeRobot dataset.
Out: norm_stats.json beside the manifest, and ranges.csv for people: smallest and largest value,
     mean, standard deviation and quantiles of each dimension, in its own units, before noise and
     min_scale and over all timesteps of the chunks.

As in openpi, the state counts once per row, and the actions are those of the chunk at every row,
after the differences from the state are taken, the last action repeated where the episode is over.
Every row counts, also one whose image is repeated. Quantiles are those of all values, not of a
histogram. No image is decoded.
"""

import sys
from pathlib import Path
from statistics import NormalDist

import numpy as np

from demo2eval.cli import run
from demo2eval.config import Actions
from demo2eval.data.chunks import chunk_rows, last_rows
from demo2eval.data.lerobot_reader import dataset_root, read_columns, read_info
from demo2eval.errors import UserError
from demo2eval.pi0.normalize import NormStats, exact_stats, save_norm_stats
from demo2eval.pi0.transforms import delta_actions
from demo2eval.provenance import read_manifest, run_stage
from demo2eval.robots import ARM_JOINTS, delta_action_mask

STATE, ACTION, EPISODE = "observation.state", "action", "episode_index"
HARDLY_VARIES = 1e-3
NORMAL_Q99 = NormalDist().inv_cdf(0.99)


def compute_norm_stats(dataset: Path, output: Path, *, actions: Actions = Actions()) -> None:
    """Compute the norm stats of a dataset.

    Args:
        dataset: manifest of the dataset.
        output: manifest to write; norm_stats.json is made beside it.
        actions: what a chunk is, and how it is normalized.

    Raises:
        UserError: if the dataset is damaged, or `actions.delta` does not go with it.
    """
    with run_stage(
        output,
        stage="norm_stats",
        module=__spec__.name,
        settings={"actions": actions},
        inputs={"dataset": dataset},
    ) as job:
        if job.reused:
            return
        root = dataset_root(dataset)
        mask = find_delta_mask(dataset, actions)
        columns = read_columns(root, [STATE, ACTION, EPISODE])
        chunks = action_chunks(columns, actions.action_horizon, mask)
        stats = compute_stats(columns[STATE], chunks, actions, mask)
        features = read_info(root)["features"]
        state_names, action_names = (features[column]["names"] for column in (STATE, ACTION))
        constant = [
            *hardly_varying(stats["state"], [f"state {name}" for name in state_names]),
            *hardly_varying(stats["actions"], [f"action {name}" for name in action_names]),
        ]
        for sentence in constant:
            print(f"hardly varies: {sentence}", file=sys.stderr)
        save_norm_stats(job.partial / "norm_stats.json", stats)
        ranges = {
            (STATE, *state_names): columns[STATE],
            (ACTION, *action_names): chunks.reshape(-1, chunks.shape[-1]),
        }
        write_ranges(job.partial / "ranges.csv", ranges)
        files = job.publish("norm_stats.json", "ranges.csv")
        job.finish(files, kept=files, rows=len(chunks), hardly_varies=constant)


def find_delta_mask(dataset: Path, actions: Actions) -> list[bool] | None:
    """Return for each action dimension whether it becomes a difference from the state; None: none.

    Raises:
        UserError: if the actions are no joint targets, or the state does not begin with joints.
    """
    metadata = read_manifest(dataset)["metadata"]
    control_mode, state = metadata["control_mode"], metadata["state"]
    if actions.delta and not (control_mode == "pd_joint_pos" and state[0] == "qpos"):
        raise UserError(
            f"actions.delta needs pd_joint_pos and a state that begins with qpos, but {dataset} "
            f"has {control_mode} and {', '.join(state)}; set actions.delta to false."
        )
    return delta_action_mask(control_mode, actions.delta)


def action_chunks(
    columns: dict[str, np.ndarray], horizon: int, mask: list[bool] | None
) -> np.ndarray:
    """Return the action chunk at every row, float32 [rows, horizon, dim], before normalization.

    Args:
        columns: `action` and `observation.state` [rows, dim], `episode_index` [rows].
        mask: per action dimension, whether it becomes a difference from the state.
    """
    rows = chunk_rows(np.arange(len(columns[ACTION])), last_rows(columns[EPISODE]), horizon)
    chunks = columns[ACTION][rows]
    return chunks if mask is None else delta_actions(chunks, columns[STATE], mask)


def compute_stats(
    state: np.ndarray, chunks: np.ndarray, actions: Actions, mask: list[bool] | None
) -> dict[str, NormStats]:
    """Return {"state": ..., "actions": ...} statistics.

    Args:
        state: [rows, state dim].
        chunks: [rows, horizon, action dim] of `action_chunks`.

    Returns:
        each [dim], or [horizon, action dim] of the actions if each timestep has its own.
    """
    values = chunks if actions.per_timestep_action_stats else chunks.reshape(-1, chunks.shape[-1])
    stats = {"state": exact_stats(state), "actions": exact_stats(values)}
    if actions.state_noise > 0:
        arm = np.arange(max(state.shape[1], chunks.shape[-1])) < ARM_JOINTS
        delta = np.zeros(chunks.shape[-1], bool) if mask is None else np.array(mask)
        noise = {"state": arm[: state.shape[1]], "actions": arm[: len(delta)] & delta}
        stats = {
            name: add_noise(item, actions.state_noise * noise[name]) for name, item in stats.items()
        }
    if actions.min_scale > 0:
        stats = {name: raise_scale(item, actions.min_scale) for name, item in stats.items()}
    return stats


def get_quantiles(stats: NormStats) -> tuple[np.ndarray, np.ndarray]:
    """Return q01 and q99 of statistics that have them."""
    assert stats.q01 is not None
    assert stats.q99 is not None
    return stats.q01, stats.q99


def add_noise(stats: NormStats, noise: np.ndarray) -> NormStats:
    """Return the statistics of the values with normal noise added, as state noise does in training.

    Variances add. So do the squares of the quantiles' distances, which is exact for normal values
    and for constant ones.

    Args:
        noise: [dim] standard deviation of the noise on each dimension.
    """
    low, high = get_quantiles(stats)
    middle, half = (high + low) / 2, (high - low) / 2
    wider = np.hypot(half, NORMAL_Q99 * noise)
    return NormStats(
        mean=stats.mean, std=np.hypot(stats.std, noise), q01=middle - wider, q99=middle + wider
    )


def raise_scale(stats: NormStats, min_scale: float) -> NormStats:
    """Return the statistics with std and (q99 - q01) / 2 raised to at least `min_scale`."""
    low, high = get_quantiles(stats)
    middle, narrow = (high + low) / 2, (high - low) / 2 < min_scale
    return NormStats(
        mean=stats.mean,
        std=np.maximum(stats.std, min_scale),
        q01=np.where(narrow, middle - min_scale, low),
        q99=np.where(narrow, middle + min_scale, high),
    )


def hardly_varying(stats: NormStats, names: list[str]) -> list[str]:
    """Return a sentence per dimension whose normalized values may be huge, or noise."""
    low, high = get_quantiles(stats)
    spread = np.atleast_2d(high - low).min(axis=0)
    std = np.atleast_2d(stats.std).min(axis=0)
    return [
        f"{name}: std {std[index]:.2g}, q99 - q01 {spread[index]:.2g}"
        for index, name in enumerate(names)
        if min(spread[index], std[index]) < HARDLY_VARIES
    ]


def write_ranges(path: Path, values: dict[tuple[str, ...], np.ndarray]) -> None:
    """Write ranges.csv from {(column, name of each dimension...): [n, dim]}."""
    import pandas

    tables = []
    for (column, *names), numbers in values.items():
        stats = exact_stats(numbers)
        table = {"column": column, "dimension": names, "min": numbers.min(axis=0)}
        table |= {"q01": stats.q01, "mean": stats.mean, "std": stats.std, "q99": stats.q99}
        tables.append(pandas.DataFrame(table | {"max": numbers.max(axis=0)}))
    pandas.concat(tables).to_csv(path, index=False, float_format="%.6g")


if __name__ == "__main__":
    run(compute_norm_stats)
