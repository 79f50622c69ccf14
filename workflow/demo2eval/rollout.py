"""Rollouts of one checkpoint: one episode on each of a fixed list of seeds.

In:  the manifest of a checkpoint, and that of the dataset, whose demonstrations' seeds must not be among those evaluated.
Out: <output without .json>/episodes.csv, one row an episode: seed, success_once, success_at_end, first_success_step, steps, looks.

Pictures are rendered only when the policy looks. The noise of a look depends on policy seed, episode seed and look number alone, so
the number of workers changes the time and not what a policy is given. Finished episodes outlive a killed process.
"""

import csv
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from demo2eval.cli import option, run, settings_from, stage_parser
from demo2eval.description import PolicyDescription, read_description
from demo2eval.errors import UserError
from demo2eval.manifest import Work, making, read_manifest
from demo2eval.maniskill.worker import EpisodeResult, EpisodeSettings, play, without_film

COLUMNS = ("seed", "success_once", "success_at_end", "first_success_step", "steps", "looks")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the episodes, given the checkpoint."""

    task: str = option("ManiSkill task, such as PushCube-v1")
    episodes: int = option("episodes, each on its own seed", 100)
    first_seed: int = option("seed of the first episode; the next ones follow", 0)
    max_episode_steps: int = option("control steps of every episode; longer than the demonstrations")
    replan_interval: int = option("actions executed before the next look", 5)
    flow_steps: int = option("Euler steps from noise to actions", 10)
    policy_seed: int = option("seed of the policy's noise", 0)

    @property
    def seeds(self) -> list[int]:
        """The seed of every episode, in order."""
        return list(range(self.first_seed, self.first_seed + self.episodes))


def episode_settings(settings: Settings, description: PolicyDescription, film: bool = False) -> EpisodeSettings:
    """Return what the simulators need, as the policy was trained.

    Raises:
        UserError: if the policy is of another task, or predicts fewer actions than are to be executed.
    """
    if description.task != settings.task:
        raise UserError(
            f"the checkpoint is a policy for {description.task}, not for {settings.task}; evaluate it on its own task."
        )
    horizon = description.config.action_horizon
    if settings.replan_interval > horizon:
        raise UserError(
            f"the replan interval {settings.replan_interval} is longer than the policy's {horizon} actions; lower it."
        )
    return EpisodeSettings(
        task=settings.task,
        control_mode=description.control_mode,
        cameras=tuple(sorted(set(description.cameras.values()))),
        image_size=description.image_size_rendered,
        state=tuple(description.state),
        max_episode_steps=settings.max_episode_steps,
        replan_interval=settings.replan_interval,
        film=film,
    )


class Answerer:
    """Answers the looks of simulators with a checkpoint's policy."""

    def __init__(self, checkpoint: Path, settings: Settings, batch_size: int):
        """Take the checkpoint's folder; it is loaded by `prepare`."""
        self._checkpoint, self._settings, self._batch_size = checkpoint, settings, batch_size
        self._policy = None

    def prepare(self) -> None:
        """Load the policy, while the simulators start."""
        from demo2eval.policy import Policy

        self._policy = Policy(self._checkpoint, batch_size=self._batch_size, flow_steps=self._settings.flow_steps)

    def __call__(self, looks: list[tuple[int, int, dict]]):
        """Return the actions of looks (seed, look number, observation), float32 [n, horizon, action width]."""
        noise = [self._policy.noise(self._settings.policy_seed, seed, number) for seed, number, _ in looks]
        return self._policy.act([observation for _, _, observation in looks], noise)


def check_seeds(settings: Settings, dataset: Path) -> None:
    """Raise a UserError if a demonstration of the dataset has a seed that is to be evaluated."""
    shared = sorted(set(settings.seeds) & set(read_manifest(dataset)["facts"]["seeds"]))
    if shared:
        raise UserError(
            f"{len(shared)} evaluation seeds, {shared[0]} among them, were used by demonstrations of {dataset}; "
            f"move evaluation.first_seed, or the policy is tested on what it was shown."
        )


