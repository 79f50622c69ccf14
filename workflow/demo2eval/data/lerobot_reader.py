"""Reads a LeRobot v3.0 dataset: its columns and where its images lie, without decoding one.

No torch is imported; LeRobot's own reader decodes and is made for samples, not for columns.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from demo2eval.errors import UserError

IMAGE_PREFIX = "observation.images."
FRAME_AGE = "frame_age"
"""Steps since a row's image was rendered. LeRobot takes a name with "image" in it for images."""


@dataclass(frozen=True)
class ImageFile:
    """A file with images of one camera.

    Attributes:
        path: the mp4 file, or the parquet file that holds PNG images.
        rows: [n] rows of the dataset whose images it holds, one after the other.
        frames: [n] the frame of the video, or the row of the parquet file, for each.
    """

    path: Path
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
            f"{path} says format {info.get('codebase_version')!r}; convert the dataset to LeRobot "
            "v3.0."
        )
    return info


def image_keys(info: dict) -> list[str]:
    """Return the columns that hold images, such as observation.images.base_camera."""
    return [
        name for name, feature in info["features"].items() if feature["dtype"] in ("image", "video")
    ]


def read_columns(root: Path, names: list[str]) -> dict[str, np.ndarray]:
    """Read columns of all rows, in order.

    Returns:
        {name: [rows] or, of a vector column, [rows, dim]}.

    Raises:
        UserError: if a file cannot be read or lacks a column.
    """
    files = sorted((root / "data").glob("chunk-*/file-*.parquet"))
    return _read_files(files, names, root / "data")


def _read_files(files: list[Path], names: list[str], folder: Path) -> dict[str, np.ndarray]:
    if not files:
        raise UserError(f"{folder} holds no parquet file; make the dataset again.")
    tables = []
    for file in files:
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


def to_array(column: pa.ChunkedArray) -> np.ndarray:
    """Return a column as [rows] or, of a vector column, [rows, dim]."""
    array = column.combine_chunks()
    if pa.types.is_fixed_size_list(array.type):
        values = array.flatten().to_numpy(zero_copy_only=False)
        return values.reshape(len(array), array.type.list_size)
    if pa.types.is_list(array.type):
        return np.stack(array.to_numpy(zero_copy_only=False))
    return array.to_numpy(zero_copy_only=False)


def find_image_files(root: Path, info: dict, key: str) -> list[ImageFile]:
    """Return the files that hold the images of column `key`, in the order of the rows."""
    video = info["features"][key]["dtype"] == "video"
    prefix = f"videos/{key}/" if video else "data/"
    columns = {
        "chunk_index": f"{prefix}chunk_index",
        "file_index": f"{prefix}file_index",
        "first_row": "dataset_from_index",
        "end_row": "dataset_to_index",
    }
    if video:
        columns["start"] = f"{prefix}from_timestamp"
    folder = root / "meta" / "episodes"
    files = sorted(folder.glob("chunk-*/file-*.parquet"))
    episodes = _read_files(files, list(columns.values()), folder)
    episodes = {name: episodes[column] for name, column in columns.items()}

    locations = np.stack([episodes["chunk_index"], episodes["file_index"]], axis=1)
    found = []
    for chunk_index, file_index in dict.fromkeys(map(tuple, locations.tolist())):
        members = np.flatnonzero((locations == (chunk_index, file_index)).all(axis=1))
        ranges = [
            np.arange(episodes["first_row"][episode], episodes["end_row"][episode])
            for episode in members
        ]
        rows = np.concatenate(ranges)
        frames = rows - rows[0]
        if video:
            starts = np.rint(episodes["start"][members] * info["fps"]).astype(np.int64)
            frames = np.concatenate(
                [start + np.arange(len(rows)) for start, rows in zip(starts, ranges, strict=True)]
            )
        template = info["video_path" if video else "data_path"]
        path = root / template.format(video_key=key, chunk_index=chunk_index, file_index=file_index)
        found.append(ImageFile(path, rows, frames))
    return found
