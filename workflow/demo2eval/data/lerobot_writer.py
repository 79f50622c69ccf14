"""Writing one shard of a LeRobot v3.0 dataset: the rows as parquet, the pictures as one h264 video a camera or as PNG in the rows.

A shard is written by one process, straight from ManiSkill's HDF5 file, and its bytes depend on the demonstrations alone: the encoder
runs with one thread, since x264's output changes with their number. Everything but the pictures was checked before.
"""

import io
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from demo2eval.data.lerobot_reader import IMAGE_PREFIX, PICTURE_AGE
from demo2eval.data.replayed import UnfitPictures, picture_findings, read_pictures
from demo2eval.data.trajectory import Finding
from demo2eval.errors import UserError
from demo2eval.maniskill.observation import state_vector

# One second: a row at random is at most this many frames from a key frame. LeRobot uses 2, for files three to five times as large.
KEY_FRAME_INTERVAL = 20
PRESET = "veryfast"
PNG_COMPRESSION = 2


@dataclass(frozen=True)
class Shard:
    """What one process writes.

    Attributes:
        index: number of the shard, and of its files.
        source: ManiSkill's trajectory.h5 with pictures.
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
        """Folder of the finished shard below the work's partial folder."""
        return f"shard-{self.index:03d}"


@dataclass(frozen=True)
class Format:
    """How every shard is written.

    Attributes:
        schema: LeRobot's arrow schema of the rows.
        cameras: ManiSkill's names.
        state: parts of the state vector.
        video_crf: h264 quality; None stores PNG images in the rows.
        fps: control steps a second.
    """

    schema: pa.Schema
    cameras: tuple[str, ...]
    state: tuple[str, ...]
    video_crf: int | None
    fps: int


def read_state(group, parts: tuple[str, ...], length: int) -> np.ndarray:
    """Return the state vector before each action, float32 [length, state dim]; the observation after the last is dropped."""
    places = {
        part: f"obs/agent/{part}" if f"obs/agent/{part}" in group else f"obs/extra/{part}"
        for part in parts
    }
    return state_vector(parts, {part: group[place][:length] for part, place in places.items()})


