"""Dataset, norm stats and loader, each beside LeRobot's or openpi's own way, on one replayed shard.

    python benchmarks/data.py results/replays/<name>/shard-000/manifest.json

Best on a replay of every step (`image_stride: 1`), so that every row has an image of its own; with
other replays the comparison of reading is left out. Everything is made anew in a temporary folder.
Twenty demos of StackCube take about ten minutes on two cores.

conversion  One process of each makes the same dataset from the same demos: `demo2eval.data.dataset`
            with one worker, and `LeRobotDataset.create`, `add_frame`, `save_episode` with one
            encoder thread. Images are stored as PNG by both, then as video by both (h264, 4:4:4,
            the same crf, preset, key frames and no B-frames). By default LeRobot writes the images
            of a video as PNG files first, which is what is compared; its streaming encoder, whose
            threads run beside, is in the table as well.
norm stats  `demo2eval.data.norm_stats` reads columns. openpi iterates over the dataset, images and
            all, and keeps running moments and histograms of 5000 bins; written here from its
            description, `LeRobotDataset` behind a DataLoader of two workers.
reading     Batches of 256 samples, chunks of 20 actions: `BatchLoader` on one thread, from
            `demo2eval.data.image_cache`, and `LeRobotDataset` behind a DataLoader of two workers,
            shuffled. Ours gives normalized, padded batches with tokens, LeRobot's only images,
            state and actions.

Times are medians; CPU time is user and system time of the process and of its children.
"""

import argparse
import contextlib
import logging
import os
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from demo2eval.config import Actions, Dataset
from demo2eval.data.chunks import chunk_rows, last_rows
from demo2eval.data.dataset import build_dataset, make_features, make_format, select_demos
from demo2eval.data.image_cache import build_image_cache, decode_png, decode_video
from demo2eval.data.lerobot_reader import (
    FRAME_AGE,
    IMAGE_PREFIX,
    dataset_root,
    find_image_files,
    image_keys,
    read_columns,
    read_info,
)
from demo2eval.data.lerobot_writer import KEY_FRAME_INTERVAL, PRESET, image_of_row, read_state
from demo2eval.data.norm_stats import compute_norm_stats
from demo2eval.data.validate import validate_replays
from demo2eval.pi0.normalize import load_norm_stats
from demo2eval.provenance import read_manifest

HORIZON, BATCH, WORKERS, BINS = 20, 256, 2, 5000
OPENPI_BATCH = 32
QUANTILES = (0.01, 0.99)
MASK = [True] * 7 + [False]
"""Per action dimension, whether it is a difference from the state: the joints, not the gripper."""
REPO = "demo2eval/benchmark"
MODEL_CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
PARTS = ("conversion", "norm_stats", "reading")


@dataclass(frozen=True)
class Time:
    """Seconds that something took by the clock, and of the processors."""

    wall: float
    cpu: float


def measure_time(
    function: Callable[[], Any], repeats: int, prepare: Callable[[], Any] = lambda: None
) -> Time:
    """Return the median time of a call; `prepare` is called before each and does not count."""
    times = []
    for _ in range(repeats):
        prepare()
        started, cpu = time.perf_counter(), sum(os.times()[:4])
        function()
        times.append(Time(time.perf_counter() - started, sum(os.times()[:4]) - cpu))
    return Time(
        statistics.median(item.wall for item in times),
        statistics.median(item.cpu for item in times),
    )


def print_time(name: str, count: int, unit: str, time: Time, note: str = "") -> None:
    """Print one line of a table."""
    rate, cpu_rate = count / time.wall, count / max(time.cpu, 1e-9)
    times = f"{time.wall:8.3f} s  {time.cpu:8.3f} CPU s"
    rates = f"{rate:10.1f} {unit}/s  {cpu_rate:10.1f} {unit}/CPU s"
    print(f"  {name:34s} {times}  {rates}  {note}", flush=True)


def print_ratio(what: str, theirs: float, ours: float, goal: float) -> None:
    """Print how many times faster ours is, and the goal."""
    print(f"  {what}: {theirs / ours:.1f} times (goal {goal:g})", flush=True)


def size_mb(folder: Path) -> str:
    """Return the size of all files below a folder, as text."""
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    return f"{size / 1e6:.2f} MB"


