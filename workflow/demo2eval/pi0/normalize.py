"""Norm stats: mean, standard deviation and two quantiles of each dimension, in openpi's norm_stats.json."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo2eval.errors import UserError

EPSILON = 1e-6


@dataclass(frozen=True)
class NormStats:
    """Statistics of a state or an action, each float64 [D], or [horizon, D] if every step of a chunk has its own.

    Files without quantiles, as openpi writes them for some Pi0 checkpoints, give None for `q01` and `q99`.
    """

    mean: np.ndarray
    std: np.ndarray
    q01: np.ndarray | None = None
    q99: np.ndarray | None = None


def exact_stats(values: np.ndarray) -> NormStats:
    """Return the statistics of values [n, ...] over their first axis, in float64.

    The standard deviation is that of the population; quantiles are interpolated linearly between order statistics (numpy's default,
    definition 7 of Hyndman and Fan, 1996).
    """
    wide = np.asarray(values, dtype=np.float64)
    q01, q99 = np.quantile(wide, [0.01, 0.99], axis=0)
    return NormStats(mean=wide.mean(axis=0), std=wide.std(axis=0), q01=q01, q99=q99)


def normalize(values: np.ndarray, stats: NormStats, use_quantiles: bool) -> np.ndarray:
    """Bring values [..., D] to the model's scale.

    With quantiles (Pi0.5) q01 becomes -1 and q99 becomes 1; else (Pi0) mean 0 and standard deviation 1. Nothing is clipped.
    """
    low, scale = _affine(stats, use_quantiles, values.shape[-1])
    return (values - low) / scale * 2.0 - 1.0 if use_quantiles else (values - low) / scale


def unnormalize(values: np.ndarray, stats: NormStats, use_quantiles: bool) -> np.ndarray:
    """Undo `normalize`. Dimensions beyond those of the statistics, which are the model's padding, pass unchanged."""
    width = stats.mean.shape[-1]
    low, scale = _affine(stats, use_quantiles, min(width, values.shape[-1]))
    known = values[..., :width]
    known = (known + 1.0) / 2.0 * scale + low if use_quantiles else known * scale + low
    return np.concatenate([known, values[..., width:]], axis=-1)


def _affine(stats: NormStats, use_quantiles: bool, width: int) -> tuple[np.ndarray, np.ndarray]:
    if not use_quantiles:
        return stats.mean[..., :width], stats.std[..., :width] + EPSILON
    if stats.q01 is None or stats.q99 is None:
        raise UserError(
            "the norm stats have no quantiles, which Pi0.5 needs; make them again from the dataset."
        )
    return stats.q01[..., :width], stats.q99[..., :width] - stats.q01[..., :width] + EPSILON


def save_norm_stats(path: Path, stats: Mapping[str, NormStats]) -> None:
    """Write {"state": ..., "actions": ...} as openpi's norm_stats.json."""
    content = {
        name: {
            key: None if value is None else np.asarray(value).tolist()
            for key, value in vars(item).items()
        }
        for name, item in stats.items()
    }
    Path(path).write_text(json.dumps({"norm_stats": content}, indent=2), encoding="utf-8")


def load_norm_stats(path: Path) -> dict[str, NormStats]:
    """Read openpi's norm_stats.json.

    Raises:
        UserError: if the file is missing or is something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))["norm_stats"]
        return {
            name: NormStats(
                **{
                    key: None if item.get(key) is None else np.asarray(item[key], np.float64)
                    for key in ("mean", "std", "q01", "q99")
                }
            )
            for name, item in content.items()
        }
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; a checkpoint keeps it in assets/<asset id>/norm_stats.json."
        ) from None
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is not a norm_stats.json ({error!r}); make the norm stats again."
        ) from error
