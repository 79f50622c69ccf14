"""Makes a LeRobot v3.0 dataset of finished shards: their files, and meta/ by LeRobot's own writer.

The statistics are exact: quantiles are those of all values, which LeRobot's own are not.
"""

import os
import shutil
from pathlib import Path

import numpy as np

from demo2eval.data.lerobot_reader import FRAME_AGE, IMAGE_PREFIX, to_array
from demo2eval.data.lerobot_writer import KEY_FRAME_INTERVAL, PRESET, Shard, ShardFormat

FILES_PER_CHUNK = 1000
PERCENTILES = (1, 10, 50, 90, 99)


def assemble_dataset(
    partial: Path,
    shards: list[Shard],
    features: dict,
    shard_format: ShardFormat,
    prompt: str,
) -> dict[str, int]:
    """Make the dataset at `partial`/lerobot from the finished shards in `partial`.

    Args:
        features: LeRobot's, without those that it adds itself.

    Returns:
        counts of episodes, frames, and images per camera (a repeated one counts once).
    """
    from lerobot.datasets.io_utils import write_info, write_stats

    root = partial / "lerobot"
    shutil.rmtree(root, ignore_errors=True)
    meta = _create_metadata(root, features, shard_format, prompt)
    _link_files(meta, root, partial, shards, shard_format)
    if shard_format.video_crf is not None:
        _add_video_info(meta, shard_format)
    columns, histograms = [], []
    for shard in shards:
        shard_columns, shard_histograms = _read_shard(
            partial / shard.folder_name, shard_format.cameras
        )
        _save_episodes(meta, shard, shard_columns, shard_histograms, shard_format, prompt)
        columns.append(shard_columns)
        histograms.append(
            {camera: counts.sum(axis=0) for camera, counts in shard_histograms.items()}
        )
    meta.finalize()
    all_columns = {name: np.concatenate([item[name] for item in columns]) for name in columns[0]}
    all_histograms = {
        camera: np.sum([item[camera] for item in histograms], axis=0)
        for camera in shard_format.cameras
    }
    write_info(meta.info, root)
    write_stats(compute_stats(all_columns, all_histograms), root)
    return {
        "episodes": meta.total_episodes,
        "frames": meta.total_frames,
        "images": int((all_columns[FRAME_AGE] == 0).sum()),
    }


def _create_metadata(root: Path, features: dict, shard_format: ShardFormat, prompt: str):
    """Return LeRobot's writer of meta/ for a new dataset."""
    from lerobot.datasets.dataset_metadata import LeRobotDatasetMetadata

    meta = LeRobotDatasetMetadata.create(
        "demo2eval/dataset",
        shard_format.fps,
        features,
        robot_type="panda",
        root=root,
        use_videos=shard_format.video_crf is not None,
    )
    meta.save_episode_tasks([prompt])
    return meta


def _add_video_info(meta, shard_format: ShardFormat) -> None:
    """Say in the features how the videos, which lie in their places, are encoded."""
    from lerobot.configs.video import VideoEncoderConfig

    encoder = VideoEncoderConfig(
        vcodec="h264",
        pix_fmt="yuv444p",
        g=KEY_FRAME_INTERVAL,
        crf=shard_format.video_crf,
        preset=PRESET,
    )
    meta.update_video_info(video_encoder=encoder)


def _file_index(shard: Shard) -> dict[str, int]:
    """Return LeRobot's chunk and file number of a shard's files."""
    return {
        "chunk_index": shard.index // FILES_PER_CHUNK,
        "file_index": shard.index % FILES_PER_CHUNK,
    }


