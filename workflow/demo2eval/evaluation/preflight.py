"""What is wrong with data and settings, before a GPU is spent on training.

In:  the manifests of checkpoint 0, of the dataset and of its image cache.
Out: the manifest, with every finding.

Some demonstrations of the dataset are executed in the simulator, just as rollouts will be: same
env, seeds, control mode and number of steps, with the dataset's own actions in the policy's place.
They must succeed, and what the cameras and joints show first must be what the dataset shows first.
The norm stats of the checkpoint must be those of the data. An error stops the workflow before
training; a warning does not.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from demo2eval.checkpoints.policy_metadata import PolicyMetadata, find_assets, read_policy_metadata
from demo2eval.checkpoints.verify import verify_checkpoint
from demo2eval.cli import run
from demo2eval.config import Evaluation, Milestones
from demo2eval.data.chunks import chunk_rows, last_rows
from demo2eval.errors import UserError
from demo2eval.evaluation.workers import (
    EpisodeResult,
    Infer,
    PolicyCall,
    make_episode_settings,
    run_episodes,
)
from demo2eval.maniskill.env import CONTROL_FREQUENCY
from demo2eval.pi0.image import resize_with_pad
from demo2eval.pi0.normalize import NormStats, load_norm_stats, normalize
from demo2eval.pi0.transforms import delta_actions
from demo2eval.provenance import read_manifest, run_stage

NUM_DEMOS = 20
GOOD_SUCCESS = 0.9
NUM_IMAGES = 64
MAX_IMAGE_ERROR = 20.0
"""Mean absolute difference, of 255, above which two images show different things."""
MAX_STATE_ERROR = 0.02
"""Radians or meters."""
MAX_OUTSIDE = 0.1
"""Share of values outside the range that norm stats call 98 %."""
MIN_RANGE = 1e-3


@dataclass(frozen=True)
class Finding:
    """Something that is wrong (error) or may be (warning), with the way out."""

    level: Literal["error", "warning"]
    sentence: str


@dataclass(frozen=True)
class Data:
    """A dataset as training reads it, from an image cache.

    Attributes:
        episode: int64 [rows], state: float32 [rows, dim], action: float32 [rows, dim].
        sample_row: int64 [samples], the row of each image.
        images: {ManiSkill's camera: uint8 [samples, h, w, 3]}.
        metadata: of the dataset's manifest.
        prompt: the dataset's.
    """

    episode: np.ndarray
    state: np.ndarray
    action: np.ndarray
    sample_row: np.ndarray
    images: dict[str, np.ndarray]
    metadata: dict
    prompt: str

    @classmethod
    def read(cls, dataset: Path, image_cache: Path) -> "Data":
        """Read a cache and the manifest of its dataset."""
        folder, manifest = image_cache.parent, read_manifest(dataset)
        arrays = {
            name: np.load(folder / f"{name}.npy")
            for name in ("episode", "state", "action", "sample_row")
        }
        images = {
            camera: np.load(folder / f"images_{camera}.npy", mmap_mode="r")
            for camera in manifest["metadata"]["cameras"]
        }
        return cls(
            **arrays,
            images=images,
            metadata=manifest["metadata"],
            prompt=manifest["settings"]["prompt"],
        )

    def first_row(self, episode: int) -> int:
        """Return the first row of an episode."""
        return int(np.searchsorted(self.episode, episode))

    def actions_of(self, episode: int) -> np.ndarray:
        """Return the actions of an episode, float32 [steps, dim]."""
        return self.action[self.first_row(episode) : self.first_row(episode + 1)]


def check_before_training(
    checkpoint: Path,
    dataset: Path,
    image_cache: Path,
    output: Path,
    *,
    task: str,
    object: str,
    joint_perturbation: float = 0.0,
    evaluation: Evaluation = Evaluation(),
) -> None:
    """Look for what would make training or evaluation worthless.

    Args:
        checkpoint: manifest of checkpoint 0.
        dataset: manifest of the dataset.
        image_cache: manifest of its image cache.
        output: manifest to write, <run>/preflight.json.
        task: ManiSkill's environment id.
        object: env attribute, the object that is manipulated.
        joint_perturbation: of the replay, radians: so far are the dataset's joints from the demos'.
        evaluation: settings of the rollouts.

    Raises:
        UserError: lists what is wrong.
    """
    settings = {
        "task": task,
        "object": object,
        "joint_perturbation": joint_perturbation,
        "evaluation": evaluation,
    }
    inputs = {"checkpoint": checkpoint, "dataset": dataset, "image_cache": image_cache}
    with run_stage(
        output, stage="preflight", module=__spec__.name, settings=settings, inputs=inputs
    ) as job:
        if job.reused:
            return
        folder = verify_checkpoint(checkpoint, "params")
        policy, data = read_policy_metadata(folder), Data.read(dataset, image_cache)
        stats = load_norm_stats(find_assets(folder) / "norm_stats.json")
        findings = [
            *check_settings(policy, data, evaluation),
            *check_images(data),
            *check_norm_stats(policy, data, stats),
        ]
        rate = None
        if not any(finding.level == "error" for finding in findings):
            episode_settings = make_episode_settings(
                policy, task, object, Milestones(names=["success"]), evaluation
            )
            probe = Probe(data, evaluation.replan_steps)
            results = list(
                run_episodes(episode_settings, probe.seeds, evaluation.num_workers, probe.load)
            )
            rate = float(np.mean([result.success_once for result in results]))
            print(f"{len(results)} demonstrations executed, {rate:.0%} succeed")
            findings += check_episodes(
                probe, results, joint_perturbation, evaluation.min_demo_success
            )
        for finding in findings:
            print(f"{finding.level}: {finding.sentence}")
        if errors := [item.sentence for item in findings if item.level == "error"]:
            raise UserError("\n".join(errors))
        job.finish(
            [],
            digest=read_manifest(checkpoint)["digest"],
            warnings=[finding.sentence for finding in findings],
            demos=len(probe.seeds),
            success_of_demos=rate,
        )


def check_settings(policy: PolicyMetadata, data: Data, evaluation: Evaluation) -> Iterator[Finding]:
    """Yield where policy, dataset and evaluation contradict each other."""
    facts = {
        "prompt": (policy.prompt, data.prompt),
        "control mode": (policy.control_mode, data.metadata["control_mode"]),
        "number of action dimensions": (policy.action_dim, data.metadata["action_dim"]),
        "state": (list(policy.state), list(data.metadata["state"])),
        "control frequency": (CONTROL_FREQUENCY, data.metadata["fps"]),
    }
    for name, (ours, theirs) in facts.items():
        if ours != theirs:
            yield Finding(
                "error",
                f"the {name} is {theirs!r} in the dataset and {ours!r} in evaluation; make the "
                "dataset again with the run's settings.",
            )
    longest = float(np.quantile(np.bincount(data.episode), 0.95))
    limit = evaluation.max_episode_steps
    if longest > limit:
        yield Finding(
            "error",
            f"evaluation.max_episode_steps is {limit}, and of the demonstrations 5 % take "
            f"{longest:.0f} steps or more; raise it.",
        )
    elif longest > limit / 1.2:
        yield Finding(
            "warning",
            f"evaluation.max_episode_steps is {limit}, hardly more than the {longest:.0f} steps of "
            "the longest 5 % of the demonstrations; a policy is slower than they are.",
        )


def check_images(data: Data) -> Iterator[Finding]:
    """Yield the cameras that show nothing."""
    for camera, images in data.images.items():
        sample = np.asarray(images[:: max(1, len(images) // NUM_IMAGES)], np.float32)
        if sample.mean() < 3:
            yield Finding("error", f"the images of {camera} are black; replay the demos again.")
        elif sample.std(axis=0).max() < 2:
            yield Finding(
                "error",
                f"the images of {camera} are all the same; replay the demos again, or take another "
                "camera.",
            )


def check_norm_stats(
    policy: PolicyMetadata, data: Data, norm_stats: dict[str, NormStats]
) -> Iterator[Finding]:
    """Yield the dimensions whose values are not where the norm stats say that they are."""
    horizon = policy.config.action_horizon
    rows = data.sample_row
    actions = data.action[chunk_rows(rows, last_rows(data.episode), horizon)]
    if policy.delta_action_mask is not None:
        actions = delta_actions(actions, data.state[rows], policy.delta_action_mask)
    # 98 % of a normal distribution lie within 2.33 standard deviations.
    bound = 1.0 if policy.use_quantiles else 2.33
    for name, values in (("state", data.state), ("actions", actions)):
        stats = norm_stats[name]
        if stats.mean.shape[-1] != values.shape[-1]:
            yield Finding(
                "error",
                f"the norm stats have {stats.mean.shape[-1]} dimensions of {name}, and the dataset "
                f"{values.shape[-1]}; make them again from this dataset.",
            )
            continue
        scaled = normalize(values, stats, policy.use_quantiles).reshape(-1, values.shape[-1])
        values = values.reshape(-1, values.shape[-1])
        outside = (np.abs(scaled) > bound + 0.01).mean(axis=0)
        if outside.max() > MAX_OUTSIDE:
            yield Finding(
                "error",
                f"{outside.max():.0%} of the dataset's {name} in dimension {outside.argmax()} lie "
                "outside the range of the norm stats: they are another dataset's, or their columns "
                "are in another order; make them again from this dataset.",
            )
        moving = values.std(axis=0) > 0
        spread = np.quantile(scaled, 0.99, axis=0) - np.quantile(scaled, 0.01, axis=0)
        if moving.any() and spread[moving].max() < 0.2:
            yield Finding(
                "error",
                f"the dataset's {name} use less than a tenth of the norm stats' range in every "
                "dimension; the norm stats are another dataset's, make them again.",
            )
        narrow = moving & (np.ptp(values, axis=0) < MIN_RANGE) & (spread > 1)
        for dimension in np.flatnonzero(narrow):
            yield Finding(
                "warning",
                f"dimension {dimension} of {name} moves by less than {MIN_RANGE} and is scaled up "
                "to the whole range, noise and all; set actions.min_scale.",
            )


class Probe:
    """Demonstrations in the place of a policy.

    Attributes:
        seeds: of the demonstrations.
        first: {seed: the observation at the first policy call}, once they were executed.
        data: theirs.
    """

    def __init__(self, data: Data, replan_steps: int):
        """Choose the demonstrations, evenly over the dataset."""
        self.data, self._replan_steps = data, replan_steps
        seeds: Sequence[int] = data.metadata["seeds"]
        stride = max(1, len(seeds) // NUM_DEMOS)
        self._episodes = {
            seeds[episode]: episode for episode in range(0, len(seeds), stride)[:NUM_DEMOS]
        }
        self.seeds = list(self._episodes)
        self.first: dict[int, dict] = {}

    def load(self) -> Infer:
        """Return the function that answers policy calls."""
        return lambda calls: [self._answer(call) for call in calls]

    def _answer(self, call: PolicyCall) -> np.ndarray:
        self.first.setdefault(call.seed, call.observation)
        actions = self.data.actions_of(self._episodes[call.seed])
        steps = call.index * self._replan_steps + np.arange(self._replan_steps)
        # After its end a demonstration holds its last target.
        return actions[np.minimum(steps, len(actions) - 1)]

    def recorded(self, seed: int) -> dict:
        """Return what the dataset shows first, as an observation."""
        row = self.data.first_row(self._episodes[seed])
        sample = int(np.searchsorted(self.data.sample_row, row))
        images = {camera: images[sample] for camera, images in self.data.images.items()}
        return {"images": images, "state": self.data.state[row]}


def check_episodes(
    probe: Probe,
    results: Sequence[EpisodeResult],
    joint_perturbation: float,
    min_success: float,
) -> Iterator[Finding]:
    """Yield what executing demonstrations has shown."""
    pairs = [(probe.first[seed], probe.recorded(seed)) for seed in probe.seeds]
    tolerance = MAX_STATE_ERROR + 5 * joint_perturbation
    errors = np.abs([live["state"] - recorded["state"] for live, recorded in pairs])
    median = np.median(errors, axis=0)
    # Without success to ask for, the seeds do not give the scenes: states may differ.
    if min_success and median.max() > tolerance:
        yield Finding(
            "error",
            f"for the same seed, dimension {median.argmax()} of the state differs by "
            f"{median.max():.2g} between evaluation and dataset; make the dataset again with the "
            "run's robot and state.",
        )
    for camera in pairs[0][0]["images"]:
        yield from check_camera(camera, pairs)
    rate = np.mean([result.success_once for result in results])
    sentence = (
        f"{rate:.0%} of {len(results)} demonstrations succeed when the dataset's actions are "
        "executed as in evaluation"
    )
    if rate < min_success:
        yield Finding(
            "error",
            f"{sentence}; look at control mode, gripper sign and frequency of the demonstrations. "
            "If their seeds do not give their scenes, set evaluation.min_demo_success to 0.",
        )
    elif rate < GOOD_SUCCESS:
        yield Finding("warning", f"{sentence}; expect no more of a policy.")


def check_camera(camera: str, pairs: Sequence[tuple[dict, dict]]) -> Iterator[Finding]:
    """Yield in what a camera of the dataset is not the one of evaluation.

    Args:
        camera: of the dataset.
        pairs: observations of evaluation and of the dataset, for the same seeds.
    """

    def error(show: Callable[[dict], np.ndarray]) -> float:
        distances = []
        for live, recorded in pairs:
            seen = recorded["images"][camera]
            image = resize_with_pad(np.ascontiguousarray(show(live["images"])), *seen.shape[:2])
            distances.append(np.abs(image.astype(np.float32) - seen).mean())
        return float(np.mean(distances))

    names = list(pairs[0][0]["images"])
    others = {name: error(lambda images, name=name: images[name]) for name in names}
    own = others[camera]
    nearest = min(others, key=lambda name: others[name])
    if others[nearest] < own / 2:
        yield Finding(
            "error",
            f"what the dataset calls {camera} is what {nearest} shows in evaluation: the cameras "
            "are swapped; make the dataset again.",
        )
    elif error(lambda images: images[camera][..., ::-1]) < own / 2:
        yield Finding(
            "error",
            f"the images of {camera} have red and blue swapped (BGR) in the dataset; convert them.",
        )
    elif own > MAX_IMAGE_ERROR:
        yield Finding(
            "error",
            f"for the same seed, {camera} shows something else in evaluation than in the dataset "
            f"({own:.0f} of 255 apart on average); make the dataset again in this version of "
            "ManiSkill.",
        )


if __name__ == "__main__":
    run(check_before_training)
