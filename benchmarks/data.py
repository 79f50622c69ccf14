"""Conversion, statistics and reading for training, each side by side with LeRobot's own way, on one replayed shard.

    python benchmarks/data.py results/replays/<name>/shard-000/manifest.json

Best on a replay of every step (`image_stride: 1`), so that every row has a picture of its own; with other replays the comparison of
reading is left out. Everything is made anew in a temporary folder. Twenty demonstrations of StackCube take about ten minutes on two cores.

conversion  one process of each makes the same dataset from the same demonstrations: `demo2eval.data.dataset` with one worker, and
            `LeRobotDataset.create`, `add_frame`, `save_episode` with one encoder thread. Pictures are stored as PNG by both, then as
            video by both (h264, 4:4:4, the same crf, preset, key frames and no B-frames). By default LeRobot writes the pictures of a
            video as PNG files first, which is what is compared; its streaming encoder, whose threads run beside, is in the table as well.
statistics  `demo2eval.data.norm_stats` reads columns; openpi iterates over the dataset, pictures and all, and keeps running moments and
            histograms of 5000 bins. Written here from its description: `LeRobotDataset` behind a DataLoader of two workers.
reading     batches of 256 samples, chunks of 20 actions, two cameras: `TrainingData` on one thread, from `demo2eval.data.image_cache`,
            and `LeRobotDataset` behind a DataLoader of two workers, shuffled. Ours gives normalised, padded batches with tokens,
            LeRobot's just pictures, state and actions.

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
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from demo2eval.data import image_cache as training_cache
from demo2eval.data import norm_stats
from demo2eval.data.chunks import chunk_rows, last_rows
from demo2eval.data.dataset import Settings, dataset, inspect, make_features, survey
from demo2eval.data.lerobot_reader import (
    IMAGE_PREFIX,
    dataset_root,
    image_keys,
    read_columns,
    read_info,
    video_rows,
)
from demo2eval.data.lerobot_writer import KEY_FRAME_INTERVAL, PRESET, picture_of_row, read_state
from demo2eval.pi0.normalize import load_norm_stats
from demo2eval.provenance import read_manifest

HORIZON, BATCH, WORKERS, BINS = 20, 256, 2, 5000
OPENPI_BATCH = 32
QUANTILES = (0.01, 0.99)
MASK = [True] * 7 + [False]
"""Per action dimension, whether it is a difference from the state: the joints, not the gripper."""
REPO = "demo2eval/benchmark"


@dataclass(frozen=True)
class Time:
    """Seconds that something took by the clock, and of the processors."""

    wall: float
    cpu: float


def timed(function: Callable, repeats: int, before: Callable = lambda: None) -> Time:
    """Return the median time of a call; `before` is called before each and does not count."""
    times = []
    for _ in range(repeats):
        before()
        started, cpu = time.perf_counter(), sum(os.times()[:4])
        function()
        times.append(Time(time.perf_counter() - started, sum(os.times()[:4]) - cpu))
    return Time(
        statistics.median(one.wall for one in times), statistics.median(one.cpu for one in times)
    )


def show(name: str, amount: int, unit: str, time: Time, note: str = "") -> None:
    """Print one line of a table."""
    rates = (
        f"{amount / time.wall:10.1f} {unit}/s  {amount / max(time.cpu, 1e-9):10.1f} {unit}/CPU s"
    )
    print(f"  {name:34s} {time.wall:8.3f} s  {time.cpu:8.3f} CPU s  {rates}  {note}", flush=True)


def show_ratio(what: str, theirs: float, ours: float, goal: float) -> None:
    """Print how many times faster ours is, and the goal."""
    print(f"  {what}: {theirs / ours:.1f} times (goal {goal:g})", flush=True)


def size_of(folder: Path) -> int:
    """Return the bytes of all files below a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


# Conversion.


