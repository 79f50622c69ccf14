"""Rollouts of one checkpoint: one episode on each of a fixed list of seeds.

In:  the manifest of a checkpoint, and that of its dataset, whose demonstrations' seeds must not be among those evaluated.
Out: <output without .json>/episodes.csv, one row an episode: seed, success_once, success_at_end, first_success_step, steps, looks, the
     furthest stage of the task by the simulator's state, and how near, in millimeters, the gripper came to the object.

Pictures are rendered only when the policy looks. Each episode starts in a fresh scene, and the noise of a look follows from policy
seed, episode seed and look number alone, so the number of workers changes the time and not the result. Finished episodes outlive a
killed process.
"""

import csv
import io
import os
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from demo2eval.checkpoints.policy_metadata import PolicyMetadata, read_policy_metadata
from demo2eval.cli import option, run, settings_from, stage_parser
from demo2eval.errors import UserError
from demo2eval.evaluation.workers import EpisodeResult, EpisodeSettings, play
from demo2eval.provenance import Work, making, read_manifest, write_atomic

COLUMNS = (
    "seed",
    "success_once",
    "success_at_end",
    "first_success_step",
    "steps",
    "looks",
    "stage",
    "nearest_mm",
)


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What decides the episodes, given the checkpoint."""

    task: str = option("ManiSkill task, such as PushCube-v1")
    episodes: int = option("episodes, each on its own seed", 100)
    first_seed: int = option("seed of the first episode; the next ones follow", 0)
    max_episode_steps: int = option(
        "control steps of every episode; longer than the demonstrations"
    )
    replan_steps: int = option("actions executed before the next look", 5)
    num_steps: int = option("Euler steps from noise to actions", 10)
    policy_seed: int = option("seed of the policy's noise", 0)

    @property
    def seeds(self) -> list[int]:
        """The seed of every episode, in order."""
        return list(range(self.first_seed, self.first_seed + self.episodes))


def episode_settings(
    settings: Settings, description: PolicyMetadata, film: bool = False
) -> EpisodeSettings:
    """Return what the simulators need, as the policy was trained.

    Raises:
        UserError: if the policy is of another task, or predicts fewer actions than are to be executed, or a number is below 1.
    """
    for name in ("episodes", "max_episode_steps", "replan_steps", "num_steps"):
        if getattr(settings, name) < 1:
            raise UserError(
                f"evaluation.{name} is {getattr(settings, name)}; it must be at least 1."
            )
    if description.task != settings.task:
        raise UserError(
            f"the checkpoint is a policy for {description.task}, not for {settings.task}; evaluate it on its own task."
        )
    horizon = description.config.action_horizon
    if settings.replan_steps > horizon:
        raise UserError(
            f"the replan interval {settings.replan_steps} is longer than the policy's {horizon} actions; lower it."
        )
    return EpisodeSettings(
        task=settings.task,
        control_mode=description.control_mode,
        cameras=tuple(sorted(set(description.cameras.values()))),
        image_size=description.image_size,
        state=tuple(description.state),
        max_episode_steps=settings.max_episode_steps,
        replan_steps=settings.replan_steps,
        film=film,
    )


class Answerer:
    """Answers the looks of simulators with a checkpoint's policy."""

    def __init__(self, checkpoint: Path, settings: Settings):
        """Take the checkpoint's folder; it is loaded by `prepare`."""
        self._checkpoint, self._settings = checkpoint, settings
        self._policy = None

    def prepare(self) -> None:
        """Load and compile the policy, while the simulators start."""
        # JAX would take most of a GPU's memory at once, and the simulators render on the same one.
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        from demo2eval.evaluation.policy import Policy

        self._policy = Policy(self._checkpoint, num_steps=self._settings.num_steps)
        self._policy.compile()

    def __call__(self, looks: list[tuple[int, int, dict]]):
        """Return the actions of looks (seed, look number, observation), float32 [n, horizon, action width]."""
        noise = [
            self._policy.noise(self._settings.policy_seed, seed, number)
            for seed, number, _ in looks
        ]
        return self._policy.act([observation for _, _, observation in looks], noise)


def check_seeds(settings: Settings, checkpoint: Path, dataset: Path) -> None:
    """Raise a UserError if a demonstration that the checkpoint was trained on has a seed that is to be evaluated.

    Args:
        checkpoint, dataset: manifests; the dataset must be the checkpoint's.
    """
    content = read_manifest(dataset)
    if read_manifest(checkpoint)["facts"]["dataset"] != content["digest"]:
        raise UserError(
            f"{checkpoint} was not trained on {dataset}; give the manifest of its own dataset."
        )
    shared = sorted(set(settings.seeds) & set(content["facts"]["seeds"]))
    if shared:
        raise UserError(
            f"{len(shared)} evaluation seeds, {shared[0]} among them, were used by demonstrations of {dataset}; "
            f"move evaluation.first_seed, or the policy is tested on what it was shown."
        )