def picture_of_row(group, cameras: tuple[str, ...], length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return for each row the index of the newest picture, and how many steps old it is.

    Returns:
        (index, age): int64 [length] each.
    """
    steps = group[f"obs/sensor_data/{cameras[0]}/step"][()]
    index = np.searchsorted(steps, np.arange(length), side="right") - 1
    return index, np.arange(length) - steps[index]


def pictures_of_rows(group, camera: str, index: np.ndarray) -> np.ndarray:
    """Return the pictures that the rows look at, uint8 [index[-1] + 1, h, w, 3].

    Raises:
        UnfitPictures: if any of the demonstration's is damaged or shows nothing.
    """
    return read_pictures(group, camera)[: index[-1] + 1]


def histogram(pictures: np.ndarray) -> np.ndarray:
    """Return how often each channel has each value, int64 [3, 256], of pictures uint8 [n, h, w, 3]."""
    return np.stack(
        [np.bincount(pictures[..., channel].ravel(), minlength=256) for channel in range(3)]
    )


def demonstrations(
    shard: Shard, wanted: Format
) -> Iterator[tuple[int, object, np.ndarray, np.ndarray]]:
    """Yield (number in the shard, HDF5 group, index of each row's picture, its age) of a shard's demonstrations.

    Raises:
        UserError: if the file cannot be read.
    """
    import h5py

    try:
        with h5py.File(shard.source, "r") as file:
            for number, (name, length) in enumerate(
                zip(shard.trajectories, shard.lengths, strict=True)
            ):
                group = file[name]
                index, age = picture_of_row(group, wanted.cameras, length)
                yield number, group, index, age
    except OSError as error:
        raise UserError(
            f"{shard.source} cannot be read ({error}); delete its manifest and replay it again."
        ) from error


def write_video(path: Path, shard: Shard, camera: str, wanted: Format) -> np.ndarray:
    """Encode a camera's pictures of all rows, and return their histograms, int64 [demonstrations, 3, 256].

    A picture that stays for several rows is converted once and counted once.
    """
    import av

    histograms, row = [], 0
    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        options = {
            "crf": str(wanted.video_crf),
            "preset": PRESET,
            "g": str(KEY_FRAME_INTERVAL),
            "bf": "0",
        }
        stream = None
        for _, group, index, _ in demonstrations(shard, wanted):
            pictures = pictures_of_rows(group, camera, index)
            histograms.append(histogram(pictures))
            if stream is None:
                stream = container.add_stream("libx264", rate=wanted.fps, options=options)
                stream.height, stream.width = pictures.shape[1:3]
                stream.pix_fmt = "yuv444p"
                stream.codec_context.thread_count = 1
            shown = -1
            for picture in index:
                if picture != shown:
                    frame = av.VideoFrame.from_ndarray(pictures[picture], format="rgb24").reformat(
                        format="yuv444p"
                    )
                    shown = picture
                frame.pts = row
                row += 1
                container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return np.stack(histograms)


def encode_png(picture: np.ndarray) -> bytes:
    """Return a picture, uint8 [h, w, 3], as the bytes of a PNG file."""
    from PIL import Image

    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG", compress_level=PNG_COMPRESSION)
    return buffer.getvalue()


def vectors(values: np.ndarray) -> pa.FixedSizeListArray:
    """Return [n, d] as an arrow column of lists of length d."""
    return pa.FixedSizeListArray.from_arrays(
        pa.array(np.ascontiguousarray(values).ravel()), values.shape[1]
    )


def write_rows(path: Path, shard: Shard, wanted: Format) -> dict[str, np.ndarray]:
    """Write the parquet file of a shard, a row group for each demonstration; return the histograms of PNG pictures by camera."""
    histograms: dict[str, list] = {camera: [] for camera in wanted.cameras}
    row = shard.first_row
    with pq.ParquetWriter(path, wanted.schema, compression="snappy", use_dictionary=True) as writer:
        for number, group, index, age in demonstrations(shard, wanted):
            length = len(index)
            columns = {
                "action": group["actions"][()],
                "observation.state": read_state(group, wanted.state, length),
            }
            frame = np.arange(length)
            arrays = {name: vectors(values) for name, values in columns.items()} | {
                PICTURE_AGE: pa.array(age),
                "timestamp": pa.array((frame / wanted.fps).astype(np.float32)),
                "frame_index": pa.array(frame),
                "episode_index": pa.array(np.full(length, shard.first_episode + number)),
                "index": pa.array(row + frame),
                "task_index": pa.array(np.zeros(length, np.int64)),
            }
            if wanted.video_crf is None:
                for camera in wanted.cameras:
                    pictures = pictures_of_rows(group, camera, index)
                    histograms[camera].append(histogram(pictures))
                    encoded = [encode_png(picture) for picture in pictures]
                    arrays[IMAGE_PREFIX + camera] = pa.array(
                        [{"bytes": encoded[one], "path": None} for one in index],
                        wanted.schema.field(IMAGE_PREFIX + camera).type,
                    )
            writer.write_table(
                pa.table([arrays[name] for name in wanted.schema.names], schema=wanted.schema)
            )
            row += length
    return {camera: np.stack(items) for camera, items in histograms.items() if items}


def video_psnr(path: Path, shard: Shard, camera: str, wanted: Format) -> float:
    """Return the peak signal-to-noise ratio, dB, that the encoder left of the pictures of a shard's first demonstration."""
    import av

    with closing(demonstrations(shard, wanted)) as items:
        _, group, index, age = next(items)
        pictures = pictures_of_rows(group, camera, index)
    errors = []
    with av.open(str(path)) as container:
        for row, frame in zip(range(len(index)), container.decode(video=0), strict=False):
            if age[row] == 0:
                difference = (
                    frame.to_ndarray(format="rgb24").astype(np.float32) - pictures[index[row]]
                )
                errors.append(np.mean(difference**2))
    return float(10 * np.log10(255**2 / max(np.mean(errors), 1e-9)))


def write_shard(shard: Shard, wanted: Format, partial: Path) -> list[Finding]:
    """Write a shard's files into `partial`/shard-NNN, at once by a rename; a finished one is left as it is.

    Files: data.parquet, histogram_<camera>.npy and, for videos, <camera>.mp4 and psnr.json (dB by camera).

    Returns:
        what is wrong with its pictures, which are decoded here and nowhere else; if anything is, nothing is left of the shard.
    """
    finished = partial / shard.folder_name
    if finished.is_dir():
        return []
    folder = partial / f"{shard.folder_name}.{os.getpid()}"
    shutil.rmtree(folder, ignore_errors=True)
    try:
        folder.mkdir()
        write_files(folder, shard, wanted)
    except UnfitPictures:
        shutil.rmtree(folder)
        return picture_findings(shard.source, shard.trajectories, wanted.cameras)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        # PyAV's own kind of error does not travel between processes.
        raise OSError(error.errno, error.strerror or str(error), str(folder)) from None
    folder.rename(finished)
    return []


def write_files(folder: Path, shard: Shard, wanted: Format) -> None:
    """Write a shard's files into an empty folder; see `write_shard`."""
    histograms = write_rows(folder / "data.parquet", shard, wanted)
    if wanted.video_crf is not None:
        histograms = {
            camera: write_video(folder / f"{camera}.mp4", shard, camera, wanted)
            for camera in wanted.cameras
        }
        psnr = {
            camera: video_psnr(folder / f"{camera}.mp4", shard, camera, wanted)
            for camera in wanted.cameras
        }
        (folder / "psnr.json").write_text(json.dumps(psnr))
    for camera, values in histograms.items():
        np.save(folder / f"histogram_{camera}.npy", values)


def histogram_stats(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return LeRobot's image statistics, [3, 1, 1] each in units of full brightness, of histograms [3, 256]; all are exact."""
    values = np.arange(256) / 255
    total = counts.sum(axis=1)
    mean = counts @ values / total
    cumulative = np.cumsum(counts, axis=1)
    stats = {
        "min": values[np.argmax(counts > 0, axis=1)],
        "max": values[255 - np.argmax(counts[:, ::-1] > 0, axis=1)],
        "mean": mean,
        "std": np.sqrt((counts * (values - mean[:, None]) ** 2).sum(axis=1) / total),
    }
    for percent in (1, 10, 50, 90, 99):
        stats[f"q{percent:02d}"] = values[
            np.argmax(cumulative >= percent / 100 * total[:, None], axis=1)
        ]
    return {name: value.reshape(3, 1, 1) for name, value in stats.items()}