def lerobot_convert(settings: Settings, replay: Path, root: Path, streaming: bool = False) -> None:
    """Make the same dataset with LeRobot's own writer, in this process, with one encoder thread a camera."""
    import h5py
    from lerobot.configs.video import RGBEncoderConfig
    from lerobot.datasets.lerobot_dataset import LeRobotDataset

    source = survey(inspect([replay], settings), settings)
    options = {}
    if settings.image_storage == "video":
        encoder = {
            "vcodec": "h264",
            "pix_fmt": "yuv444p",
            "g": KEY_FRAME_INTERVAL,
            "crf": settings.video_crf,
            "preset": PRESET,
        }
        options["rgb_encoder"] = RGBEncoderConfig(**encoder, extra_options={"bf": "0"})
        # Its streaming encoder drops pictures that find the queue full.
        options |= {
            "encoder_threads": 1,
            "streaming_encoding": streaming,
            "encoder_queue_maxsize": sum(source.lengths),
        }
    made = LeRobotDataset.create(
        REPO,
        settings.fps,
        make_features(settings, source),
        root=root,
        robot_type="panda",
        use_videos=settings.image_storage == "video",
        **options,
    )
    with h5py.File(source.shards[0].source) as file:
        for name, length in zip(
            source.shards[0].trajectories, source.shards[0].lengths, strict=True
        ):
            group = file[name]
            actions, state = group["actions"][()], read_state(group, tuple(settings.state), length)
            index, age = picture_of_row(group, tuple(settings.cameras), length)
            pictures = {
                camera: group[f"obs/sensor_data/{camera}/rgb"][()] for camera in settings.cameras
            }
            for row in range(length):
                frame = {
                    "action": actions[row],
                    "observation.state": state[row],
                    "picture_age": age[row : row + 1],
                }
                frame |= {
                    IMAGE_PREFIX + camera: values[index[row]] for camera, values in pictures.items()
                }
                made.add_frame(frame | {"task": settings.prompt})
            made.save_episode(parallel_encoding=False)
    made.finalize()


def columns_equal(one: Path, other: Path) -> bool:
    """Tell whether two datasets have the same numbers in all columns, bit for bit."""
    info = read_info(one)
    names = [name for name in info["features"] if name not in image_keys(info)]
    ours, theirs = read_columns(one, names), read_columns(other, names)
    return all(
        ours[name].dtype == theirs[name].dtype and np.array_equal(ours[name], theirs[name])
        for name in names
    )


def stored_pictures(root: Path, key: str) -> Iterator[np.ndarray]:
    """Yield a camera's pictures of all rows, uint8 [h, w, 3], decoded."""
    for place in video_rows(root, read_info(root), key):
        if place.file.suffix == ".mp4":
            yield from training_cache.decode_video(place.file, place.frames)
        else:
            yield from training_cache.decode_png(place.file, key, place.frames)


def picture_differences(one: Path, other: Path) -> tuple[int, float]:
    """Return (largest, mean) absolute difference of the decoded pictures of two datasets, of 255."""
    largest, total, number = 0, 0.0, 0
    for key in image_keys(read_info(one)):
        for ours, theirs in zip(
            stored_pictures(one, key), stored_pictures(other, key), strict=True
        ):
            difference = np.abs(ours.astype(np.int16) - theirs)
            largest, total, number = (
                max(largest, int(difference.max())),
                total + difference.mean(),
                number + 1,
            )
    return largest, total / number


def decibels(root: Path, exact: Path) -> float:
    """Return the PSNR of a dataset's pictures, dB, given the same dataset with exact ones."""
    errors = [
        np.mean((seen.astype(np.float64) - true) ** 2)
        for key in image_keys(read_info(root))
        for seen, true in zip(stored_pictures(root, key), stored_pictures(exact, key), strict=True)
    ]
    return 10 * np.log10(255**2 / np.mean(errors))


def compare_conversion(settings: Settings, replay: Path, folder: Path, repeats: int) -> None:
    """Print the times of both conversions, and how far the two datasets are equal."""
    storage = settings.image_storage
    ours, theirs = folder / storage / "ours", folder / storage / "theirs"

    def convert(function: Callable, at: Path, repeats: int) -> Time:
        return timed(function, repeats, before=lambda: shutil.rmtree(at, ignore_errors=True))

    fast = convert(lambda: dataset(settings, [replay], ours / "manifest.json"), ours, repeats)
    frames = read_manifest(ours / "manifest.json")["metadata"]["frames"]
    show(
        f"demo2eval, {storage}", frames, "frames", fast, f"{size_of(ours / 'lerobot') / 1e6:.2f} MB"
    )
    default = convert(lambda: lerobot_convert(settings, replay, theirs), theirs, repeats)
    name = "LeRobot, video by way of PNG" if storage == "video" else "LeRobot, png"
    show(name, frames, "frames", default, f"{size_of(theirs) / 1e6:.2f} MB")
    if storage == "video":
        streamed = folder / storage / "streamed"
        beside = convert(
            lambda: lerobot_convert(settings, replay, streamed, streaming=True), streamed, 1
        )
        show(
            "LeRobot, video streamed (threads)",
            frames,
            "frames",
            beside,
            f"{size_of(streamed) / 1e6:.2f} MB",
        )
        show_ratio("video, against streaming, by the clock", beside.wall, fast.wall, 4)
        show_ratio("video, against streaming, by CPU time", beside.cpu, fast.cpu, 4)
    show_ratio(f"{storage}, by the clock", default.wall, fast.wall, 4)
    show_ratio(f"{storage}, by CPU time", default.cpu, fast.cpu, 4)
    largest, mean = picture_differences(ours / "lerobot", theirs)
    print(f"  columns equal bit for bit: {columns_equal(ours / 'lerobot', theirs)}")
    print(f"  pictures differ by at most {largest}, by {mean:.3f} on average, of 255", flush=True)
    if storage == "video":
        exact = folder / "png" / "ours" / "lerobot"
        print(
            f"  PSNR {decibels(ours / 'lerobot', exact):.2f} dB, LeRobot's {decibels(theirs, exact):.2f} dB",
            flush=True,
        )


