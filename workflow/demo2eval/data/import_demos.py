"""Imports one shard of demos from trajectory files that were not planned here.

In:  ManiSkill trajectory files, .h5 with the .json beside each.
Out: trajectory.h5 and trajectory.json beside the manifest, with the demos of the shard.

Every trajectory of the shard is validated first (`demo2eval.data.validate`).
"""

import json
from collections.abc import Sequence
from pathlib import Path

from demo2eval.cli import run
from demo2eval.config import OnInvalid
from demo2eval.data.trajectory import UNREADABLE, read_metadata
from demo2eval.data.validate import ValidatedFile, apply_on_invalid, validate_files
from demo2eval.errors import UserError
from demo2eval.provenance import StageJob, require_room, run_stage, write_atomic
from demo2eval.robots import Robot


def import_demos(
    sources: list[Path],
    output: Path,
    *,
    task: str,
    robot: Robot,
    first_demo: int = 0,
    num_demos: int | None = None,
    on_invalid: OnInvalid = "error",
) -> None:
    """Import a shard of the demos of trajectory files.

    Args:
        sources: trajectory files, .h5.
        output: manifest to write, .../shard-000/manifest.json.
        task: ManiSkill's environment id, such as PushCube-v1.
        robot: ManiSkill's robot.
        first_demo: the shard's first, counted over all files.
        num_demos: demos of the shard; null: all from the first on.
        on_invalid: error: stop if a demo is invalid. skip: leave it out and name it in the
            manifest.

    Raises:
        UserError: lists everything that is wrong with the demos; or if there are not so many.
    """
    settings = {
        "task": task,
        "robot": robot,
        "first_demo": first_demo,
        "num_demos": num_demos,
        "on_invalid": on_invalid,
    }
    inputs = {
        "trajectories": sources,
        "metadata": [source.with_suffix(".json") for source in sources],
    }
    with run_stage(
        output, stage="import_demos", module=__spec__.name, settings=settings, inputs=inputs
    ) as job:
        if job.reused:
            return
        files = validate_files(
            sources,
            task=task,
            robot=robot,
            entries=select_entries(sources, first_demo, num_demos),
        )
        skipped = apply_on_invalid(files, on_invalid)
        _publish(job, files, skipped)


def select_entries(
    sources: Sequence[Path], first_demo: int, num_demos: int | None
) -> list[slice] | None:
    """Return for each file which entries of its .json belong to the shard; None: all.

    Raises:
        UserError: if there are not so many.
    """
    try:
        counts = [len(read_metadata(source)["episodes"]) for source in sources]
    except UNREADABLE:  # said when it is validated
        return None
    end = sum(counts) if num_demos is None else first_demo + num_demos
    if end > sum(counts) or first_demo >= end:
        raise UserError(
            f"{', '.join(map(str, sources))}: there are {sum(counts)} demonstrations, fewer than "
            f"asked for; lower demos.num_demos, or set it to all."
        )
    begins = [sum(counts[:index]) for index in range(len(counts))]
    return [slice(max(0, first_demo - begin), max(0, end - begin)) for begin in begins]


def _publish(job: StageJob, files: Sequence[ValidatedFile], skipped: list[dict]) -> None:
    """Copy the demos of all files beside the manifest, numbered from 0, and finish the job."""
    import h5py

    names = ("trajectory.h5", "trajectory.json")
    trajectories, metadata = (job.partial / name for name in names)
    episodes, seeds = [], []
    require_room(job.partial, 0)
    with h5py.File(trajectories, "w") as copy:
        for file in files:
            with h5py.File(file.path, "r") as content:
                for demo, entry in zip(file.demos, file.episodes, strict=True):
                    number = len(episodes)
                    require_room(job.partial, count_bytes(content[demo.name]))
                    content.copy(demo.name, copy, f"traj_{number}")
                    copy.flush()
                    episodes.append(entry | {"episode_id": number})
                    seeds.append(demo.seed)
    write_atomic(metadata, json.dumps(files[0].metadata | {"episodes": episodes}, indent=1))
    job.finish(
        job.publish(*names),
        demos=len(seeds),
        seeds=seeds,
        skipped=skipped,
        trajectories={str(file.path): [demo.name for demo in file.demos] for file in files},
    )


def count_bytes(group) -> int:
    """Return how many bytes the arrays below an HDF5 group have in memory."""
    sizes: list[int] = []
    group.visititems(lambda _, item: sizes.append(getattr(item, "nbytes", 0)))
    return sum(sizes)


if __name__ == "__main__":
    run(import_demos)
