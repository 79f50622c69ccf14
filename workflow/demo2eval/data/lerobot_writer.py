"""Writes one shard of a LeRobot v3.0 dataset: rows as parquet, images as h264 videos or PNG.

A shard is written by one process, straight from ManiSkill's HDF5 file, and its bytes depend on the
demos alone: the encoder runs with one thread, since x264's output changes with their number.
Everything but the images was validated before.
"""

import io
import json
import os
import shutil
from collections.abc import Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from demo2eval.data.lerobot_reader import FRAME_AGE, IMAGE_PREFIX
from demo2eval.data.trajectory import read_image_steps, state_path
from demo2eval.data.validate import InvalidImages, Issue, find_image_issues, read_valid_images
from demo2eval.errors import UserError
from demo2eval.maniskill.observation import state_vector

KEY_FRAME_INTERVAL = 20
"""One second: a random row is at most this many frames from a key frame. LeRobot uses 2, for files
three to five times as large."""
PRESET = "veryfast"
PNG_COMPRESSION = 2


@dataclass(frozen=True)
class Shard:
    """What one process writes.

    Attributes:
        index: number of the shard, and of its files.
        source: ManiSkill's trajectory.h5 with images.
        trajectories: names of the groups to take, in order.
        lengths: control steps of each.
        first_episode: episode index of the first of them.
        first_row: row of the dataset at which the shard begins.
    """

    index: int
    source: Path
    trajectories: tuple[str, ...]
    lengths: tuple[int, ...]
    first_episode: int
    first_row: int

    @property
    def folder_name(self) -> str:
        """Folder of the finished shard below the job's partial folder."""
        return f"shard-{self.index:03d}"


@dataclass(frozen=True)
class ShardFormat:
    """How every shard is written.

    Attributes:
        schema: LeRobot's arrow schema of the rows.
        cameras: ManiSkill's names.
        state: parts of the state vector.
        video_crf: h264 quality; None stores PNG images in the rows.
        fps: control steps per second.
    """

    schema: pa.Schema
    cameras: tuple[str, ...]
    state: tuple[str, ...]
    video_crf: int | None
    fps: int


def write_shard(shard: Shard, shard_format: ShardFormat, partial: Path) -> list[Issue]:
    """Write a shard's files into `partial`/shard-NNN, which appears by a rename when all are there.

    Files: data.parquet, histogram_<camera>.npy (int64 [demos, 3, 256]) and, for videos,
    <camera>.mp4 and psnr.json (dB by camera).

    Returns:
        what is wrong with its images, which nobody has decoded before; then nothing is left.
    """
    folder = partial / f"{shard.folder_name}.{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        _write_files(folder, shard, shard_format)
    except InvalidImages:
        shutil.rmtree(folder)
        return find_image_issues(shard.source, shard.trajectories)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        # PyAV's own kind of error does not travel between processes.
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from None
    folder.rename(partial / shard.folder_name)
    return []


def _write_files(folder: Path, shard: Shard, shard_format: ShardFormat) -> None:
    histograms = write_rows(folder / "data.parquet", shard, shard_format)
    if shard_format.video_crf is not None:
        psnr = {}
        for camera in shard_format.cameras:
            path = folder / f"{camera}.mp4"
            histograms[camera] = write_video(path, shard, camera, shard_format)
            psnr[camera] = measure_psnr(path, shard, camera, shard_format)
        (folder / "psnr.json").write_text(json.dumps(psnr))
    for camera, counts in histograms.items():
        np.save(folder / f"histogram_{camera}.npy", counts)


def read_groups(
    shard: Shard, shard_format: ShardFormat
) -> Generator[tuple[int, Any, np.ndarray, np.ndarray]]:
    """Yield (number in the shard, HDF5 group, image of each row, its age in steps) per demo.

    Raises:
        UserError: if the file cannot be read.
    """
    import h5py

    try:
        with h5py.File(shard.source, "r") as file:
            demos = zip(shard.trajectories, shard.lengths, strict=True)
            for number, (name, length) in enumerate(demos):
                group = file[name]
                yield number, group, *image_of_row(group, shard_format.cameras[0], length)
    except OSError as error:
        raise UserError(
            f"{shard.source} cannot be read ({error}); delete its manifest and replay it again."
        ) from error