# Conversion.


@dataclass(frozen=True)
class Conversion:
    """What is converted: a replayed shard, and how it is stored."""

    replay: Path
    prompt: str
    dataset: Dataset
    num_demos: int | None = None

    def build(self, output: Path) -> None:
        """Make the dataset with demo2eval."""
        build_dataset(
            [self.replay],
            output,
            prompt=self.prompt,
            num_demos=self.num_demos,
            dataset=self.dataset,
        )


def lerobot_convert(conversion: Conversion, root: Path, streaming: bool = False) -> None:
    """Make the same dataset with LeRobot's own writer, with one encoder thread per camera."""
    import h5py
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    state = conversion.dataset.state
    path = conversion.replay.with_name("trajectory.h5")
    files = validate_replays([path], state, decode_images=False)
    source = select_demos(files, conversion.num_demos, state)
    features = make_features(conversion.dataset, source)
    shard_format = make_format(conversion.dataset, source, features)
    (shard,) = source.shards
    options = {}
    if shard_format.video_crf is not None:
        options = _encoder_options(shard_format.video_crf, streaming, sum(shard.lengths))
    made = LeRobotDataset.create(
        REPO,
        shard_format.fps,
        features,
        root=root,
        robot_type="panda",
        use_videos=shard_format.video_crf is not None,
        **options,
    )
    with h5py.File(shard.source) as file:
        for name, length in zip(shard.trajectories, shard.lengths, strict=True):
            group: Any = file[name]
            actions, states = group["actions"][()], read_state(group, shard_format.state, length)
            index, age = image_of_row(group, shard_format.cameras[0], length)
            images = {
                camera: group[f"obs/sensor_data/{camera}/rgb"][()]
                for camera in shard_format.cameras
            }
            for row in range(length):
                frame = {"action": actions[row], "observation.state": states[row]}
                frame |= {FRAME_AGE: age[row : row + 1], "task": conversion.prompt}
                for camera, values in images.items():
                    frame[IMAGE_PREFIX + camera] = values[index[row]]
                made.add_frame(frame)
            made.save_episode(parallel_encoding=False)
    made.finalize()


def _encoder_options(crf: int, streaming: bool, queue_size: int) -> dict[str, Any]:
    """Return arguments of `LeRobotDataset.create` for the video that demo2eval writes."""
    from lerobot.configs.video import RGBEncoderConfig

    encoder = RGBEncoderConfig(
        vcodec="h264",
        pix_fmt="yuv444p",
        g=KEY_FRAME_INTERVAL,
        crf=crf,
        preset=PRESET,
        extra_options={"bf": "0"},
    )
    # LeRobot's streaming encoder drops images that find the queue full.
    return {
        "rgb_encoder": encoder,
        "encoder_threads": 1,
        "streaming_encoding": streaming,
        "encoder_queue_maxsize": queue_size,
    }


def columns_equal(ours: Path, theirs: Path) -> bool:
    """Tell whether two datasets have the same numbers in all columns, bit for bit."""
    info = read_info(ours)
    names = [name for name in info["features"] if name not in image_keys(info)]
    columns = [read_columns(root, names) for root in (ours, theirs)]
    return all(
        columns[0][name].dtype == columns[1][name].dtype
        and np.array_equal(columns[0][name], columns[1][name])
        for name in names
    )


def decode_images(root: Path, key: str) -> Iterator[np.ndarray]:
    """Yield a camera's images of all rows, uint8 [h, w, 3]."""
    for file in find_image_files(root, read_info(root), key):
        if file.path.suffix == ".mp4":
            yield from decode_video(file.path, file.frames)
        else:
            yield from decode_png(file.path, key, file.frames)


def image_differences(ours: Path, theirs: Path) -> tuple[int, float]:
    """Return (largest, mean) absolute difference of the decoded images of two datasets, of 255."""
    largest, means = 0, []
    for key in image_keys(read_info(ours)):
        pairs = zip(decode_images(ours, key), decode_images(theirs, key), strict=True)
        for our_image, their_image in pairs:
            difference = np.abs(our_image.astype(np.int16) - their_image)
            largest = max(largest, int(difference.max()))
            means.append(difference.mean())
    return largest, float(np.mean(means))


