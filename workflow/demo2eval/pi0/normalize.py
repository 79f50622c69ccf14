"""Norm stats: mean, std and two quantiles of each dimension, in openpi's norm_stats.json.

`normalize` and `unnormalize` are the only places where states and actions change their scale.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from demo2eval.errors import UserError

EPSILON = 1e-6


@dataclass(frozen=True)
class NormStats:
    """Statistics of a state or an action, each float64 [d], or [ah, d] if per timestep of a chunk.

    Files without quantiles, as openpi writes them for some Pi0 checkpoints, give None for `q01` and
    `q99`.
    """

    mean: Float[np.ndarray, "*ah d"]
    std: Float[np.ndarray, "*ah d"]
    q01: Float[np.ndarray, "*ah d"] | None = None
    q99: Float[np.ndarray, "*ah d"] | None = None


def exact_stats(values: Float[np.ndarray, "n ..."]) -> NormStats:
    """Return the statistics of values over their first axis, in float64.

    The std is that of the population. Quantiles are interpolated linearly between order statistics
    (numpy's default, definition 7 of Hyndman and Fan, 1996).
    """
    values = np.asarray(values, dtype=np.float64)
    q01, q99 = np.quantile(values, [0.01, 0.99], axis=0)
    return NormStats(mean=values.mean(axis=0), std=values.std(axis=0), q01=q01, q99=q99)


def normalize(
    values: Float[np.ndarray, "*b d"], stats: NormStats, use_quantiles: bool
) -> Float[np.ndarray, "*b d"]:
    """Bring values to the model's scale.

    With quantiles (Pi0.5) q01 becomes -1 and q99 becomes 1. Without (Pi0) the mean becomes 0 and
    the std becomes 1. Nothing is clipped.

    Raises:
        UserError: if quantiles are asked for and the stats have none.
    """
    low, scale = _low_and_scale(stats, use_quantiles, values.shape[-1])
    return (values - low) / scale * 2.0 - 1.0 if use_quantiles else (values - low) / scale


def unnormalize(
    values: Float[np.ndarray, "*b d"], stats: NormStats, use_quantiles: bool
) -> Float[np.ndarray, "*b d"]:
    """Undo `normalize`. Dimensions beyond those of the stats are padding and pass unchanged."""
    dim = stats.mean.shape[-1]
    low, scale = _low_and_scale(stats, use_quantiles, min(dim, values.shape[-1]))
    known = values[..., :dim]
    known = (known + 1.0) / 2.0 * scale + low if use_quantiles else known * scale + low
    return np.concatenate([known, values[..., dim:]], axis=-1)


def _low_and_scale(
    stats: NormStats, use_quantiles: bool, dim: int
) -> tuple[np.ndarray, np.ndarray]:
    if not use_quantiles:
        return stats.mean[..., :dim], stats.std[..., :dim] + EPSILON
    if stats.q01 is None or stats.q99 is None:
        raise UserError(
            "the norm stats have no quantiles, which Pi0.5 needs; make them again from the dataset."
        )
    return stats.q01[..., :dim], stats.q99[..., :dim] - stats.q01[..., :dim] + EPSILON


def save_norm_stats(path: Path, norm_stats: Mapping[str, NormStats]) -> None:
    """Write {"state": ..., "actions": ...} as openpi's norm_stats.json."""
    content = {
        name: {
            key: None if value is None else np.asarray(value).tolist()
            for key, value in vars(stats).items()
        }
        for name, stats in norm_stats.items()
    }
    Path(path).write_text(json.dumps({"norm_stats": content}, indent=2), encoding="utf-8")


def load_norm_stats(path: Path) -> dict[str, NormStats]:
    """Read openpi's norm_stats.json.

    Raises:
        UserError: if the file is missing or is something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))["norm_stats"]
        return {name: _parse_stats(stats) for name, stats in content.items()}
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; a checkpoint keeps it in assets/<asset id>/norm_stats.json."
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a norm_stats.json ({error!r}); make the norm stats again."
        ) from error


def _parse_stats(stats: dict) -> NormStats:
    arrays = {
        key: np.asarray(stats[key], np.float64)
        for key in ("mean", "std", "q01", "q99")
        if stats.get(key) is not None
    }
    return NormStats(**arrays)