# Statistics.


class Running:
    """Running moments and histograms of vectors, as openpi keeps them: the bins span what was seen, and are dealt anew when that grows."""

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
            self._deal_anew()
        self.count += len(values)
        self.mean += (values.mean(axis=0) - self.mean) * len(values) / self.count
        self.mean_of_squares += (
            ((values**2).mean(axis=0) - self.mean_of_squares) * len(values) / self.count
        )
        for dim, edges in enumerate(self.edges):
            self.counts[dim] += np.histogram(values[:, dim], bins=edges)[0]

    def _deal_anew(self) -> None:
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

    return LeRobotDataset(
        REPO, root=root, delta_timestamps={"action": [step / fps for step in range(HORIZON)]}
    )


def delta(actions: np.ndarray, state: np.ndarray, mask: list[bool]) -> np.ndarray:
    """Return chunks [n, horizon, A] with the state [n, S] taken off in the masked dimensions, float32."""
    result = actions.copy()
    result[..., : len(mask)] -= np.where(mask, state[:, : len(mask)], 0)[:, None]
    return result


def openpi_statistics(
    root: Path,
    fps: int,
    mask: list[bool],
    *,
    workers: int = WORKERS,
    batch_size: int = OPENPI_BATCH,
) -> dict[str, Running]:
    """Iterate over a dataset as openpi does for its norm stats, decoding every picture."""
    from torch.utils.data import DataLoader

    running = {"state": Running(), "actions": Running()}
    for batch in DataLoader(open_lerobot(root, fps), batch_size=batch_size, num_workers=workers):
        state, actions = batch["observation.state"].numpy(), batch["action"].numpy()
        running["state"].update(state)
        running["actions"].update(delta(actions, state, mask))
    return running


def sorted_values(root: Path, mask: list[bool]) -> dict[str, np.ndarray]:
    """Return all values that the statistics are of, float64 [n, dim], each dimension sorted."""
    action, state, episode = read_columns(
        root, ["action", "observation.state", "episode_index"]
    ).values()
    rows = chunk_rows(np.arange(len(action)), last_rows(episode), HORIZON)
    chunks = delta(action[rows], state, mask).reshape(-1, action.shape[1])
    return {
        name: np.sort(values.astype(np.float64), axis=0)
        for name, values in (("state", state), ("actions", chunks))
    }


def exact_statistics(root: Path, mask: list[bool]) -> dict[str, dict[str, np.ndarray]]:
    """Return the statistics of all values, sorted and summed up in double precision, from the columns."""
    result = {}
    for name, ordered in sorted_values(root, mask).items():
        mean = ordered.sum(axis=0) / len(ordered)
        found = {"mean": mean, "std": np.sqrt(((ordered - mean) ** 2).sum(axis=0) / len(ordered))}
        for quantile in QUANTILES:
            place = quantile * (len(ordered) - 1)
            below, part = ordered[int(place)], place - int(place)
            found[f"q{round(quantile * 100):02d}"] = below + part * (
                ordered[min(int(place) + 1, len(ordered) - 1)] - below
            )
        result[name] = found
    return result


