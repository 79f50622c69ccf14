"""Imports demos from a trajectory file of the user's.

In:  a ManiSkill trajectory file, .h5 with its .json beside it.
Out: trajectory.h5 and trajectory.json beside the manifest, with the first `num_demos` demos, or all
     if there are fewer.

Every trajectory is validated first (`demo2eval.data.validate`).
"""

import json
from pathlib import Path

from demo2eval.cli import run
from demo2eval.config import OnInvalid
from demo2eval.data.validate import apply_on_invalid, validate_files
from demo2eval.provenance import StageJob, require_room, run_stage, write_atomic
from demo2eval.robots import Robot


def import_demos(
    source: Path,
    output: Path,
    *,
    task: str,
    robot: Robot,
    num_demos: int,
    on_invalid: OnInvalid = "error",
) -> None:
    """Import demos from a trajectory file.

    Args:
        source: trajectory file, .h5.
        output: manifest to write, .../shard-000/manifest.json.
        task: ManiSkill's environment id, such as PushCube-v1.
        robot: ManiSkill's robot.
        num_demos: demos to import.
        on_invalid: error: stop if a demo is invalid. skip: leave it out and name it in the
            manifest.

    Raises:
        UserError: lists everything that is wrong with the file.
    """
    settings = {"task": task, "robot": robot, "num_demos": num_demos, "on_invalid": on_invalid}
    inputs = {"trajectories": source, "metadata": source.with_suffix(".json")}
    with run_stage(
        output, stage="import_demos", module=__spec__.name, settings=settings, inputs=inputs
    ) as job:
        if not job.reused:
            publish_demos(job, source, str(source), **settings)


def publish_demos(
    job: StageJob,
    path: Path,
    source: str,
    *,
    task: str,
    robot: Robot,
    num_demos: int,
    on_invalid: OnInvalid,
) -> None:
    """Validate a trajectory file, copy its first demos beside the manifest, and finish the job.

    Args:
        source: where the file is from, for the manifest.
    """
    import h5py

    (file,) = files = validate_files([path], task=task, robot=robot)
    skipped = apply_on_invalid(files, on_invalid)
    names = ("trajectory.h5", "trajectory.json")
    trajectories, metadata = (job.partial / name for name in names)
    episodes = file.episodes[:num_demos]
    require_room(job.partial, 0)
    with h5py.File(path, "r") as content, h5py.File(trajectories, "w") as copy:
        for demo in file.demos[:num_demos]:
            require_room(job.partial, count_bytes(content[demo.name]))
            content.copy(demo.name, copy)
            copy.flush()
    write_atomic(metadata, json.dumps(file.metadata | {"episodes": episodes}, indent=1))
    seeds = [demo.seed for demo in file.demos[:num_demos]]
    job.finish(
        job.publish(*names),
        source=source,
        demos=len(seeds),
        found=len(file.demos),
        seeds=seeds,
        skipped=skipped,
    )


def count_bytes(group) -> int:
    """Return how many bytes the arrays below an HDF5 group have in memory."""
    sizes: list[int] = []
    group.visititems(lambda _, item: sizes.append(getattr(item, "nbytes", 0)))
    return sum(sizes)


if __name__ == "__main__":
    run(import_demos)
