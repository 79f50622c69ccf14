"""Training cache: a dataset's pictures decoded once, as arrays that training maps into memory. Runs with equal data share it.

In:  the manifest of a LeRobot dataset.
Out: beside the output, images_<camera>.npy (uint8 [looks, h, w, 3]), look_row.npy (int64 [looks], the row of each picture), and for
     all rows state.npy (float32 [rows, state dim]), action.npy (float32 [rows, action dim]) and episode.npy (int64 [rows]).

A look is a row whose picture was rendered at that very step (`picture_age` 0); rows that repeat an older picture give actions only.
Pictures larger than the model's are resized as the model would; smaller ones are kept, and resized while training.
"""

import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo2eval.cli import option, run, settings_from, stage_parser
from demo2eval.data.lerobot_reader import (
    IMAGE_PREFIX,
    PICTURE_AGE,
    VideoRows,
    check_finite,
    dataset_root,
    image_keys,
    read_columns,
    read_info,
    video_rows,
)
from demo2eval.errors import UserError
from demo2eval.provenance import Work, making

VECTORS = {"state": "observation.state", "action": "action"}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the cache's content, given the dataset."""

    image_size: int = option("side of the model's pictures, pixels; larger ones are resized to it")


@dataclass(frozen=True)
class Part:
    """The looks whose pictures lie in one file.

    Attributes:
        camera: ManiSkill's name.
        number: of the file, among those of the camera.
        file: the video, or the parquet file with PNG images.
        frames: [n] frames (or rows of the parquet file) to keep, rising.
        looks: [n] where each belongs in the camera's array.
    """

    camera: str
    number: int
    file: Path
    frames: np.ndarray
    looks: np.ndarray


def decode_video(file: Path, frames: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the wanted frames of a video, uint8 [h, w, 3], in one pass from its beginning.

    Args:
        frames: rising numbers.

    Raises:
        UserError: if the video is damaged or too short.
    """
    import av

    wanted = iter(frames)
    target = next(wanted, None)
    try:
        with av.open(str(file)) as container:
            for number, frame in enumerate(container.decode(video=0)):
                if number == target:
                    yield frame.to_ndarray(format="rgb24")
                    target = next(wanted, None)
                    if target is None:
                        return
    except av.FFmpegError as error:
        raise UserError(
            f"{file} cannot be decoded ({error}); delete the dataset's manifest and make it again."
        ) from error
    raise UserError(
        f"{file} ends before frame {target}; delete the dataset's manifest and make it again."
    )


def decode_png(file: Path, key: str, frames: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the wanted rows' PNG images of column `key` of a parquet file, uint8 [h, w, 3]."""
    import io

    import pyarrow.parquet as pq
    from PIL import Image

    reader, start = pq.ParquetFile(file), 0
    for group in range(reader.num_row_groups):
        column = reader.read_row_group(group, columns=[key]).column(key)
        inside = frames[(frames >= start) & (frames < start + len(column))] - start
        for index in inside:
            yield np.asarray(
                Image.open(io.BytesIO(column[int(index)].as_py()["bytes"])).convert("RGB")
            )
        start += len(column)


def parts_of(root: Path, info: dict, key: str, is_look: np.ndarray) -> list[Part]:
    """Return the looks of one camera, file by file."""
    look_of_row = np.cumsum(is_look) - 1
    parts = []
    for number, place in enumerate(video_rows(root, info, key)):
        keep = is_look[place.rows]
        parts.append(_part(key, number, place, place.frames[keep], look_of_row[place.rows[keep]]))
    return parts


def _part(key: str, number: int, place: VideoRows, frames: np.ndarray, looks: np.ndarray) -> Part:
    return Part(key.removeprefix(IMAGE_PREFIX), number, place.file, frames, looks)


def cached_shape(info: dict, key: str, image_size: int) -> tuple[int, int]:
    """Return height and width of a camera's pictures in the cache."""
    height, width = info["features"][key]["shape"][:2]
    return (image_size, image_size) if max(height, width) > image_size else (height, width)


def fill(part: Part, array: np.ndarray, folder: Path, resized_to: int | None) -> None:
    """Decode a part into its places of the camera's array, unless a killed run did so already."""
    from demo2eval.pi0.image import resize_with_pad

    done = folder / f"{part.camera}-{part.number:04d}.done"
    if done.exists():
        return
    key = IMAGE_PREFIX + part.camera
    pictures = (
        decode_video(part.file, part.frames)
        if part.file.suffix == ".mp4"
        else decode_png(part.file, key, part.frames)
    )
    for look, picture in zip(part.looks, pictures, strict=True):
        array[look] = (
            picture if resized_to is None else resize_with_pad(picture, resized_to, resized_to)
        )
    array.flush()
    done.touch()


def open_array(folder: Path, camera: str, shape: tuple[int, ...]) -> np.memmap:
    """Open a camera's array on disk to write into; one of the same shape, left by a killed run, is kept with what is done."""
    path = folder / f"images_{camera}.npy"
    try:
        array = np.lib.format.open_memmap(path, mode="r+")
        if array.shape == shape and array.dtype == np.uint8:
            return array
    except (ValueError, OSError):
        # Not there, or cut while it was made.
        pass
    for done in folder.glob(f"{camera}-*.done"):
        done.unlink()
    return np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)


