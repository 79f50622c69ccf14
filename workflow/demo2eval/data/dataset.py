"""Makes a LeRobot dataset (format v3.0) from replayed demos; the official reader opens it.

In:  manifests of replayed shards, trajectory.h5 and trajectory.json beside each.
Out: lerobot/ beside the manifest, for `LeRobotDataset("demo2eval/<any name>", root=<that folder>)`.

A row is a control step: `action`, `observation.state`, `observation.images.<camera>` of all cameras
that were replayed, and `frame_age`, the steps since that image was rendered. Where not every step
was rendered, a row shows the newest image, as a slow camera would. The observation after the last
action has no row. Actions and states are those of the demos bit for bit, and so are PNG images.
Video (h264, 4:4:4) loses a little: the manifest has the measured PSNR.

Shards are written by separate processes. A job that was killed goes on with the unfinished shards.
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
from typing import Any

from demo2eval.cli import run
from demo2eval.config import Dataset, OnInvalid
from demo2eval.data.lerobot_metadata import assemble_dataset
from demo2eval.data.lerobot_reader import FRAME_AGE, IMAGE_PREFIX
from demo2eval.data.lerobot_writer import Shard, ShardFormat, write_shard
from demo2eval.data.trajectory import SENSORS, list_cameras, state_path
from demo2eval.data.validate import (
    Issue,
    ValidatedFile,
    apply_on_invalid,
    raise_issues,
    validate_replays,
)
from demo2eval.errors import UserError
from demo2eval.maniskill.env import CONTROL_FREQUENCY
from demo2eval.maniskill.observation import state_names
from demo2eval.provenance import StageJob, run_stage, write_atomic
from demo2eval.robots import ACTION_NAMES


@dataclass(frozen=True)
class Source:
    """The demos of one dataset.

    Attributes:
        image_shapes: {camera: (height, width, 3)}.
        state_dims: {part of the state: dim}.
    """

    shards: list[Shard]
    seeds: list[int]
    control_mode: str
    action_dim: int
    image_shapes: dict[str, tuple[int, int, int]]
    state_dims: dict[str, int]


def build_dataset(
    replays: list[Path],
    output: Path,
    *,
    prompt: str,
    num_demos: int | None = None,
    on_invalid: OnInvalid = "error",
    dataset: Dataset = Dataset(),
    num_workers: int = 1,
) -> None:
    """Make the dataset of replayed shards, in their order.

    Args:
        replays: manifests of replayed shards.
        output: manifest to write; the dataset is made beside it.
        prompt: the instruction, LeRobot's task.
        num_demos: take the first so many demos; null: all.
        on_invalid: error: stop if a demo is invalid. skip: leave it out and name it in the
            manifest.
        dataset: state and images.
        num_workers: processes; they change the time only.

    Raises:
        UserError: lists everything that is invalid, or unlike the first demo.
    """
    settings = {
        "prompt": prompt,
        "num_demos": num_demos,
        "on_invalid": on_invalid,
        "dataset": dataset,
    }
    with run_stage(
        output,
        stage="dataset",
        module=__spec__.name,
        settings=settings,
        inputs={"replays": replays},
    ) as job:
        if job.reused:
            return
        paths = [Path(replay).parent / "trajectory.h5" for replay in replays]
        files = validate_replays(paths, dataset.state, decode_images=on_invalid == "skip")
        skipped = apply_on_invalid(files, on_invalid)
        source = select_demos(files, num_demos, dataset.state)
        if num_demos is not None and len(source.seeds) < num_demos:
            print(f"only {len(source.seeds)} of {num_demos} demos exist", file=sys.stderr)
        remove_stale_shards(job.partial, skipped)
        features = make_features(dataset, source)
        shard_format = make_format(dataset, source, features)
        _write_all(source, shard_format, job.partial, num_workers)
        counts = assemble_dataset(job.partial, source.shards, features, shard_format, prompt)
        _publish(job, source, shard_format, counts, skipped)


def _write_all(source: Source, shard_format: ShardFormat, partial: Path, num_workers: int) -> None:
    from tqdm import tqdm

    issues, frames = [], sum(sum(shard.lengths) for shard in source.shards)
    with tqdm(total=frames, unit="frame", desc="dataset", mininterval=2) as bar:
        for shard, found in write_shards(source.shards, shard_format, partial, num_workers):
            issues += found
            bar.update(sum(shard.lengths))
    raise_issues(sorted(issues, key=str))


def _publish(
    job: StageJob,
    source: Source,
    shard_format: ShardFormat,
    counts: dict[str, int],
    skipped: list[dict],
) -> None:
    metadata: dict[str, Any] = counts | {
        "seeds": source.seeds,
        "control_mode": source.control_mode,
        "action_dim": source.action_dim,
        "state": shard_format.state,
        "cameras": shard_format.cameras,
        "fps": shard_format.fps,
        "skipped": skipped,
    }
    if shard_format.video_crf is not None:
        metadata["psnr_db"] = find_worst_psnr(source.shards, job.partial)
    job.finish(job.publish("lerobot"), **metadata)


# What is taken.


def select_demos(files: list[ValidatedFile], num_demos: int | None, state: list[str]) -> Source:
    """Return the first `num_demos` demos of all files, with their episodes and rows; None: all."""
    import h5py

    shards, selected, row = [], [], 0
    for index, file in enumerate(files):
        demos = file.demos[: None if num_demos is None else num_demos - len(selected)]
        if demos:
            names = tuple(demo.name for demo in demos)
            lengths = tuple(len(demo.actions) for demo in demos)
            shards.append(Shard(index, file.path, names, lengths, len(selected), row))
            row += sum(lengths)
        selected += demos
    with h5py.File(shards[0].source, "r") as content:
        group: Any = content[selected[0].name]
        image_shapes = {
            camera: group[f"{SENSORS}/{camera}/rgb"].shape[1:] for camera in list_cameras(group)
        }
        state_dims = {part: group[state_path(part)].shape[1] for part in state}
    return Source(
        shards,
        [demo.seed for demo in selected],
        selected[0].control_mode,
        selected[0].actions.shape[1],
        image_shapes,
        state_dims,
    )


def make_features(dataset: Dataset, source: Source) -> dict:
    """Return LeRobot's features, without those that it adds itself."""
    state = state_names(dataset.state, source.state_dims)
    action = ACTION_NAMES[source.control_mode]
    features = {
        "action": {"dtype": "float32", "shape": (len(action),), "names": action},
        "observation.state": {"dtype": "float32", "shape": (len(state),), "names": state},
        FRAME_AGE: {"dtype": "int64", "shape": (1,), "names": ["steps"]},
    }
    for camera, shape in source.image_shapes.items():
        features[IMAGE_PREFIX + camera] = {
            "dtype": "video" if dataset.image_storage == "video" else "image",
            "shape": tuple(shape),
            "names": ["height", "width", "channels"],
        }
    return features


