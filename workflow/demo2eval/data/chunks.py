"""Action chunks: for each row of a dataset the rows of the actions from there on, held at the end.

LeRobot's `delta_timestamps`, through which openpi reads its chunks, does the same.
"""

import numpy as np


def last_rows(episode: np.ndarray) -> np.ndarray:
    """Return for each row the last row of its episode.

    Args:
        episode: [rows] the episode of each row; the rows of an episode lie together.
    """
    starts = np.flatnonzero(np.diff(episode)) + 1
    ends = np.append(starts, len(episode)) - 1
    return np.repeat(ends, np.diff(np.concatenate([[0], ends + 1])))


def chunk_rows(rows: np.ndarray, last: np.ndarray, horizon: int) -> np.ndarray:
    """Return each row and those after it, the episode's last one repeated at the end, [n, horizon].

    Args:
        rows: [n] first row of each chunk.
        last: [all rows] what `last_rows` returns.
    """
    return np.minimum(rows[:, None] + np.arange(horizon), last[rows][:, None])
