"""Plans one shard of demonstrations with ManiSkill's motion planner.

In:  a task and the shard's first seed.
Out: trajectory.h5 and trajectory.json beside the manifest, in ManiSkill's own format: control mode pd_joint_pos, no observations, and
     exactly `count` demonstrations, all successful.

It runs in the planning environment (envs/planning), since mplib needs numpy 1. Seeds are tried upwards from the first; the manifest's
facts say which became demonstrations, which failed and why.
"""

import contextlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from demo2eval.cli import option, run, settings_from, stage_parser
from demo2eval.errors import UserError
from demo2eval.maniskill.env import limit_threads, make_environment
from demo2eval.maniskill.tasks import find_task
from demo2eval.provenance import run_stage

CONTROL_MODE = "pd_joint_pos"
ATTEMPTS_A_DEMONSTRATION = 20
PLANNER_STEPS = 400


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the demonstrations of a shard."""

    task: str = option("ManiSkill task, such as PushCube-v1")
    count: int = option("successful demonstrations to plan")
    first_seed: int = option("seed of the first attempt; the next ones follow", 0)


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Send what Python and C libraries print to nowhere; mplib prints from C++."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 1)
        os.dup2(nowhere.fileno(), 2)
    try:
        yield
    finally:
        for descriptor, number in zip(saved, (1, 2), strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


def attempt(environment, solve, seed: int) -> str:
    """Plan and execute one attempt; return "success" or why it failed."""
    try:
        result = solve(environment, seed=seed, debug=False, vis=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:100]
    if result == -1:
        return "no plan found"
    return "success" if bool(result[-1]["success"]) else "executed without success"


def recording_environment(task: str, folder: Path, file) -> tuple:
    """Return (an environment that records what is done in it into the open `file` and `folder`/trajectory.json, the planner)."""
    from mani_skill.examples.motionplanning.panda.run import MP_SOLUTIONS
    from mani_skill.utils.wrappers import record

    # ManiSkill would open a file of its own, and end in a segmentation fault where the disk is full.
    with mock.patch.object(record.h5py, "File", return_value=file):
        environment = record.RecordEpisode(
            make_environment(task, control_mode=CONTROL_MODE, max_episode_steps=PLANNER_STEPS),
            output_dir=str(folder),
            trajectory_name="trajectory",
            save_video=False,
            record_reward=False,
            save_on_reset=False,
            source_type="motionplanning",
            source_desc="ManiSkill's motion planning solution",
        )
    return environment, MP_SOLUTIONS[task]


def plan_trajectories(settings: Settings, folder: Path) -> dict:
    """Write trajectory.{h5,json} of `settings.count` demonstrations into `folder`; return seeds and failures.

    Raises:
        UserError: if the planner fails far more often than it should.
    """
    from tqdm import tqdm

    from demo2eval.data.hdf5 import NewFile

    seeds, failures = [], {}
    with NewFile(folder / "trajectory.h5") as file:
        with quiet():
            environment, solve = recording_environment(settings.task, folder, file)
        with tqdm(
            total=settings.count, unit="demo", mininterval=2, desc=f"planning {settings.task}"
        ) as bar:
            for seed in range(
                settings.first_seed, settings.first_seed + ATTEMPTS_A_DEMONSTRATION * settings.count
            ):
                with quiet():
                    outcome = attempt(environment, solve, seed)
                    environment.flush_trajectory(save=outcome == "success")
                file.check()
                if outcome == "success":
                    seeds.append(seed)
                    bar.update(1)
                else:
                    failures[seed] = outcome
                if len(seeds) == settings.count:
                    break
        environment.close()
    if len(seeds) < settings.count:
        raise UserError(
            f"the planner solved {settings.task} only {len(seeds)} times in {len(seeds) + len(failures)} attempts from seed "
            f"{settings.first_seed}; most often: {Counter(failures.values()).most_common(1)[0][0]}."
        )
    return {"seeds": seeds, "attempts": len(seeds) + len(failures), "failures": failures}


def plan(settings: Settings, output: Path) -> None:
    """Plan one shard and write its manifest."""
    find_task(settings.task)
    with run_stage(output, stage="plan", module=__spec__.name, settings=settings) as job:
        if job.reused:
            return
        shutil.rmtree(job.partial)
        facts = plan_trajectories(settings, job.partial)
        for name in ("trajectory.h5", "trajectory.json"):
            (job.partial / name).replace(job.folder / name)
        job.finish(
            [job.folder / "trajectory.h5", job.folder / "trajectory.json"],
            demonstrations=settings.count,
            **facts,
        )


def main() -> None:
    """Run the stage from the command line."""
    limit_threads()
    parser = stage_parser(__doc__, Settings)
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="manifest to write, .../shard-<number>/manifest.json",
    )
    arguments = parser.parse_args()
    plan(settings_from(arguments, Settings), arguments.output)


if __name__ == "__main__":
    run(main)