def measure_psnr(root: Path, exact: Path) -> float:
    """Return the PSNR of a dataset's images, dB, given the same dataset with exact ones."""
    errors = [
        np.mean((image.astype(np.float64) - exact_image) ** 2)
        for key in image_keys(read_info(root))
        for image, exact_image in zip(
            decode_images(root, key), decode_images(exact, key), strict=True
        )
    ]
    return 10 * np.log10(255**2 / np.mean(errors))


def compare_conversion(conversion: Conversion, folder: Path, repeats: int) -> None:
    """Print the times of both conversions, and how far the two datasets are equal."""
    storage = conversion.dataset.image_storage
    ours, theirs = folder / storage / "ours", folder / storage / "theirs"
    output = ours / "manifest.json"

    def measure(function: Callable[[], Any], target: Path, repeats: int) -> Time:
        return measure_time(function, repeats, lambda: shutil.rmtree(target, ignore_errors=True))

    fast = measure(lambda: conversion.build(output), ours, repeats)
    frames = read_manifest(output)["metadata"]["frames"]
    print_time(f"demo2eval, {storage}", frames, "frames", fast, size_mb(ours / "lerobot"))
    default = measure(lambda: lerobot_convert(conversion, theirs), theirs, repeats)
    name = "LeRobot, video by way of PNG" if storage == "video" else "LeRobot, png"
    print_time(name, frames, "frames", default, size_mb(theirs))
    if storage == "video":
        streamed = folder / storage / "streamed"
        slow = measure(lambda: lerobot_convert(conversion, streamed, streaming=True), streamed, 1)
        name = "LeRobot, video streamed (threads)"
        print_time(name, frames, "frames", slow, size_mb(streamed))
        print_ratio("video, against streaming, by the clock", slow.wall, fast.wall, 4)
        print_ratio("video, against streaming, by CPU time", slow.cpu, fast.cpu, 4)
    print_ratio(f"{storage}, by the clock", default.wall, fast.wall, 4)
    print_ratio(f"{storage}, by CPU time", default.cpu, fast.cpu, 4)
    largest, mean = image_differences(ours / "lerobot", theirs)
    print(f"  columns equal bit for bit: {columns_equal(ours / 'lerobot', theirs)}")
    print(f"  images differ by at most {largest}, by {mean:.3f} on average, of 255", flush=True)
    if storage == "video":
        exact = folder / "png" / "ours" / "lerobot"
        psnr = [measure_psnr(root, exact) for root in (ours / "lerobot", theirs)]
        print(f"  PSNR {psnr[0]:.2f} dB, LeRobot's {psnr[1]:.2f} dB", flush=True)


# Norm stats.


class RunningStats:
    """Running moments and histograms of vectors, as openpi keeps them.

    The bins span what was seen, and are filled anew when that grows.
    """

    def __init__(self) -> None:
        """Begin with nothing seen."""
        self.count = 0

    def update(self, values: np.ndarray) -> None:
        """Take in values [..., dim], in their own precision: openpi's are float32."""
        values = values.reshape(-1, values.shape[-1])
        low, high = values.min(axis=0), values.max(axis=0)
        if self.count == 0:
            self.low, self.high = low, high
            self.mean, self.mean_of_squares = np.zeros((2, values.shape[1]))
            self.edges = [
                np.linspace(a - 1e-10, b + 1e-10, BINS + 1) for a, b in zip(low, high, strict=True)
            ]
            self.counts = np.zeros((values.shape[1], BINS))
        elif (low < self.low).any() or (high > self.high).any():
            self.low, self.high = np.minimum(low, self.low), np.maximum(high, self.high)
            self._widen_bins()
        self.count += len(values)
        self.mean += (values.mean(axis=0) - self.mean) * len(values) / self.count
        change = (values**2).mean(axis=0) - self.mean_of_squares
        self.mean_of_squares += change * len(values) / self.count
        for dim, edges in enumerate(self.edges):
            self.counts[dim] += np.histogram(values[:, dim], bins=edges)[0]

    def _widen_bins(self) -> None:
        for dim, edges in enumerate(self.edges):
            wider = np.linspace(self.low[dim], self.high[dim], BINS + 1)
            self.counts[dim] = np.histogram(edges[:-1], bins=wider, weights=self.counts[dim])[0]
            self.edges[dim] = wider

    def quantile(self, quantile: float) -> np.ndarray:
        """Return the edge of the bin in which the quantile of each dimension lies."""
        bins = [np.searchsorted(np.cumsum(counts), quantile * self.count) for counts in self.counts]
        return np.array([edges[index] for edges, index in zip(self.edges, bins, strict=True)])

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of each dimension."""
        return np.sqrt(np.maximum(0, self.mean_of_squares - self.mean**2))

    @property
    def bin_width(self) -> np.ndarray:
        """Width of each dimension's bins."""
        return np.array([edges[1] - edges[0] for edges in self.edges])