def read_finished(file: Path) -> dict[int, dict]:
    """Return the finished episodes by seed that a killed process left; a row that was cut is dropped."""
    if not file.exists():
        return {}
    with open(file, newline="") as source:
        rows = [row for row in csv.DictReader(source) if None not in row.values() and row["looks"]]
    return {int(row["seed"]): row for row in rows}


def row_of(result: EpisodeResult) -> dict:
    """Return an episode as a row of episodes.csv."""
    row = without_film(result)
    never = row["first_success_step"] is None
    return {
        **row,
        "success_once": int(row["success_once"]),
        "success_at_end": int(row["success_at_end"]),
        "first_success_step": "" if never else row["first_success_step"],
    }


def rollout(settings: Settings, checkpoint: Path, dataset: Path, output: Path, *, workers: int = 1) -> None:
    """Evaluate the checkpoint of a manifest and write the manifest `output`.

    Args:
        checkpoint, dataset: manifests.
        workers: simulator processes.

    Raises:
        UserError: if evaluation seeds were demonstrated, or the checkpoint does not fit the task.
    """
    inputs = {"checkpoint": checkpoint, "dataset": dataset}
    with making(output, stage="rollout", module=__spec__.name, settings=settings, inputs=inputs) as work:
        if not work.finished:
            check_seeds(settings, dataset)
            _make(settings, checkpoint, work, workers)


def _make(settings: Settings, checkpoint: Path, work: Work, workers: int) -> None:
    from tqdm import tqdm

    payload = checkpoint.with_suffix("")
    simulators = episode_settings(settings, read_description(payload))
    partial = work.partial / "episodes.csv"
    finished = read_finished(partial)
    left = [seed for seed in settings.seeds if seed not in finished]
    started = time.monotonic()
    with open(partial, "a", newline="") as file, tqdm(total=len(left), unit="episode", mininterval=2, desc="rollouts") as bar:
        table = csv.DictWriter(file, COLUMNS)
        if not finished:
            file.seek(0)
            file.truncate()
            table.writeheader()
        successes = sum(int(row["success_once"]) for row in finished.values())
        for result in play(simulators, left, workers, Answerer(payload, settings, workers)):
            finished[result.seed] = row_of(result)
            table.writerow(finished[result.seed])
            file.flush()
            successes += result.success_once
            bar.update(1)
            bar.set_postfix(success=f"{successes}/{len(finished)}", refresh=False)
    target = work.output.with_suffix("") / "episodes.csv"
    target.parent.mkdir(exist_ok=True)
    write_episodes(target, [finished[seed] for seed in settings.seeds])
    print(f"{len(left)} episodes in {time.monotonic() - started:.0f} s", file=sys.stderr)
    facts = read_manifest(checkpoint)["facts"]
    work.finish(
        [target],
        step=facts["step"],
        successes=successes,
        checkpoint=read_manifest(checkpoint)["digest"],
        dataset=facts["dataset"],
    )


def write_episodes(file: Path, rows: list[dict]) -> None:
    """Write episodes.csv, whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    with open(temporary, "w", newline="") as target:
        table = csv.DictWriter(target, COLUMNS)
        table.writeheader()
        table.writerows(rows)
    os.replace(temporary, file)


def main() -> None:
    """Run the stage from the command line."""
    parser = stage_parser(__doc__, Settings)
    parser.add_argument("--checkpoint", type=Path, required=True, help="manifest of the checkpoint")
    parser.add_argument("--dataset", type=Path, required=True, help="manifest of the dataset that it was trained on")
    parser.add_argument("--output", type=Path, required=True, help="manifest to write, <run>/rollouts/<step>.json")
    parser.add_argument("--workers", type=int, default=1, help="simulator processes (default: 1)")
    arguments = parser.parse_args()
    settings = settings_from(arguments, Settings)
    rollout(settings, arguments.checkpoint, arguments.dataset, arguments.output, workers=arguments.workers)


if __name__ == "__main__":
    run(main)
