"""LeRobot dataset (format v3.0) from replayed demonstrations; the official reader opens it.

In:  manifests of replayed shards, trajectory.h5 and trajectory.json beside each.
Out: <folder of the output>/lerobot, opened by `LeRobotDataset("demo2eval/<any name>", root=<that folder>)`.

One row is one control step: `action`, `observation.state`, `observation.images.<camera>`, and `picture_age`, the steps
since that picture was rendered. Where not every step was rendered, a row shows the newest picture, as a slow camera would. The
observation after the last action has no row. Actions and states are those of the demonstrations bit for bit; PNG pictures too.
Video (h264, 4:4:4) loses a little: the manifest gives the measured PSNR.

Shards are written by separate processes. A run that was killed goes on with the shards that were not finished.
"""

import json
import os
import shutil
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from demo2eval.cli import option, run, settings_from, stage_parser
from demo2eval.data.lerobot_reader import IMAGE_PREFIX, PICTURE_AGE, to_array
from demo2eval.data.lerobot_writer import (
    KEY_FRAME_INTERVAL,
    PRESET,
    Format,
    Shard,
    histogram_stats,
    write_shard,
)
from demo2eval.data.replayed import picture_findings, replayed_faults
from demo2eval.data.trajectory import Finding, Recording, examine, refuse, sift
from demo2eval.errors import UserError
from demo2eval.maniskill.observation import JOINTS, state_names
from demo2eval.provenance import StageJob, run_stage, write_atomic

ARM = JOINTS[:7]
ACTION_NAMES = {
    "pd_joint_pos": [*ARM, "gripper"],
    "pd_joint_delta_pos": [*(f"delta_{joint}" for joint in ARM), "gripper"],
    "pd_ee_delta_pos": ["delta_x", "delta_y", "delta_z", "gripper"],
    "pd_ee_delta_pose": [
        "delta_x",
        "delta_y",
        "delta_z",
        "delta_rx",
        "delta_ry",
        "delta_rz",
        "gripper",
    ],
}
FILES_PER_CHUNK = 1000


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the dataset's content."""

    prompt: str = option("the instruction, LeRobot's task")
    cameras: list = option("ManiSkill's cameras")
    state: list = option('parts of the state vector, in order, such as ["qpos"]')
    image_storage: str = option("video (h264, small) or png (exact)", "video")
    video_crf: int = option("h264 quality, 0 (best) to 51", 10)
    fps: int = option("control steps a second", 20)
    count: int | None = option("take the first so many demonstrations; null: all", None)
    on_invalid: str = option("refuse everything if a demonstration is bad, or skip it", "error")


@dataclass(frozen=True)
class Source:
    """The demonstrations of one dataset, as found in the replayed shards."""

    shards: list[Shard]
    seeds: list[int]
    control_mode: str
    action_width: int
    picture_shapes: dict[str, tuple[int, int, int]]

    @property
    def lengths(self) -> list[int]:
        """Control steps of every demonstration."""
        return [length for shard in self.shards for length in shard.lengths]


def inspect(replays: list[Path], settings: Settings) -> list[Recording]:
    """Read and check every demonstration of every shard.

    Pictures are decoded only if some demonstrations are bad already, or may be left out; else while they are written.
    """
    from tqdm import tqdm

    def observed(group, length: int) -> Iterator[str]:
        return replayed_faults(group, length, settings.cameras, settings.state)

    recordings = examine([manifest.parent / "trajectory.h5" for manifest in replays], more=observed)
    for recording, found in zip(recordings, differences(recordings, settings.cameras), strict=True):
        recording.reject(found)
    if settings.on_invalid == "skip" or any(recording.findings for recording in recordings):
        for recording in tqdm(recordings, unit="file", mininterval=2, desc="checking pictures"):
            if recording.demonstrations:
                names = [demonstration.name for demonstration in recording.demonstrations]
                recording.reject(picture_findings(recording.file, names, settings.cameras))
    return recordings


def differences(recordings: list[Recording], cameras: list[str]) -> Iterator[list[Finding]]:
    """Yield for each file the demonstrations that do not go into one dataset with the first."""
    first = None
    for recording in recordings:
        found = []
        for demonstration in recording.demonstrations:
            task = recording.description["env_info"]["env_id"]
            shapes = picture_shapes(recording.file, demonstration.name, cameras)
            pictures = [
                f"{width} x {height} pictures of {camera}"
                for camera, (height, width, _) in shapes.items()
            ]
            kind = (task, demonstration.control_mode, *pictures)
            first = first or (recording.file, demonstration.name, kind)
            for one, wanted in zip(kind, first[2], strict=True):
                if one != wanted:
                    reason = f"has {one}, but {first[0]} {first[1]} has {wanted}"
                    found.append(Finding(recording.file, demonstration.name, reason))
        yield found