def read_finished(file: Path) -> dict[int, dict]:
    """Return the finished episodes by seed that a killed process left; a line that was cut is dropped."""
    if not file.exists():
        return {}
    lines = [line for line in file.read_text().splitlines(keepends=True) if line.endswith("\n")]
    return {int(row["seed"]): row for row in csv.DictReader(lines)}


def row_of(result: EpisodeResult) -> dict:
    """Return an episode as a row of episodes.csv: whole numbers, yes is 1; first_success_step is empty where success was never seen."""
    values = {column: getattr(result, column) for column in COLUMNS[:6]}
    numbers = {column: "" if value is None else int(value) for column, value in values.items()}
    return numbers | {"stage": result.stage, "nearest_mm": round(1000 * result.nearest, 1)}


def rollout(
    settings: Settings, checkpoint: Path, dataset: Path | None, output: Path, *, workers: int = 1
) -> None:
    """Evaluate the checkpoint of a manifest and write the manifest `output`.

    Args:
        checkpoint, dataset: manifests; without a dataset the evaluation seeds are not compared with the demonstrations'.
        workers: simulator processes.

    Raises:
        UserError: if evaluation seeds were demonstrated, or the checkpoint does not fit the task.
    """
    if workers < 1:
        raise UserError(f"--workers is {workers}; it must be at least 1.")
    inputs = {"checkpoint": checkpoint} | ({"dataset": dataset} if dataset else {})
    with making(
        output, stage="rollout", module=__spec__.name, settings=settings, inputs=inputs
    ) as work:
        if work.finished:
            return
        if dataset:
            check_seeds(settings, checkpoint, dataset)
        _make(settings, checkpoint, work, workers)


def _make(settings: Settings, checkpoint: Path, work: Work, workers: int) -> None:
    payload = checkpoint.with_suffix("")
    simulators = episode_settings(settings, read_policy_metadata(payload))
    started = time.monotonic()
    rows, played = _play_all(
        settings, simulators, Answerer(payload, settings), work.partial / "episodes.csv", workers
    )
    print(f"{played} episodes in {time.monotonic() - started:.0f} s", file=sys.stderr)
    target = work.output.with_suffix("") / "episodes.csv"
    target.parent.mkdir(exist_ok=True)
    write_episodes(target, rows)
    manifest = read_manifest(checkpoint)
    work.finish(
        [target],
        step=manifest["facts"]["step"],
        successes=sum(int(row["success_once"]) for row in rows),
        checkpoint=manifest["digest"],
        dataset=manifest["facts"]["dataset"],
    )


def _play_all(
    settings: Settings, simulators: EpisodeSettings, answerer: Answerer, partial: Path, workers: int
) -> tuple[list, int]:
    """Play what the file `partial` lacks, adding to it; return the rows of all episodes by seed, and how many were played now."""
    from tqdm import tqdm

    finished = read_finished(partial)
    left = [seed for seed in settings.seeds if seed not in finished]
    write_episodes(partial, list(finished.values()))
    bar = tqdm(
        total=settings.episodes,
        initial=len(finished),
        unit="episode",
        mininterval=2,
        desc="rollouts",
    )
    with open(partial, "a", newline="") as file, bar:
        table = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        successes = sum(int(row["success_once"]) for row in finished.values())
        for result in play(simulators, left, workers, answerer):
            finished[result.seed] = row_of(result)
            table.writerow(finished[result.seed])
            file.flush()
            successes += result.success_once
            bar.set_postfix(success=f"{successes}/{len(finished)}", refresh=False)
            bar.update(1)
    return [finished[seed] for seed in settings.seeds], len(left)


def write_episodes(file: Path, rows: list[dict]) -> None:
    """Write episodes.csv, whole or not at all."""
    text = io.StringIO()
    table = csv.DictWriter(text, COLUMNS, lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    write_atomic(file, text.getvalue())


def main() -> None:
    """Run the stage from the command line."""
    parser = stage_parser(__doc__, Settings)
    parser.add_argument("--checkpoint", type=Path, required=True, help="manifest of the checkpoint")
    parser.add_argument(
        "--dataset",
        type=Path,
        help="manifest of the dataset that it was trained on, to compare seeds",
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="manifest to write, <run>/rollouts/<step>.json"
    )
    parser.add_argument("--workers", type=int, default=1, help="simulator processes (default: 1)")
    arguments = parser.parse_args()
    settings = settings_from(arguments, Settings)
    rollout(
        settings,
        arguments.checkpoint,
        arguments.dataset,
        arguments.output,
        workers=arguments.workers,
    )


if __name__ == "__main__":
    run(main)
