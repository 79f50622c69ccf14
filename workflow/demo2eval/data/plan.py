"""Plans one shard of demos with ManiSkill's motion planner.

In:  a task and the shard's first seed.
Out: trajectory.h5 and trajectory.json beside the manifest, in ManiSkill's own format: control mode
     pd_joint_pos, no observations, exactly `num_demos` demos, all successful.

It runs in the planning environment (envs/planning), since mplib needs numpy 1. Seeds are tried
upwards from the first; the manifest's metadata says which became demos, which failed and why.
"""

import contextlib
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from demo2eval.cli import run
from demo2eval.errors import UserError
from demo2eval.maniskill.env import limit_threads, make_env
from demo2eval.provenance import require_room, run_stage
from demo2eval.robots import Robot

CONTROL_MODE = "pd_joint_pos"
ATTEMPTS_PER_DEMO = 20
MAX_EPISODE_STEPS = 400
DEMO_BYTES = 2**22
"""More than any demo without images takes."""


def plan_demos(
    output: Path, *, task: str, robot: Robot, num_demos: int, first_seed: int = 0
) -> None:
    """Plan one shard of demos.

    Args:
        output: manifest to write, .../shard-000/manifest.json.
        task: ManiSkill's environment id, such as PushCube-v1.
        robot: ManiSkill's robot.
        num_demos: successful demos to plan.
        first_seed: seed of the first attempt; the next ones follow.

    Raises:
        UserError: if there is no planner for the task, or it fails far more often than it should.
    """
    settings = {"task": task, "robot": robot, "num_demos": num_demos, "first_seed": first_seed}
    with run_stage(output, stage="plan", module=__spec__.name, settings=settings) as job:
        if job.reused:
            return
        shutil.rmtree(job.partial)
        seeds, failures = _plan(job.partial, task, robot, num_demos, first_seed)
        files = job.publish("trajectory.h5", "trajectory.json")
        attempts = len(seeds) + len(failures)
        job.finish(files, demos=num_demos, seeds=seeds, attempts=attempts, failures=failures)


def _plan(
    folder: Path, task: str, robot: Robot, num_demos: int, first_seed: int
) -> tuple[list[int], dict[int, str]]:
    """Write trajectory.{h5,json} into `folder`; return the seeds, and {seed: why it failed}."""
    from tqdm import tqdm

    solve = find_planner(task)
    seeds, failures = [], {}
    require_room(folder, DEMO_BYTES)
    with hide_output():
        env = make_recording_env(task, robot, folder)
    with tqdm(total=num_demos, unit="demo", mininterval=2, desc=f"planning {task}") as bar:
        for seed in range(first_seed, first_seed + ATTEMPTS_PER_DEMO * num_demos):
            require_room(folder, DEMO_BYTES)
            with hide_output():
                outcome = attempt(env, solve, seed)
                env.flush_trajectory(save=outcome == "success")
            if outcome == "success":
                seeds.append(seed)
                bar.update(1)
            else:
                failures[seed] = outcome
            if len(seeds) == num_demos:
                break
    env.close()
    if len(seeds) < num_demos:
        raise UserError(
            f"the planner solved {task} only {len(seeds)} times in {len(seeds) + len(failures)} "
            f"attempts from seed {first_seed}; most often: "
            f"{Counter(failures.values()).most_common(1)[0][0]}."
        )
    return seeds, failures


def find_planner(task: str) -> Callable[..., Any]:
    """Return ManiSkill's planner of a task.

    Raises:
        UserError: if it has none.
    """
    with hide_output():
        from mani_skill.examples.motionplanning.panda.run import MP_SOLUTIONS

    if task not in MP_SOLUTIONS:
        raise UserError(
            f"ManiSkill has no motion planner for {task!r}, only for {', '.join(MP_SOLUTIONS)}; "
            "set demos.source to published, or to a trajectory file of your own."
        )
    return MP_SOLUTIONS[task]


def make_recording_env(task: str, robot: Robot, folder: Path):
    """Return an env that records what is done in it into `folder`/trajectory.{h5,json}."""
    from mani_skill.utils.wrappers.record import RecordEpisode

    env = make_env(
        task, robot=robot, control_mode=CONTROL_MODE, max_episode_steps=MAX_EPISODE_STEPS
    )
    return RecordEpisode(
        env,
        output_dir=str(folder),
        trajectory_name="trajectory",
        save_video=False,
        record_reward=False,
        save_on_reset=False,
        source_type="motionplanning",
        source_desc="ManiSkill's motion planning solution",
    )


def attempt(env, solve: Callable[..., Any], seed: int) -> str:
    """Plan and execute one attempt; return "success" or why it failed."""
    try:
        result = solve(env, seed=seed, debug=False, vis=False)
    except Exception as error:
        return f"{type(error).__name__}: {error}".splitlines()[0][:100]
    if result == -1:
        return "no plan found"
    return "success" if bool(result[-1]["success"]) else "executed without success"


@contextlib.contextmanager
def hide_output() -> Iterator[None]:
    """Hide what Python and C libraries print; mplib prints from C++."""
    sys.stdout.flush()
    sys.stderr.flush()
    saved = [os.dup(1), os.dup(2)]
    with open(os.devnull, "w") as devnull:
        os.dup2(devnull.fileno(), 1)
        os.dup2(devnull.fileno(), 2)
    try:
        yield
    finally:
        for descriptor, number in zip(saved, (1, 2), strict=True):
            os.dup2(descriptor, number)
            os.close(descriptor)


if __name__ == "__main__":
    limit_threads()
    run(plan_demos)