def picture_shapes(source: Path, name: str, cameras: list[str]) -> dict[str, tuple[int, int, int]]:
    """Return the shape of each camera's pictures of a replayed demonstration."""
    import h5py

    with h5py.File(source, "r") as file:
        return {
            camera: file[f"{name}/obs/sensor_data/{camera}/rgb"].shape[1:] for camera in cameras
        }


def survey(recordings: list[Recording], settings: Settings) -> Source:
    """Give the demonstrations of all shards, as many as are wanted, their episodes and rows."""
    shards, taken = [], []
    for index, recording in enumerate(recordings):
        here = recording.demonstrations[
            : None if settings.count is None else settings.count - len(taken)
        ]
        if here:
            names, lengths = (
                tuple(one.name for one in here),
                tuple(len(one.actions) for one in here),
            )
            rows = sum(len(one.actions) for one in taken)
            shards.append(Shard(index, recording.file, names, lengths, len(taken), rows))
        taken += here
    shapes = picture_shapes(shards[0].source, taken[0].name, settings.cameras)
    return Source(
        shards,
        [one.seed for one in taken],
        taken[0].control_mode,
        taken[0].actions.shape[1],
        shapes,
    )


def make_features(settings: Settings, source: Source) -> dict:
    """Return LeRobot's features, without those that it adds itself."""
    state, action = state_names(settings.state), ACTION_NAMES.get(source.control_mode, [])
    if len(action) != source.action_width:
        action = [f"action_{index}" for index in range(source.action_width)]
    stored_as = "video" if settings.image_storage == "video" else "image"
    return {
        "action": {"dtype": "float32", "shape": (source.action_width,), "names": action},
        "observation.state": {"dtype": "float32", "shape": (len(state),), "names": state},
        PICTURE_AGE: {"dtype": "int64", "shape": (1,), "names": ["steps"]},
    } | {
        IMAGE_PREFIX + camera: {
            "dtype": stored_as,
            "shape": tuple(shape),
            "names": ["height", "width", "channels"],
        }
        for camera, shape in source.picture_shapes.items()
    }