def training_cache(settings: Settings, dataset: Path, output: Path, *, workers: int = 1) -> None:
    """Make the cache of manifest `output` from the manifest of a dataset.

    Args:
        workers: threads that decode; they change the time only.

    Raises:
        UserError: if the dataset is damaged or holds NaN or infinity.
    """
    with making(
        output,
        stage="training_cache",
        module=__spec__.name,
        settings=settings,
        inputs={"dataset": dataset},
    ) as work:
        if not work.finished:
            _make(settings, Path(dataset), work, workers)


def _make(settings: Settings, dataset: Path, work: Work, workers: int) -> None:
    from tqdm import tqdm

    root = dataset_root(dataset)
    info = read_info(root)
    columns = read_columns(root, [*VECTORS.values(), PICTURE_AGE, "episode_index"])
    check_finite(
        {name: columns[name] for name in VECTORS.values()}, columns["episode_index"], str(root)
    )
    is_look = columns[PICTURE_AGE] == 0
    looks = int(is_look.sum())
    for name, column in VECTORS.items():
        np.save(work.partial / f"{name}.npy", columns[column])
    np.save(work.partial / "episode.npy", columns["episode_index"])
    np.save(work.partial / "look_row.npy", np.flatnonzero(is_look))

    started = time.monotonic()
    tasks = []
    for key in image_keys(info):
        shape = cached_shape(info, key, settings.image_size)
        array = open_array(work.partial, key.removeprefix(IMAGE_PREFIX), (looks, *shape, 3))
        resized_to = (
            settings.image_size if shape != tuple(info["features"][key]["shape"][:2]) else None
        )
        tasks += [
            (part, array, work.partial, resized_to) for part in parts_of(root, info, key, is_look)
        ]
    bar = tqdm(total=looks * len(image_keys(info)), unit="picture", mininterval=2, desc="decoding")
    with ThreadPoolExecutor(max(1, workers)) as pool, bar:
        futures = {pool.submit(fill, *task): task[0] for task in tasks}
        for future in as_completed(futures):
            future.result()
            bar.update(len(futures[future].looks))
    seconds = time.monotonic() - started
    print(
        f"decoded {looks} pictures of {len(image_keys(info))} cameras in {seconds:.1f} s",
        file=sys.stderr,
    )

    arrays = sorted(work.partial.glob("*.npy"))
    files = [path.rename(work.folder / path.name) for path in arrays]
    work.finish(files, looks=looks, rows=len(is_look), episodes=info["total_episodes"])


def main() -> None:
    """Run the stage from the command line."""
    parser = stage_parser(__doc__, Settings)
    parser.add_argument("--input", type=Path, required=True, help="manifest of the dataset")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="manifest to write; the arrays are made beside it",
    )
    parser.add_argument("--workers", type=int, default=1, help="threads (default: 1)")
    arguments = parser.parse_args()
    training_cache(
        settings_from(arguments, Settings),
        arguments.input,
        arguments.output,
        workers=arguments.workers,
    )


if __name__ == "__main__":
    run(main)