def open_lerobot(root: Path, fps: int):
    """Open a dataset with LeRobot's reader, with its default decoder, giving chunks of actions."""
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    times = {"action": [step / fps for step in range(HORIZON)]}
    return LeRobotDataset(REPO, root=root, delta_timestamps=times)


def subtract_state(actions: np.ndarray, state: np.ndarray, mask: list[bool]) -> np.ndarray:
    """Return chunks [n, horizon, A] less the state [n, S] in the masked dimensions, float32."""
    result = actions.copy()
    result[..., : len(mask)] -= np.where(mask, state[:, : len(mask)], 0)[:, None]
    return result


def openpi_stats(
    root: Path,
    fps: int,
    mask: list[bool],
    *,
    workers: int = WORKERS,
    batch_size: int = OPENPI_BATCH,
) -> dict[str, RunningStats]:
    """Iterate over a dataset as openpi does for its norm stats, decoding every image."""
    from torch.utils.data import DataLoader

    running = {"state": RunningStats(), "actions": RunningStats()}
    dataset: Any = open_lerobot(root, fps)
    for batch in DataLoader(dataset, batch_size=batch_size, num_workers=workers):
        state, actions = batch["observation.state"].numpy(), batch["action"].numpy()
        running["state"].update(state)
        running["actions"].update(subtract_state(actions, state, mask))
    return running


def sorted_values(root: Path, mask: list[bool]) -> dict[str, np.ndarray]:
    """Return all values that the stats are of, float64 [n, dim], each dimension sorted."""
    names = ["action", "observation.state", "episode_index"]
    action, state, episode = read_columns(root, names).values()
    rows = chunk_rows(np.arange(len(action)), last_rows(episode), HORIZON)
    chunks = subtract_state(action[rows], state, mask).reshape(-1, action.shape[1])
    return {
        name: np.sort(values.astype(np.float64), axis=0)
        for name, values in (("state", state), ("actions", chunks))
    }


def exact_stats(root: Path, mask: list[bool]) -> dict[str, dict[str, np.ndarray]]:
    """Return the stats of all values, sorted and summed up in double precision."""
    result = {}
    for name, values in sorted_values(root, mask).items():
        mean = values.sum(axis=0) / len(values)
        stats = {"mean": mean, "std": np.sqrt(((values - mean) ** 2).sum(axis=0) / len(values))}
        for quantile in QUANTILES:
            position = quantile * (len(values) - 1)
            index, fraction = int(position), position - int(position)
            lower, upper = values[index], values[min(index + 1, len(values) - 1)]
            stats[f"q{round(quantile * 100):02d}"] = lower + fraction * (upper - lower)
        result[name] = stats
    return result


def bins_off(running: RunningStats, values: np.ndarray, quantile: float) -> np.ndarray:
    """Return by how many bins a histogram's quantile of each dimension misses where it must be.

    That is between the two of the sorted `values` [n, dim] among which the quantile lies: which
    number between them is a matter of definition.
    """
    index, edge = int(quantile * (len(values) - 1)), running.quantile(quantile)
    lower, upper = values[index], values[min(index + 1, len(values) - 1)]
    missed = np.maximum(0, np.maximum(lower - edge, edge - upper))
    # The bins of a value that never changes have no width in float32.
    return np.divide(
        missed,
        running.bin_width,
        out=np.where(missed > 0, np.inf, 0.0),
        where=running.bin_width > 0,
    )