def image_of_row(group, camera: str, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row the index of the newest image, and how many steps old it is.

    Returns:
        (index, age): int64 [length] each.
    """
    steps = read_image_steps(group, camera)
    index = np.searchsorted(steps, np.arange(length), side="right") - 1
    return index, np.arange(length) - steps[index]


def read_shown_images(group, camera: str, index: np.ndarray) -> np.ndarray:
    """Return the images that the rows show, uint8 [index[-1] + 1, h, w, 3].

    Raises:
        InvalidImages: if any of the demo's is damaged or shows nothing.
    """
    return read_valid_images(group, camera)[: index[-1] + 1]


def read_state(group, parts: tuple[str, ...], length: int) -> np.ndarray:
    """Return the state vector before each action, float32 [length, state dim]."""
    return state_vector(parts, {part: group[state_path(part)][:length] for part in parts})


def count_values(images: np.ndarray) -> np.ndarray:
    """Return how often each channel of images uint8 [n, h, w, 3] has each value, int64 [3, 256]."""
    channels = [images[..., channel].ravel() for channel in range(3)]
    return np.stack([np.bincount(values, minlength=256) for values in channels])


# Rows.


def write_rows(path: Path, shard: Shard, shard_format: ShardFormat) -> dict[str, np.ndarray]:
    """Write the parquet file of a shard, a row group per demo; return histograms of PNG images."""
    schema, cameras = shard_format.schema, shard_format.cameras
    png = shard_format.video_crf is None
    histograms: dict[str, list] = {camera: [] for camera in cameras} if png else {}
    row = shard.first_row
    with pq.ParquetWriter(path, schema, compression="snappy", use_dictionary=True) as writer:
        for number, group, index, age in read_groups(shard, shard_format):
            length = len(index)
            frame = np.arange(length)
            columns = {
                "action": to_column(group["actions"][()]),
                "observation.state": to_column(read_state(group, shard_format.state, length)),
                FRAME_AGE: pa.array(age),
                "timestamp": pa.array((frame / shard_format.fps).astype(np.float32)),
                "frame_index": pa.array(frame),
                "episode_index": pa.array(np.full(length, shard.first_episode + number)),
                "index": pa.array(row + frame),
                "task_index": pa.array(np.zeros(length, np.int64)),
            }
            for camera in histograms:
                images = read_shown_images(group, camera, index)
                histograms[camera].append(count_values(images))
                encoded = [{"bytes": encode_png(image), "path": None} for image in images]
                key = IMAGE_PREFIX + camera
                columns[key] = pa.array([encoded[i] for i in index], schema.field(key).type)
            writer.write_table(pa.table([columns[name] for name in schema.names], schema=schema))
            row += length
    return {camera: np.stack(counts) for camera, counts in histograms.items()}


def to_column(values: np.ndarray) -> pa.FixedSizeListArray:
    """Return [n, dim] as an arrow column of lists of length dim."""
    flat = pa.array(np.ascontiguousarray(values).ravel())
    return pa.FixedSizeListArray.from_arrays(flat, values.shape[1])


def encode_png(image: np.ndarray) -> bytes:
    """Return an image, uint8 [h, w, 3], as the bytes of a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(image).save(buffer, "PNG", compress_level=PNG_COMPRESSION)
    return buffer.getvalue()


# Videos.


def write_video(path: Path, shard: Shard, camera: str, shard_format: ShardFormat) -> np.ndarray:
    """Encode a camera's images of all rows; return their histograms, int64 [demos, 3, 256].

    An image that stays for several rows is converted once and counted once.
    """
    import av

    options = {
        "crf": str(shard_format.video_crf),
        "preset": PRESET,
        "g": str(KEY_FRAME_INTERVAL),
        "bf": "0",
    }
    histograms, row = [], 0
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=shard_format.fps, options=options)
        stream.pix_fmt = "yuv444p"
        stream.codec_context.thread_count = 1
        for _, group, index, _ in read_groups(shard, shard_format):
            images = read_shown_images(group, camera, index)
            histograms.append(count_values(images))
            if row == 0:
                stream.height, stream.width = images.shape[1:3]
            for image, repeats in zip(images, np.bincount(index), strict=True):
                frame = av.VideoFrame.from_ndarray(image, format="rgb24")
                frame = frame.reformat(format="yuv444p")
                for _ in range(repeats):
                    frame.pts = row
                    row += 1
                    container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return np.stack(histograms)


def measure_psnr(path: Path, shard: Shard, camera: str, shard_format: ShardFormat) -> float:
    """Return the peak signal-to-noise ratio, dB, of a shard's first demo in its video."""
    import av

    with closing(read_groups(shard, shard_format)) as groups:
        _, group, index, age = next(groups)
        images = read_shown_images(group, camera, index)
    errors = []
    with av.open(str(path)) as container:
        for row, frame in zip(range(len(index)), container.decode(video=0), strict=False):
            if age[row] == 0:
                decoded = frame.to_ndarray(format="rgb24").astype(np.float32)
                errors.append(np.mean((decoded - images[index[row]]) ** 2))
    return float(10 * np.log10(255**2 / max(np.mean(errors), 1e-9)))