def bins_off(running: Running, ordered: np.ndarray, quantile: float) -> np.ndarray:
    """Return by how many bins a histogram's quantile of each dimension misses where it must be.

    That is between the two of the sorted values `ordered` [n, dim] among which the quantile lies: which number between them is a matter
    of definition.
    """
    place, edge = quantile * (len(ordered) - 1), running.quantile(quantile)
    lower, upper = ordered[int(place)], ordered[min(int(place) + 1, len(ordered) - 1)]
    missed = np.maximum(0, np.maximum(lower - edge, edge - upper))
    # The bins of a value that never changes have no width in float32.
    return np.divide(
        missed,
        running.bin_width,
        out=np.where(missed > 0, np.inf, 0.0),
        where=running.bin_width > 0,
    )


def compare_statistics(made: Path, folder: Path, repeats: int) -> None:
    """Print the times of both statistics of the dataset of manifest `made`, and how far they are from exact ones."""
    root, output = dataset_root(made), folder / "norm_stats" / "manifest.json"
    info, rows = read_info(root), read_manifest(made)["metadata"]["frames"]
    settings = norm_stats.Settings(action_horizon=HORIZON, delta_action_mask=MASK)

    def ours() -> None:
        norm_stats.norm_stats(settings, made, output)

    def forget() -> None:
        shutil.rmtree(output.parent, ignore_errors=True)

    # The first call imports JAX.
    timed(ours, 1, forget)
    fast = timed(ours, max(repeats, 3), forget)
    show("demo2eval", rows, "rows", fast)
    running = {}
    slow = timed(lambda: running.update(openpi_statistics(root, info["fps"], MASK)), 1)
    show(f"openpi's way, {WORKERS} workers", rows, "rows", slow)
    show_ratio("statistics, by the clock", slow.wall, fast.wall, 100)
    show_ratio("statistics, by CPU time", slow.cpu, fast.cpu, 100)
    stats, exact = load_norm_stats(output.parent / "norm_stats.json"), exact_statistics(root, MASK)
    error = max(
        np.abs(getattr(stats[name], key) - value).max()
        for name in exact
        for key, value in exact[name].items()
    )
    print(f"  ours differ from exact ones by at most {error:.1e}")
    ordered = sorted_values(root, MASK)
    for quantile in QUANTILES:
        bins = np.concatenate(
            [bins_off(running[name], ordered[name], quantile) for name in ordered]
        )
        print(
            f"  the histograms' q{round(quantile * 100):02d} are off by at most {bins.max():.2f} bins",
            flush=True,
        )
    moments = max(
        np.abs(getattr(running[name], key) - exact[name][key]).max()
        for name in exact
        for key in ("mean", "std")
    )
    print(f"  the running mean and std differ from exact ones by at most {moments:.1e}", flush=True)


# Reading.


def our_batches(made: Path, folder: Path, cameras: list[str], prompt: str, image_size: int):
    """Return `TrainingData` on a new cache of the dataset of manifest `made`, with its norm stats in `folder`."""
    from demo2eval.data.loader import Prompt, TrainingData
    from demo2eval.pi0.tokenizer import Tokenizer

    cache, stats = (
        folder / f"cache-{image_size}" / "manifest.json",
        folder / "norm_stats" / "manifest.json",
    )
    if not stats.exists():
        norm_stats.norm_stats(
            norm_stats.Settings(action_horizon=HORIZON, delta_action_mask=MASK), made, stats
        )
    training_cache.training_cache(
        training_cache.Settings(image_size=image_size), made, cache, workers=WORKERS
    )
    tokenizer = Tokenizer.train([prompt], with_state=False)
    return TrainingData(
        cache.parent,
        load_norm_stats(stats.parent / "norm_stats.json"),
        prompt=Prompt(tokenizer, prompt, tokenizer.needed_length([prompt], None), False),
        cameras=dict(
            zip(("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"), cameras, strict=False)
        ),
        image_size=image_size,
        action_horizon=HORIZON,
        action_dim=32,
        delta_action_mask=MASK,
        use_quantiles=True,
    )


def lerobot_batches(root: Path, fps: int, batches: int) -> Iterator[dict]:
    """Yield `batches` shuffled batches of LeRobot's reader behind a DataLoader."""
    from torch.utils.data import DataLoader, RandomSampler

    opened = open_lerobot(root, fps)
    sampler = RandomSampler(opened, replacement=True, num_samples=batches * BATCH)
    yield from DataLoader(opened, batch_size=BATCH, sampler=sampler, num_workers=WORKERS)


