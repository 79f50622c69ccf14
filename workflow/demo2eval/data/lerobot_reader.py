"""Reading a LeRobot v3.0 dataset's columns and the places of its videos, without decoding an image or importing torch."""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from demo2eval.errors import UserError

IMAGE_PREFIX = "observation.images."
PICTURE_AGE = "picture_age"


@dataclass(frozen=True)
class VideoRows:
    """The rows of a dataset whose pictures lie one after the other in one file.

    Attributes:
        file: the mp4 file, or the parquet file that holds PNG images.
        rows: [n] rows of the dataset.
        frames: [n] the frame of the video, or the row of the parquet file, for each.
    """

    file: Path
    rows: np.ndarray
    frames: np.ndarray


def dataset_root(manifest: Path) -> Path:
    """Return the folder of the LeRobot dataset that a dataset's manifest stands for."""
    return Path(manifest).parent / "lerobot"


def read_info(root: Path) -> dict:
    """Return meta/info.json.

    Raises:
        UserError: if it is missing or not of format v3.0.
    """
    path = root / "meta" / "info.json"
    if not path.is_file():
        raise UserError(f"{path} does not exist; {root} is not a LeRobot dataset, make it again.")
    info = json.loads(path.read_text(encoding="utf-8"))
    if info.get("codebase_version") != "v3.0":
        raise UserError(
            f"{path} says format {info.get('codebase_version')!r}; convert the dataset to LeRobot v3.0."
        )
    return info


def image_keys(info: dict) -> list[str]:
    """Return the names of the columns that hold pictures, such as observation.images.base_camera."""
    return [
        name for name, feature in info["features"].items() if feature["dtype"] in ("image", "video")
    ]


def dimension_names(info: dict, column: str) -> list[str]:
    """Return a name for each dimension of a vector column."""
    feature = info["features"][column]
    return list(feature["names"] or [f"{column}[{index}]" for index in range(feature["shape"][0])])


def data_files(root: Path) -> list[Path]:
    """Return the parquet files of the rows, in the order of their rows."""
    files = sorted((root / "data").glob("chunk-*/file-*.parquet"))
    if not files:
        raise UserError(f"{root / 'data'} holds no parquet file; make the dataset again.")
    return files


def to_array(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column as [rows] or, for a vector column, [rows, dimensions]."""
    array = column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        return (
            array.flatten().to_numpy(zero_copy_only=False).reshape(len(array), array.type.list_size)
        )
    if pa.types.is_list(array.type):
        return np.stack(array.to_numpy(zero_copy_only=False))
    return array.to_numpy(zero_copy_only=False)


def read_columns(root: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Read columns of all rows, in order.

    Raises:
        UserError: if a file cannot be read or lacks a column.
    """
    tables = []
    for file in data_files(root):
        try:
            tables.append(pq.read_table(file, columns=names))
        except (pa.ArrowInvalid, OSError) as error:
            raise UserError(
                f"{file} cannot be read ({error}); delete the dataset's manifest and make it again."
            ) from error
        if missing := set(names) - set(tables[-1].column_names):
            raise UserError(f"{file} has no column {sorted(missing)[0]!r}; make the dataset again.")
    table = pa.concat_tables(tables)
    return {name: to_array(table.column(name)) for name in names}


def check_finite(columns: dict[str, np.ndarray], episode: np.ndarray, where: str) -> None:
    """Raise a UserError that names the episode and the column of the first NaN or infinity.

    Args:
        columns: name -> [rows, dimensions].
        episode: [rows].
        where: the file or folder that the columns were read from, for the message.
    """
    for name, values in columns.items():
        bad = ~np.isfinite(values).reshape(len(values), -1).all(axis=1)
        if bad.any():
            first = int(np.argmax(bad))
            step = first - int(np.searchsorted(episode, episode[first]))
            raise UserError(
                f"{where}: column {name!r} of episode {episode[first]} holds NaN or infinity at step {step}; "
                f"leave that demonstration out and make the dataset again."
            )


def episode_table(root: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Return columns of meta/episodes, one row an episode, in order."""
    files = sorted((root / "meta" / "episodes").glob("chunk-*/file-*.parquet"))
    if not files:
        raise UserError(f"{root / 'meta/episodes'} holds no parquet file; make the dataset again.")
    table = pa.concat_tables([pq.read_table(file, columns=names) for file in files])
    return {name: to_array(table.column(name)) for name in names}


def video_rows(root: Path, info: dict, key: str) -> list[VideoRows]:
    """Return where the pictures of column `key` lie, one entry a file, in the order of the rows."""
    places = ["dataset_from_index", "dataset_to_index"]
    stored_as = "video" if info["features"][key]["dtype"] == "video" else "data"
    prefix = f"videos/{key}/" if stored_as == "video" else "data/"
    chunk, file = f"{prefix}chunk_index", f"{prefix}file_index"
    episodes = episode_table(
        root, [*places, chunk, file, *([f"{prefix}from_timestamp"] if stored_as == "video" else [])]
    )
    found: dict[tuple[int, int], list] = {}
    for index in range(len(episodes[chunk])):
        rows = np.arange(episodes["dataset_from_index"][index], episodes["dataset_to_index"][index])
        found.setdefault((int(episodes[chunk][index]), int(episodes[file][index])), []).append(
            (index, rows)
        )
    result = []
    for (chunk_index, file_index), members in found.items():
        path = root / info[f"{stored_as}_path"].format(
            video_key=key, chunk_index=chunk_index, file_index=file_index
        )
        rows = np.concatenate([rows for _, rows in members])
        if stored_as == "video":
            first = [
                round(float(episodes[f"{prefix}from_timestamp"][index]) * info["fps"])
                for index, _ in members
            ]
            frames = np.concatenate(
                [
                    start + np.arange(len(rows))
                    for start, (_, rows) in zip(first, members, strict=True)
                ]
            )
        else:
            frames = rows - rows[0]
        result.append(VideoRows(path, rows, frames))
    return result
