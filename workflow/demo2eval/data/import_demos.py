"""Takes demonstrations from a trajectory file of the user's.

In:  a ManiSkill trajectory file, .h5 with its .json beside it, of any of the six tasks.
Out: trajectory.h5 and trajectory.json beside the manifest, with the first `count` demonstrations, or all if there are fewer.

Every trajectory is read and checked. If anything is wrong nothing is written, or bad demonstrations are left out (`on_invalid`).
"""

import json
from dataclasses import dataclass
from pathlib import Path

from demo2eval.cli import option, run, settings_from, stage_parser
from demo2eval.data.trajectory import sound_demonstrations
from demo2eval.provenance import run_stage, write_atomic


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Which demonstrations to take."""

    task: str = option("ManiSkill task of the demonstrations, such as PushCube-v1")
    count: int = option("demonstrations to take")
    on_invalid: str = option("refuse the file if a demonstration is bad, or skip it", "error")


def copy_demonstrations(source: Path, settings: Settings, folder: Path) -> dict:
    """Check `source` and copy its first demonstrations into `folder`; return their seeds and what was left out.

    Raises:
        UserError: lists everything that is wrong with the file.
    """
    import h5py

    from demo2eval.data.hdf5 import NewFile

    demonstrations, description, skipped = sound_demonstrations(
        source, settings.task, settings.on_invalid
    )
    episodes = description["episodes"][: settings.count]
    with h5py.File(source, "r") as content, NewFile(folder / "trajectory.h5") as file:
        for episode in episodes:
            content.copy(f"traj_{episode['episode_id']}", file)
    write_atomic(
        folder / "trajectory.json", json.dumps(description | {"episodes": episodes}, indent=1)
    )
    kept = demonstrations[: settings.count]
    seeds = [demonstration.seed for demonstration in kept]
    return {
        "demonstrations": len(kept),
        "found": len(demonstrations),
        "seeds": seeds,
        "skipped": skipped,
    }


def import_demos(settings: Settings, source: Path, output: Path) -> None:
    """Import demonstrations from the file `source` and write the manifest `output`."""
    inputs = {"trajectories": source, "description": source.with_suffix(".json")}
    with run_stage(
        output, stage="import_demos", module=__spec__.name, settings=settings, inputs=inputs
    ) as job:
        if job.reused:
            return
        facts = copy_demonstrations(source, settings, job.partial)
        for name in ("trajectory.h5", "trajectory.json"):
            (job.partial / name).replace(job.folder / name)
        job.finish(
            [job.folder / "trajectory.h5", job.folder / "trajectory.json"],
            source=str(source),
            **facts,
        )


def main() -> None:
    """Run the stage from the command line."""
    parser = stage_parser(__doc__, Settings)
    parser.add_argument("--input", type=Path, required=True, help="trajectory file, .h5")
    parser.add_argument(
        "--output", type=Path, required=True, help="manifest to write, .../shard-000/manifest.json"
    )
    arguments = parser.parse_args()
    import_demos(settings_from(arguments, Settings), arguments.input, arguments.output)


if __name__ == "__main__":
    run(main)
