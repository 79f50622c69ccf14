"""Action chunks: for each row of a dataset the rows of the actions from there on, held at the episode's end."""

import numpy as np

# Those that lead the state and that noise is put on; the fingers move in meters, not radians.
ARM_JOINTS = 7


def last_rows(episode: np.ndarray) -> np.ndarray:
    """Return for each row the last row of its episode.

    Args:
        episode: [rows] the episode of each row; the rows of an episode lie together.
    """
    starts = np.flatnonzero(np.diff(episode)) + 1
    ends = np.append(starts, len(episode)) - 1
    return np.repeat(ends, np.diff(np.concatenate([[0], ends + 1])))


def chunk_rows(rows: np.ndarray, last: np.ndarray, horizon: int) -> np.ndarray:
    """Return [n, horizon] rows: each row and those after it, the episode's last one repeated where the episode is over.

    So do LeRobot's `delta_timestamps`, through which openpi reads its chunks.

    Args:
        rows: [n] first row of each chunk.
        last: [all rows] what `last_rows` gives.
    """
    return np.minimum(rows[:, None] + np.arange(horizon), last[rows][:, None])