def make_format(dataset: Dataset, source: Source, features: dict) -> ShardFormat:
    """Return how the shards are written, with the schema that LeRobot gives these features."""
    from lerobot.datasets.feature_utils import get_hf_features_from_features
    from lerobot.utils.constants import DEFAULT_FEATURES

    return ShardFormat(
        schema=get_hf_features_from_features(features | DEFAULT_FEATURES).arrow_schema,
        cameras=tuple(source.image_shapes),
        state=tuple(dataset.state),
        video_crf=dataset.video_crf if dataset.image_storage == "video" else None,
        fps=CONTROL_FREQUENCY,
    )


# How it is written.


def remove_stale_shards(partial: Path, skipped: list[dict]) -> None:
    """Remove unfinished shards, and all if the killed job skipped other demos: theirs differ."""
    note, content = partial / "skipped.json", json.dumps(skipped)
    same = note.exists() and note.read_text(encoding="utf-8") == content
    for folder in partial.glob("shard-*.*" if same else "shard-*"):
        shutil.rmtree(folder)
    write_atomic(note, content)


def write_shards(
    shards: list[Shard], shard_format: ShardFormat, partial: Path, num_workers: int
) -> Iterator[tuple[Shard, list[Issue]]]:
    """Write all shards and yield each when it is finished, with what is wrong with its images."""
    unfinished = []
    for shard in shards:
        if (partial / shard.folder_name).is_dir():
            yield shard, []
        else:
            unfinished.append(shard)
    if num_workers == 1 or len(unfinished) <= 1:
        for shard in unfinished:
            yield shard, write_shard(shard, shard_format, partial)
        return
    from multiprocessing import active_children

    crashed = []
    with ThreadPoolExecutor(num_workers) as pool:
        futures = {
            pool.submit(write_in_process, shard, shard_format, partial): shard
            for shard in unfinished
        }
        try:
            for future in as_completed(futures):
                if isinstance(future.exception(), BrokenProcessPool):
                    crashed.append(str(futures[future].source))
                else:
                    yield futures[future], future.result()
        except BaseException:
            # Nobody waits for unfinished shards.
            pool.shutdown(wait=False, cancel_futures=True)
            for process in active_children():
                process.terminate()
            raise
    if crashed:
        raise UserError(
            f"{', '.join(crashed)}: the process that wrote this shard of the dataset was killed or "
            "crashed (out of memory?); the other shards are finished, run the same command again, "
            "with fewer workers if memory is short."
        )


def write_in_process(shard: Shard, shard_format: ShardFormat, partial: Path) -> list[Issue]:
    """Write a shard in a process of its own: one that crashes takes no other shard along."""
    from multiprocessing import get_context

    with ProcessPoolExecutor(1, get_context("spawn"), end_with_parent) as process:
        return process.submit(write_shard, shard, shard_format, partial).result()


def end_with_parent() -> None:
    """Let a worker process end when the process that started it was killed."""
    from multiprocessing import connection, parent_process

    parent: Any = parent_process()

    def watch() -> None:
        connection.wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def find_worst_psnr(shards: list[Shard], partial: Path) -> dict[str, float]:
    """Return the lowest PSNR, dB, that was measured of each camera in any shard."""
    measured = [
        json.loads((partial / shard.folder_name / "psnr.json").read_text()) for shard in shards
    ]
    return {camera: round(min(item[camera] for item in measured), 2) for camera in measured[0]}


if __name__ == "__main__":
    run(build_dataset)