def _link_files(
    meta, root: Path, partial: Path, shards: list[Shard], shard_format: ShardFormat
) -> None:
    """Give the shards' files a second name in the dataset; a killed job needs the first."""
    for shard in shards:
        folder = partial / shard.folder_name
        names = {folder / "data.parquet": meta.data_path.format(**_file_index(shard))}
        if shard_format.video_crf is not None:
            for camera in shard_format.cameras:
                key = IMAGE_PREFIX + camera
                path = meta.video_path.format(video_key=key, **_file_index(shard))
                names[folder / f"{camera}.mp4"] = path
        for source, name in names.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            try:
                os.link(source, root / name)
            except OSError:
                # Some network file systems have no hard links.
                shutil.copy(source, root / name)


def _read_shard(
    folder: Path, cameras: tuple[str, ...]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return the numeric columns and, by camera, the histograms [demos, 3, 256] of a shard."""
    import pyarrow.parquet as pq

    names = pq.read_schema(folder / "data.parquet").names
    numeric = [name for name in names if not name.startswith(IMAGE_PREFIX)]
    table = pq.read_table(folder / "data.parquet", columns=numeric)
    columns = {name: to_array(table.column(name)) for name in numeric}
    return columns, {camera: np.load(folder / f"histogram_{camera}.npy") for camera in cameras}


def _save_episodes(
    meta,
    shard: Shard,
    columns: dict[str, np.ndarray],
    histograms: dict[str, np.ndarray],
    shard_format: ShardFormat,
    prompt: str,
) -> None:
    """Enter a shard's episodes: their statistics, and where their rows and video frames are."""
    index, fps, start = _file_index(shard), shard_format.fps, 0
    for number, length in enumerate(shard.lengths):
        entry: dict = {f"data/{key}": value for key, value in index.items()}
        if shard_format.video_crf is not None:
            for camera in shard_format.cameras:
                prefix = f"videos/{IMAGE_PREFIX}{camera}"
                entry |= {f"{prefix}/{key}": value for key, value in index.items()}
                entry |= {
                    f"{prefix}/from_timestamp": start / fps,
                    f"{prefix}/to_timestamp": (start + length) / fps,
                }
        rows = {name: values[start : start + length] for name, values in columns.items()}
        stats = compute_stats(
            rows, {camera: counts[number] for camera, counts in histograms.items()}
        )
        meta.save_episode(shard.first_episode + number, length, [prompt], stats, entry)
        start += length


def compute_stats(
    columns: dict[str, np.ndarray], histograms: dict[str, np.ndarray]
) -> dict[str, dict[str, np.ndarray]]:
    """Return LeRobot's statistics of some rows.

    Args:
        columns: {name: [rows] or [rows, dim]}.
        histograms: {camera: int64 [3, 256]}, how often each channel has each value.
    """
    images = int((columns[FRAME_AGE] == 0).sum())
    stats = {name: column_stats(values) for name, values in columns.items()}
    for camera, counts in histograms.items():
        stats[IMAGE_PREFIX + camera] = image_stats(counts) | {"count": np.array([images])}
    return stats


def column_stats(values: np.ndarray) -> dict[str, np.ndarray]:
    """Return the statistics of a column [rows] or [rows, dim]."""
    values = values.astype(np.float64).reshape(len(values), -1)
    quantiles = np.quantile(values, [percent / 100 for percent in PERCENTILES], axis=0)
    stats = {
        "min": values.min(axis=0),
        "max": values.max(axis=0),
        "mean": values.mean(axis=0),
        "std": values.std(axis=0),
        "count": np.array([len(values)]),
    }
    return stats | {
        f"q{percent:02d}": row for percent, row in zip(PERCENTILES, quantiles, strict=True)
    }


def image_stats(counts: np.ndarray) -> dict[str, np.ndarray]:
    """Return the statistics, [3, 1, 1] in units of full brightness, of a histogram [3, 256]."""
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
    for percent in PERCENTILES:
        reached = cumulative >= percent / 100 * total[:, None]
        stats[f"q{percent:02d}"] = values[np.argmax(reached, axis=1)]
    return {name: value.reshape(3, 1, 1) for name, value in stats.items()}