def compare_norm_stats(manifest: Path, folder: Path, repeats: int) -> None:
    """Print the times of both norm stats of a dataset, and how far they are from exact ones."""
    root, output = dataset_root(manifest), folder / "norm_stats" / "manifest.json"
    fps, rows = read_info(root)["fps"], read_manifest(manifest)["metadata"]["frames"]

    def compute() -> None:
        compute_norm_stats(manifest, output, actions=Actions(action_horizon=HORIZON))

    def forget() -> None:
        shutil.rmtree(output.parent, ignore_errors=True)

    # The first call imports JAX.
    measure_time(compute, 1, forget)
    fast = measure_time(compute, max(repeats, 3), forget)
    print_time("demo2eval", rows, "rows", fast)
    running = {}
    slow = measure_time(lambda: running.update(openpi_stats(root, fps, MASK)), 1)
    print_time(f"openpi's way, {WORKERS} workers", rows, "rows", slow)
    print_ratio("norm stats, by the clock", slow.wall, fast.wall, 100)
    print_ratio("norm stats, by CPU time", slow.cpu, fast.cpu, 100)
    stats, exact = load_norm_stats(output.parent / "norm_stats.json"), exact_stats(root, MASK)
    error = max(
        np.abs(getattr(stats[name], key) - value).max()
        for name in exact
        for key, value in exact[name].items()
    )
    print(f"  ours differ from exact ones by at most {error:.1e}")
    values = sorted_values(root, MASK)
    for quantile in QUANTILES:
        worst = max(bins_off(running[name], values[name], quantile).max() for name in values)
        name = f"q{round(quantile * 100):02d}"
        print(f"  the histograms' {name} are off by at most {worst:.2f} bins", flush=True)
    moments = max(
        np.abs(getattr(running[name], key) - exact[name][key]).max()
        for name in exact
        for key in ("mean", "std")
    )
    print(f"  the running mean and std differ from exact ones by at most {moments:.1e}", flush=True)


# Reading.


def open_cache(manifest: Path, folder: Path, image_size: int):
    """Return a `BatchLoader` of a new cache of a dataset, with its norm stats in `folder`."""
    from demo2eval.data.loader import BatchLoader, PromptTokenizer
    from demo2eval.pi0.tokenizer import Tokenizer

    cache = folder / f"cache-{image_size}" / "manifest.json"
    stats = folder / "norm_stats" / "manifest.json"
    if not stats.exists():
        compute_norm_stats(manifest, stats, actions=Actions(action_horizon=HORIZON))
    build_image_cache(manifest, cache, image_size=image_size, num_workers=WORKERS)
    content = read_manifest(manifest)
    prompt, cameras = content["settings"]["prompt"], content["metadata"]["cameras"]
    tokenizer = Tokenizer.train([prompt], with_state=False)
    length = tokenizer.needed_length([prompt], None)
    return BatchLoader(
        cache.parent,
        load_norm_stats(stats.parent / "norm_stats.json"),
        prompt=PromptTokenizer(tokenizer, prompt, length, False),
        cameras=dict(zip(MODEL_CAMERAS, cameras, strict=False)),
        image_size=image_size,
        action_horizon=HORIZON,
        action_dim=32,
        delta_action_mask=MASK,
        use_quantiles=True,
    )


def lerobot_batches(root: Path, fps: int, batches: int) -> Iterator[dict]:
    """Yield `batches` shuffled batches of LeRobot's reader behind a DataLoader."""
    from torch.utils.data import DataLoader, RandomSampler

    dataset: Any = open_lerobot(root, fps)
    sampler = RandomSampler(dataset, replacement=True, num_samples=batches * BATCH)
    yield from DataLoader(dataset, batch_size=BATCH, sampler=sampler, num_workers=WORKERS)


def measure_batches(batches: Iterator, skipped: int) -> tuple[int, Time]:
    """Return (batches after the first `skipped`, their time by the clock and CPU time pro rata)."""
    cpu, number, started, last = sum(os.times()[:4]), 0, 0.0, 0.0
    for number, _ in enumerate(batches, 1):
        if number == skipped:
            started = time.perf_counter()
        last = time.perf_counter()
    cpu = sum(os.times()[:4]) - cpu
    return number - skipped, Time(last - started, cpu * (number - skipped) / number)


