"""Rollouts of one checkpoint: one episode on each of a fixed list of seeds.

In:  the manifest of a checkpoint, and that of its dataset, whose demonstrations' seeds must not be
     among those evaluated.
Out: <output without .json>.csv, a row per episode: seed, success_once, success_at_end,
     first_success_step (empty without success), steps, policy_calls, the furthest milestone, and
     nearest_mm, how near the gripper came to the object.

Each episode starts in a fresh scene, and the noise of a policy call follows from policy seed,
episode seed and number of the call alone: `evaluation.num_workers` changes the time and not the
result. A process that is killed loses no finished episode.
"""

import csv
import io
import os
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

from demo2eval.checkpoints.policy_metadata import read_policy_metadata
from demo2eval.checkpoints.verify import verify_checkpoint
from demo2eval.cli import run
from demo2eval.config import Evaluation, Milestones, find_task
from demo2eval.errors import UserError
from demo2eval.evaluation.workers import (
    EpisodeResult,
    EpisodeSettings,
    Infer,
    PolicyCall,
    make_episode_settings,
    run_episodes,
)
from demo2eval.provenance import read_manifest, run_stage, write_atomic

COLUMNS = (
    "seed",
    "success_once",
    "success_at_end",
    "first_success_step",
    "steps",
    "policy_calls",
    "milestone",
    "nearest_mm",
)


def run_rollouts(
    checkpoint: Path,
    dataset: Path | None,
    output: Path,
    *,
    task: str | None = None,
    object: str | None = None,
    milestones: Milestones | None = None,
    evaluation: Evaluation = Evaluation(),
) -> None:
    """Evaluate a checkpoint.

    Args:
        checkpoint: manifest of the checkpoint.
        dataset: manifest of its dataset, to compare seeds; null: they are not compared.
        output: manifest to write, <run>/rollouts/<step>.json.
        task: ManiSkill's environment id; null: the checkpoint's.
        object: env attribute, the object that is manipulated; null: as config.yaml says.
        milestones: sub-goals of the task; null: as config.yaml says.
        evaluation: settings of the rollouts.

    Raises:
        UserError: if evaluation seeds were demonstrated, or the checkpoint does not fit the task.
    """
    task, object, milestones = find_task_facts(checkpoint, task, object, milestones)
    settings = {
        "task": task,
        "object": object,
        "milestones": milestones,
        "evaluation": evaluation,
    }
    inputs = {"checkpoint": checkpoint} | ({"dataset": dataset} if dataset else {})
    with run_stage(
        output,
        stage="rollout",
        module=__spec__.name,
        settings=settings,
        inputs=inputs,
        manifests_only=["dataset"],
    ) as job:
        if job.reused:
            return
        seeds = list_seeds(evaluation)
        if dataset:
            check_seeds(seeds, checkpoint, dataset)
        folder = verify_checkpoint(checkpoint, "params")
        policy = read_policy_metadata(folder)
        episode_settings = make_episode_settings(policy, task, object, milestones, evaluation)
        table, load = job.partial / "episodes.csv", policy_loader(folder, evaluation)
        started = time.monotonic()
        rows = run_remaining(episode_settings, seeds, evaluation.num_workers, load, table)
        print(f"{len(rows)} episodes in {time.monotonic() - started:.0f} s", file=sys.stderr)
        write_rows(job.partial / f"{output.stem}.csv", rows)
        tables = job.publish(f"{output.stem}.csv")
        manifest = read_manifest(checkpoint)
        job.finish(
            tables,
            kept=tables,
            step=manifest["metadata"]["step"],
            successes=sum(int(row["success_once"]) for row in rows),
            checkpoint=manifest["digest"],
            dataset=manifest["metadata"]["dataset"],
        )


def find_task_facts(
    checkpoint: Path, task: str | None, object: str | None, milestones: Milestones | None
) -> tuple[str, str, Milestones]:
    """Return task, object and milestones; what is None is the checkpoint's, or its task's.

    Raises:
        UserError: if the configuration does not have the task.
    """
    task = task or read_policy_metadata(checkpoint.with_suffix("")).task
    if object is None or milestones is None:
        facts = find_task(task)
        object, milestones = object or facts.object, milestones or facts.milestones
    return task, object, milestones