def _end_with_parent() -> None:
    """Let a worker process end when the process that started it was killed."""
    from multiprocessing import connection, parent_process

    def watch() -> None:
        connection.wait([parent_process().sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def write_shards(
    shards: list[Shard], wanted: Format, partial: Path, workers: int
) -> Iterator[tuple[Shard, list[Finding]]]:
    """Write all shards with `workers` processes and yield each as it is finished, with what is wrong with its pictures."""
    from multiprocessing import active_children, get_context

    waiting = []
    for shard in shards:
        if (partial / shard.folder_name).is_dir():
            yield shard, []
        else:
            waiting.append(shard)
    workers = min(workers, len(waiting))
    if workers <= 1:
        for shard in waiting:
            yield shard, write_shard(shard, wanted, partial)
        return
    others, here = set(active_children()), threading.local()

    def write(shard: Shard) -> list[Finding]:
        # A process of its own for each thread: one that crashes takes no other shard along, and is known to be this shard's.
        if not hasattr(here, "process"):
            here.process = ProcessPoolExecutor(
                1, mp_context=get_context("spawn"), initializer=_end_with_parent
            )
        try:
            return here.process.submit(write_shard, shard, wanted, partial).result()
        except BrokenProcessPool:
            del here.process
            raise

    crashed = []
    with ThreadPoolExecutor(workers) as pool:
        futures = {pool.submit(write, shard): shard for shard in waiting}
        try:
            for future in as_completed(futures):
                if isinstance(future.exception(), BrokenProcessPool):
                    crashed.append(futures[future])
                    continue
                yield futures[future], future.result()
        except BaseException:
            # Unfinished shards are of no use, so nobody waits for them.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in set(active_children()) - others:
                process.terminate()
            raise
    if crashed:
        raise UserError(
            f"{', '.join(str(shard.source) for shard in crashed)}: the process that wrote this shard of the dataset was killed or "
            f"crashed (out of memory?); the other shards are finished, run the same command again, with fewer --workers if memory is short."
        )


def column_stats(values: np.ndarray) -> dict[str, np.ndarray]:
    """Return LeRobot's statistics of a column [rows] or [rows, dimensions]; its quantiles are exact, unlike LeRobot's own."""
    values = values.astype(np.float64).reshape(len(values), -1)
    quantiles = np.quantile(values, [0.01, 0.1, 0.5, 0.9, 0.99], axis=0)
    return {
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
        "count": np.array([len(values)]),
    } | dict(zip(("q01", "q10", "q50", "q90", "q99"), quantiles, strict=True))


def image_stats(counts: np.ndarray, pictures: int) -> dict[str, np.ndarray]:
    """Return the statistics of a camera's `pictures` pictures with the histograms `counts` [3, 256]."""
    return histogram_stats(counts) | {"count": np.array([pictures])}


def shard_stats(
    folder: Path, shard: Shard, cameras: list[str]
) -> tuple[list[dict], dict[str, np.ndarray], dict]:
    """Return (statistics of each episode, the numeric columns, histograms by camera) of a finished shard."""
    import pyarrow.parquet as pq

    schema = pq.read_schema(folder / "data.parquet")
    numeric = [name for name in schema.names if not name.startswith(IMAGE_PREFIX)]
    table = pq.read_table(folder / "data.parquet", columns=numeric)
    columns = {name: to_array(table.column(name)) for name in numeric}
    histograms = {camera: np.load(folder / f"histogram_{camera}.npy") for camera in cameras}
    episodes, start = [], 0
    for number, length in enumerate(shard.lengths):
        rows = slice(start, start + length)
        stats = {name: column_stats(values[rows]) for name, values in columns.items()}
        pictures = int((columns[PICTURE_AGE][rows] == 0).sum())
        stats |= {
            IMAGE_PREFIX + camera: image_stats(counts[number], pictures)
            for camera, counts in histograms.items()
        }
        episodes.append(stats)
        start += length
    return episodes, columns, histograms


def place_of(index: int) -> dict[str, int]:
    """Return LeRobot's chunk and file number of a shard's files."""
    return {"chunk_index": index // FILES_PER_CHUNK, "file_index": index % FILES_PER_CHUNK}


def link(source: Path, target: Path) -> None:
    """Give a finished file its second name, so that a killed run finds it under the first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target)
    except OSError:
        # Some network file systems have no hard links.
        shutil.copy(source, target)


def assemble(job: StageJob, settings: Settings, source: Source, features: dict) -> dict[str, int]:
    """Make the whole dataset at `job.partial`/lerobot from finished shards, with the official metadata writer.

    Returns:
        counts of episodes, frames and pictures (a camera's; a repeated one counts once).
    """
    from lerobot.configs.video import VideoEncoderConfig
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata
    from lerobot.datasets.io_utils import write_info, write_stats

    root = job.partial / "lerobot"
    shutil.rmtree(root, ignore_errors=True)
    videos = settings.cameras if settings.image_storage == "video" else []
    meta = LeRobotDatasetMetadata.create(
        "demo2eval/dataset",
        settings.fps,
        features,
        robot_type="panda",
        root=root,
        use_videos=bool(videos),
    )
    meta.save_episode_tasks([settings.prompt])
    for shard in source.shards:
        folder, place = job.partial / shard.folder_name, place_of(shard.index)
        link(folder / "data.parquet", root / meta.data_path.format(**place))
        for camera in videos:
            link(
                folder / f"{camera}.mp4",
                root / meta.video_path.format(video_key=IMAGE_PREFIX + camera, **place),
            )
    if videos:
        encoder = {
            "vcodec": "h264",
            "pix_fmt": "yuv444p",
            "g": KEY_FRAME_INTERVAL,
            "crf": settings.video_crf,
            "preset": PRESET,
        }
        meta.update_video_info(video_encoder=VideoEncoderConfig(**encoder))
    all_columns, all_histograms = [], []
    for shard in source.shards:
        episodes, columns, histograms = shard_stats(
            job.partial / shard.folder_name, shard, settings.cameras
        )
        save_episodes(meta, shard, episodes, settings, videos)
        all_columns.append(columns)
        all_histograms.append({camera: counts.sum(axis=0) for camera, counts in histograms.items()})
    meta.finalize()
    columns = {
        name: np.concatenate([part[name] for part in all_columns]) for name in all_columns[0]
    }
    pictures = int((columns[PICTURE_AGE] == 0).sum())
    stats = {name: column_stats(values) for name, values in columns.items()}
    for camera in settings.cameras:
        stats[IMAGE_PREFIX + camera] = image_stats(
            sum(part[camera] for part in all_histograms), pictures
        )
    write_info(meta.info, root)
    write_stats(stats, root)
    return {"episodes": meta.total_episodes, "frames": meta.total_frames, "pictures": pictures}


def save_episodes(
    meta, shard: Shard, stats: list[dict], settings: Settings, videos: list[str]
) -> None:
    """Enter a shard's episodes into the metadata: where their rows and video frames begin and end."""
    place, start = place_of(shard.index), 0
    for number, length in enumerate(shard.lengths):
        where = {f"data/{key}": value for key, value in place.items()}
        for camera in videos:
            prefix = f"videos/{IMAGE_PREFIX}{camera}"
            where |= {f"{prefix}/{key}": value for key, value in place.items()}
            where |= {
                f"{prefix}/from_timestamp": start / settings.fps,
                f"{prefix}/to_timestamp": (start + length) / settings.fps,
            }
        meta.save_episode(
            shard.first_episode + number, length, [settings.prompt], stats[number], where
        )
        start += length


def dataset(settings: Settings, replays: list[Path], output: Path, *, workers: int = 1) -> None:
    """Make the dataset of manifest `output` from the manifests of replayed shards, in their order.

    Args:
        workers: processes; they change the time only.

    Raises:
        UserError: if a shard is damaged, incomplete or unlike the others, or a setting is unknown.
    """
    if settings.image_storage not in ("video", "png"):
        raise UserError(
            f"dataset.image_storage is {settings.image_storage!r}; it may be 'video' or 'png'."
        )
    with run_stage(
        output,
        stage="dataset",
        module=__spec__.name,
        settings=settings,
        inputs={"replays": replays},
    ) as job:
        if not job.reused:
            _make(settings, [Path(replay) for replay in replays], job, workers)


def _make(settings: Settings, replays: list[Path], job: StageJob, workers: int) -> None:
    from tqdm import tqdm

    recordings = inspect(replays, settings)
    skipped = sift(recordings, settings.on_invalid)
    source = survey(recordings, settings)
    features = make_features(settings, source)
    remove_unfit_shards(job.partial, json.dumps(skipped))
    wanted = make_format(settings, features)
    findings = []
    with tqdm(total=sum(source.lengths), unit="frame", desc="dataset", mininterval=2) as bar:
        for shard, found in write_shards(source.shards, wanted, job.partial, workers):
            findings += found
            bar.update(sum(shard.lengths))
    refuse(sorted(findings, key=str))
    psnr = worst_psnr(source.shards, job.partial) if settings.image_storage == "video" else None
    counts = assemble(work, settings, source, features)
    if settings.count is not None and counts["episodes"] < settings.count:
        print(
            f"only {counts['episodes']} of {settings.count} demonstrations are there",
            file=sys.stderr,
        )
    final = job.folder / "lerobot"
    shutil.rmtree(final, ignore_errors=True)
    (job.partial / "lerobot").rename(final)
    job.finish(
        [final],
        **counts,
        seeds=source.seeds,
        lengths=source.lengths,
        control_mode=source.control_mode,
        psnr_db=psnr,
        skipped=skipped,
    )


def remove_unfit_shards(partial: Path, skipped: str) -> None:
    """Remove unfinished shards, and all if an interrupted run left other demonstrations out: theirs have other numbers."""
    note = partial / "skipped.json"
    same = note.exists() and note.read_text(encoding="utf-8") == skipped
    for folder in partial.glob("shard-*.*" if same else "shard-*"):
        shutil.rmtree(folder)
    write_atomic(note, skipped)


def make_format(settings: Settings, features: dict) -> Format:
    """Return how the shards are written, with the schema that LeRobot gives these features."""
    from lerobot.datasets.feature_utils import get_hf_features_from_features
    from lerobot.utils.constants import DEFAULT_FEATURES

    schema = get_hf_features_from_features({**features, **DEFAULT_FEATURES}).arrow_schema
    crf = settings.video_crf if settings.image_storage == "video" else None
    return Format(schema, tuple(settings.cameras), tuple(settings.state), crf, settings.fps)


def worst_psnr(shards: list[Shard], partial: Path) -> dict[str, float]:
    """Return the lowest PSNR, dB, that was measured of each camera in any shard."""
    measured = [
        json.loads((partial / shard.folder_name / "psnr.json").read_text()) for shard in shards
    ]
    return {camera: round(min(item[camera] for item in measured), 2) for camera in measured[0]}


def main() -> None:
    """Run the stage from the command line."""
    parser = stage_parser(__doc__, Settings)
    parser.add_argument(
        "--inputs",
        type=Path,
        nargs="+",
        required=True,
        help="manifests of replayed shards, in order",
    )
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="manifest to write; the dataset is made beside it",
    )
    parser.add_argument("--workers", type=int, default=1, help="processes (default: 1)")
    arguments = parser.parse_args()
    dataset(
        settings_from(arguments, Settings),
        arguments.inputs,
        arguments.output,
        workers=arguments.workers,
    )


if __name__ == "__main__":
    run(main)
