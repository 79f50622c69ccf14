"""Decodes the images of a dataset once, into arrays that training maps into memory.

In:  the manifest of a LeRobot dataset.
Out: beside the manifest, images_<camera>.npy (uint8 [samples, h, w, 3]), sample_row.npy (int64
     [samples], the row of each), and for all rows state.npy (float32 [rows, state dim]), action.npy
     (float32 [rows, action dim]) and episode.npy (int64 [rows]).

A sample is a row whose image was rendered at that very step (`frame_age` 0); rows that repeat an
older image only give actions. Images larger than the model's are resized as the model would;
smaller ones are kept, and resized while training.
"""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo2eval.cli import run
from demo2eval.data.lerobot_reader import (
    FRAME_AGE,
    IMAGE_PREFIX,
    dataset_root,
    find_image_files,
    image_keys,
    read_columns,
    read_info,
)
from demo2eval.errors import UserError
from demo2eval.pi0.image import resize_with_pad
from demo2eval.provenance import StageJob, run_stage


@dataclass(frozen=True)
class DecodeTask:
    """The samples whose images lie in one file.

    Attributes:
        key: column of the images.
        number: of the file, among those of the camera.
        path: the video, or the parquet file with PNG images.
        frames: [n] frames (or rows of the parquet file) to keep, rising.
        samples: [n] where each belongs in the camera's array.
    """

    key: str
    number: int
    path: Path
    frames: np.ndarray
    samples: np.ndarray

    @property
    def camera(self) -> str:
        """ManiSkill's name of the camera."""
        return self.key.removeprefix(IMAGE_PREFIX)


def build_image_cache(
    dataset: Path, output: Path, *, image_size: int, num_workers: int = 1
) -> None:
    """Decode the images of a dataset.

    Args:
        dataset: manifest of the dataset.
        output: manifest to write; the arrays are made beside it.
        image_size: side of the model's images, pixels; larger ones are resized to it.
        num_workers: threads; they change the time only.

    Raises:
        UserError: if the dataset is damaged.
    """
    with run_stage(
        output,
        stage="image_cache",
        module=__spec__.name,
        settings={"image_size": image_size},
        inputs={"dataset": dataset},
    ) as job:
        if job.reused:
            return
        root = dataset_root(dataset)
        info = read_info(root)
        names = ["observation.state", "action", "episode_index", FRAME_AGE]
        state, action, episode, age = read_columns(root, names).values()
        is_sample = age == 0
        sample_row = np.flatnonzero(is_sample)
        arrays = {"state": state, "action": action, "episode": episode, "sample_row": sample_row}
        for name, values in arrays.items():
            np.save(job.partial / f"{name}.npy", values)
        _decode_all(root, info, is_sample, image_size, job, num_workers)
        files = job.publish(*sorted(path.name for path in job.partial.glob("*.npy")))
        job.finish(files, samples=len(sample_row), rows=len(age), episodes=info["total_episodes"])


def _decode_all(
    root: Path, info: dict, is_sample: np.ndarray, image_size: int, job: StageJob, num_workers: int
) -> None:
    """Write images_<camera>.npy of every camera into `job.partial`."""
    from tqdm import tqdm

    cameras, num_samples = image_keys(info), int(is_sample.sum())
    total = num_samples * len(cameras)
    with (
        tqdm(total=total, unit="image", mininterval=2, desc="decoding") as bar,
        ThreadPoolExecutor(num_workers) as pool,
    ):
        futures = {}
        for key in cameras:
            height, width = info["features"][key]["shape"][:2]
            resize_to = image_size if max(height, width) > image_size else None
            shape = (num_samples, resize_to or height, resize_to or width, 3)
            array = open_array(job.partial, key.removeprefix(IMAGE_PREFIX), shape)
            for task in list_tasks(root, info, key, is_sample):
                futures[pool.submit(decode_file, task, array, job.partial, resize_to)] = task
        for future in as_completed(futures):
            future.result()
            bar.update(len(futures[future].samples))


def list_tasks(root: Path, info: dict, key: str, is_sample: np.ndarray) -> list[DecodeTask]:
    """Return the samples of one camera, file by file."""
    sample_of_row = np.cumsum(is_sample) - 1
    tasks = []
    for number, file in enumerate(find_image_files(root, info, key)):
        kept = is_sample[file.rows]
        samples = sample_of_row[file.rows[kept]]
        tasks.append(DecodeTask(key, number, file.path, file.frames[kept], samples))
    return tasks


def open_array(folder: Path, camera: str, shape: tuple[int, ...]) -> np.memmap:
    """Open a camera's array to write into; one of the same shape, left by a killed job, is kept."""
    path = folder / f"images_{camera}.npy"
    try:
        array = np.lib.format.open_memmap(path, mode="r+")
        is_kept = array.shape == shape and array.dtype == np.uint8
    except (ValueError, OSError):
        # It does not exist, or was cut off while it was made.
        is_kept = False
    if not is_kept:
        for done in folder.glob(f"{camera}-*.done"):
            done.unlink()
        array = np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)
    # A full disk is told here; in the array's memory it would end the process with SIGBUS.
    with open(path, "r+b") as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
    return array


def decode_file(task: DecodeTask, array: np.memmap, folder: Path, resize_to: int | None) -> None:
    """Decode a file into its samples of the camera's array, unless a killed job did so already."""
    done = folder / f"{task.camera}-{task.number:04d}.done"
    if done.exists():
        return
    if task.path.suffix == ".mp4":
        images = decode_video(task.path, task.frames)
    else:
        images = decode_png(task.path, task.key, task.frames)
    for sample, image in zip(task.samples, images, strict=True):
        array[sample] = image if resize_to is None else resize_with_pad(image, resize_to, resize_to)
    array.flush()
    done.touch()


def decode_video(path: Path, frames: np.ndarray) -> Iterator[np.ndarray]:
    """Yield some frames of a video, uint8 [h, w, 3], in one pass from its beginning.

    Args:
        frames: rising numbers.

    Raises:
        UserError: if the video is damaged or too short.
    """
    import av
    from av.error import FFmpegError

    numbers = iter(frames)
    number = next(numbers, None)
    try:
        with av.open(str(path)) as container:
            for index, frame in enumerate(container.decode(video=0)):
                if index == number:
                    yield frame.to_ndarray(format="rgb24")
                    number = next(numbers, None)
                    if number is None:
                        return
    except FFmpegError as error:
        raise UserError(
            f"{path} cannot be decoded ({error}); delete the dataset's manifest and make it again."
        ) from error
    raise UserError(
        f"{path} ends before frame {number}; delete the dataset's manifest and make it again."
    )


def decode_png(path: Path, key: str, frames: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the PNG images of some rows of column `key` of a parquet file, uint8 [h, w, 3]."""
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    file, start = pq.ParquetFile(path), 0
    for group in range(file.num_row_groups):
        column = file.read_row_group(group, columns=[key]).column(key)
        inside = frames[(frames >= start) & (frames < start + len(column))] - start
        for index in inside.tolist():
            png = io.BytesIO(column[index].as_py()["bytes"])
            yield np.asarray(Image.open(png).convert("RGB"))
        start += len(column)


if __name__ == "__main__":
    run(build_image_cache)