def compare_reading(manifest: Path, folder: Path, batches: int, image_size: int | None) -> None:
    """Print the rates of both readers of a dataset."""
    root = dataset_root(manifest)
    info = read_info(root)
    height, width = info["features"][image_keys(info)[0]]["shape"][:2]
    size = image_size or max(height, width)
    loader = open_cache(manifest, folder, size)
    loaded = (loader.load_batch(step, BATCH, seed=0) for step in range(200))
    number, fast = measure_batches(loaded, skipped=20)
    print_time(f"demo2eval, {size} px", number * BATCH, "samples", fast)
    # As many batches are made ahead while the first come, so these do not count.
    ahead = 2 * WORKERS
    theirs = lerobot_batches(root, info["fps"], batches + ahead)
    their_number, slow = measure_batches(theirs, skipped=ahead)
    name = f"LeRobot, {width} px, {WORKERS} workers"
    print_time(name, their_number * BATCH, "samples", slow)
    print_ratio("reading, by the clock", slow.wall / their_number, fast.wall / number, 50)
    print_ratio("reading, by CPU time", slow.cpu / their_number, fast.cpu / number, 50)


# The command.


@contextlib.contextmanager
def hide_progress() -> Iterator[None]:
    """Keep bars and notices of the libraries, x264's too, and our own bars off the terminal."""
    import datasets

    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    stderr, devnull = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(devnull, 2)
    try:
        yield
    finally:
        os.dup2(stderr, 2)
        os.close(devnull)
        os.close(stderr)


def compare(arguments: argparse.Namespace, prompt: str, folder: Path) -> None:
    """Make what is asked for, part after part."""

    def conversion(storage: str, num_demos: int | None = arguments.num_demos) -> Conversion:
        settings = {"image_storage": storage, "video_crf": arguments.crf}
        dataset = Dataset.model_validate(settings)
        return Conversion(arguments.replay, prompt, dataset, num_demos)

    manifest = folder / "video" / "ours" / "manifest.json"
    # What is imported or read for the first time counts for nobody.
    conversion("video", 1).build(folder / "warm" / "ours" / "manifest.json")
    if "conversion" in arguments.parts:
        lerobot_convert(conversion("png", 1), folder / "warm" / "theirs")
        print("conversion, one process each")
        for storage in ("png", "video"):
            compare_conversion(conversion(storage), folder, arguments.repeats)
    else:
        conversion("video").build(manifest)
    made = read_manifest(manifest)["metadata"]
    print(
        f"dataset of {made['episodes']} demos, {made['frames']} frames, "
        f"{made['images']} images per camera"
    )
    if "norm_stats" in arguments.parts:
        print(f"norm stats, chunks of {HORIZON} actions")
        compare_norm_stats(manifest, folder, arguments.repeats)
    if "reading" in arguments.parts:
        if made["images"] < made["frames"]:
            print("reading is left out: not every step was rendered", flush=True)
            return
        print(f"reading, batches of {BATCH}, chunks of {HORIZON} actions")
        compare_reading(manifest, folder, arguments.batches, arguments.image_size)


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("replay", type=Path, help="manifest of a replayed shard")
    parser.add_argument("--num-demos", type=int, help="the first so many demos (default: all)")
    parser.add_argument("--crf", type=int, default=10, help="quality of the video")
    parser.add_argument("--repeats", type=int, default=3, help="of each conversion")
    parser.add_argument("--batches", type=int, default=10, help="of LeRobot's reader")
    parser.add_argument(
        "--image-size",
        type=int,
        help="of the batches, pixels (default: as rendered); ours are resized to it",
    )
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=PARTS, help="what to compare (default: all)"
    )
    arguments = parser.parse_args()
    settings = read_manifest(arguments.replay)["settings"]
    task, replay = settings["task"], settings["replay"]
    cameras = ", ".join(replay["cameras"].values())
    print(f"{task}, {replay['image_size']} px, cameras {cameras}; numpy {np.__version__}")
    with hide_progress(), tempfile.TemporaryDirectory() as temporary:
        compare(arguments, f"do the task {task}", Path(temporary))


if __name__ == "__main__":
    main()