def list_seeds(evaluation: Evaluation) -> range:
    """Return the seed of each episode."""
    return range(evaluation.first_seed, evaluation.first_seed + evaluation.num_episodes)


def check_seeds(seeds: Iterable[int], checkpoint: Path, dataset: Path) -> None:
    """Raise a UserError if an evaluation seed is that of a demonstration.

    Args:
        checkpoint, dataset: manifests; the dataset must be the checkpoint's.
    """
    content = read_manifest(dataset)
    if read_manifest(checkpoint)["metadata"]["dataset"] != content["digest"]:
        raise UserError(
            f"{checkpoint} was not trained on {dataset}; give the manifest of its own dataset."
        )
    shared = sorted(set(seeds) & set(content["metadata"]["seeds"]))
    if shared:
        raise UserError(
            f"{len(shared)} evaluation seeds, {shared[0]} among them, are those of demonstrations "
            f"in {dataset}; move evaluation.first_seed, or the policy is tested on what it was "
            "shown."
        )


def policy_loader(checkpoint: Path, evaluation: Evaluation) -> Callable[[], Infer]:
    """Return a function that loads and compiles the policy in a checkpoint's folder."""

    def load() -> Infer:
        # JAX would take most of a GPU's memory, on which the env renders too.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        from demo2eval.evaluation.policy import Policy

        policy = Policy(checkpoint, num_steps=evaluation.num_steps)
        policy.compile()

        def infer(calls: list[PolicyCall]):
            noise = [
                policy.draw_noise(evaluation.policy_seed, call.seed, call.index) for call in calls
            ]
            return policy.infer([call.observation for call in calls], noise)

        return infer

    return load


def run_remaining(
    settings: EpisodeSettings,
    seeds: Iterable[int],
    num_workers: int,
    load_policy: Callable[[], Infer],
    table: Path,
) -> list[dict]:
    """Run the episodes that a table lacks; return the rows of all, in the order of `seeds`.

    Args:
        table: CSV file, to which each episode is added when it is finished.
    """
    from tqdm import tqdm

    rows = read_rows(table)
    write_rows(table, rows.values())
    remaining = [seed for seed in seeds if seed not in rows]
    bar = tqdm(
        initial=len(rows),
        total=len(rows) + len(remaining),
        unit="episode",
        mininterval=2,
        desc="rollouts",
    )
    with open(table, "a", newline="") as file, bar:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        for result in run_episodes(settings, remaining, num_workers, load_policy):
            rows[result.seed] = to_row(result)
            writer.writerow(rows[result.seed])
            file.flush()
            successes = sum(int(row["success_once"]) for row in rows.values())
            bar.set_postfix(success=f"{successes}/{len(rows)}", refresh=False)
            bar.update(1)
    return [rows[seed] for seed in seeds]


def to_row(result: EpisodeResult) -> dict[str, object]:
    """Return an episode as a row of the table: whole numbers, and 1 for true."""
    first = result.first_success_step
    return {
        "seed": result.seed,
        "success_once": int(result.success_once),
        "success_at_end": int(result.success_at_end),
        "first_success_step": "" if first is None else first,
        "steps": result.steps,
        "policy_calls": result.policy_calls,
        "milestone": result.milestone,
        "nearest_mm": round(1000 * result.nearest, 1),
    }


def read_rows(table: Path) -> dict[int, dict]:
    """Return the rows of finished episodes by seed; a line that a kill has cut is dropped."""
    if not table.exists():
        return {}
    lines = [line for line in table.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return {int(row["seed"]): row for row in csv.DictReader(lines)}


def write_rows(table: Path, rows: Iterable[dict]) -> None:
    """Write a table of episodes, whole or not at all."""
    text = io.StringIO()
    writer = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomic(table, text.getvalue())


if __name__ == "__main__":
    run(run_rollouts)