def steady(batches: Iterator, skipped: int) -> tuple[int, Time]:
    """Return (batches after the first `skipped`, their time by the clock and, of all batches pro rata, their CPU time)."""
    cpu, number, started = sum(os.times()[:4]), 0, 0.0
    for number, _ in enumerate(batches, 1):
        if number == skipped:
            started = time.perf_counter()
        last = time.perf_counter()
    cpu = sum(os.times()[:4]) - cpu
    return number - skipped, Time(last - started, cpu * (number - skipped) / number)


def compare_reading(made: Path, folder: Path, batches: int, image_size: int | None) -> None:
    """Print the rates of both readers of the dataset of manifest `made`."""
    root, manifest = dataset_root(made), read_manifest(made)
    info = read_info(root)
    cameras = manifest["settings"]["cameras"]
    height, width = info["features"][image_keys(info)[0]]["shape"][:2]
    size = image_size or max(height, width)
    data = our_batches(made, folder, cameras, manifest["settings"]["prompt"], size)
    number, fast = steady((data.batch(step, BATCH, seed=0) for step in range(200)), skipped=20)
    show(f"demo2eval, {size} px", number * BATCH, "samples", fast)
    # As many batches are made ahead while the first come, so these do not count.
    ahead = 2 * WORKERS
    number, slow = steady(lerobot_batches(root, info["fps"], batches + ahead), skipped=ahead)
    show(f"LeRobot, {width} px, {WORKERS} workers", number * BATCH, "samples", slow)
    show_ratio("reading, by the clock", slow.wall / number, fast.wall / 180, 50)
    show_ratio("reading, by CPU time", slow.cpu / number, fast.cpu / 180, 50)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keep bars and notices of the libraries, x264's too, and our own bars off the terminal; errors are still raised."""
    import datasets

    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(nowhere)
        os.close(kept)


def main() -> None:
    """Measure and print tables."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("replay", type=Path, help="manifest of a replayed shard")
    parser.add_argument(
        "--count", type=int, help="take the first so many demonstrations (default: all)"
    )
    parser.add_argument("--crf", type=int, default=10, help="quality of the video")
    parser.add_argument("--repeats", type=int, default=3, help="of each conversion")
    parser.add_argument("--batches", type=int, default=10, help="of LeRobot's reader")
    parser.add_argument(
        "--image-size",
        type=int,
        help="of the batches, pixels (default: as rendered); ours are resized to it",
    )
    parts = ("conversion", "statistics", "reading")
    parser.add_argument(
        "--parts",
        nargs="+",
        choices=parts,
        default=parts,
        help="what to compare (default: everything)",
    )
    arguments = parser.parse_args()
    replayed = read_manifest(arguments.replay)["settings"]
    settings = Settings(
        prompt=f"do the task {replayed['task']}",
        cameras=replayed["cameras"],
        state=["qpos"],
        image_storage="png",
        video_crf=arguments.crf,
        count=arguments.count,
    )
    print(
        f"{replayed['task']}, {replayed['image_size']} px, cameras {', '.join(replayed['cameras'])}; numpy {np.__version__}"
    )
    with quiet(), tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        measure(settings, arguments, folder)


def measure(settings: Settings, arguments: argparse.Namespace, folder: Path) -> None:
    """Make what is asked for, part after part."""
    video = replace(settings, image_storage="video")
    made = folder / "video" / "ours" / "manifest.json"
    # What is imported or read for the first time counts for nobody.
    dataset(replace(video, count=1), [arguments.replay], folder / "warm" / "ours" / "manifest.json")
    if "conversion" in arguments.parts:
        lerobot_convert(replace(settings, count=1), arguments.replay, folder / "warm" / "theirs")
        print("conversion, one process each")
        for storage in (settings, video):
            compare_conversion(storage, arguments.replay, folder, arguments.repeats)
    else:
        dataset(video, [arguments.replay], made)
    facts = read_manifest(made)["metadata"]
    print(
        f"dataset of {facts['episodes']} demonstrations, {facts['frames']} frames, {facts['pictures']} pictures a camera"
    )
    if "statistics" in arguments.parts:
        print(f"statistics, chunks of {HORIZON} actions")
        compare_statistics(made, folder, arguments.repeats)
    if "reading" in arguments.parts:
        if facts["pictures"] < facts["frames"]:
            print("reading is left out: not every step was rendered", flush=True)
            return
        print(f"reading, batches of {BATCH}, chunks of {HORIZON} actions")
        compare_reading(made, folder, arguments.batches, arguments.image_size)


if __name__ == "__main__":
    main()
