"""Mistakes that are planted into data and settings are found before training, each by its name."""

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from conftest import find_task

from demo2eval.checkpoints.policy_metadata import find_assets, read_policy_metadata
from demo2eval.config import Actions, Dataset, Evaluation, Model, Replay
from demo2eval.data.dataset import build_dataset
from demo2eval.data.image_cache import build_image_cache
from demo2eval.data.norm_stats import compute_norm_stats
from demo2eval.data.replay import replay_demos
from demo2eval.errors import UserError
from demo2eval.evaluation import preflight
from demo2eval.evaluation.preflight import (
    Data,
    Probe,
    check_before_training,
    check_episodes,
    check_images,
    check_norm_stats,
    check_settings,
)
from demo2eval.evaluation.workers import EpisodeResult, make_episode_settings, run_episodes
from demo2eval.pi0.normalize import NormStats, load_norm_stats
from demo2eval.provenance import read_manifest
from demo2eval.training.init_checkpoint import init_checkpoint

TASK = find_task("StackCube-v1")
EVALUATION = Evaluation(num_episodes=2, max_episode_steps=200, replan_steps=50, num_workers=1)
pytestmark = pytest.mark.simulator


@pytest.fixture(scope="module")
def run(stackcube_demos, tmp_path_factory) -> Path:
    """The folder of a run of StackCube, up to checkpoint 0."""
    folder = tmp_path_factory.mktemp("stackcube")
    cameras = {"base_0_rgb": "base_camera", "left_wrist_0_rgb": "hand_camera"}
    replay, actions = Replay(cameras=cameras, image_stride=25), Actions(action_horizon=50)
    replay_demos(
        stackcube_demos,
        folder / "replay/manifest.json",
        task="StackCube-v1",
        robot=TASK.robot,
        object=TASK.object,
        replay=replay,
    )
    dataset, norm_stats = folder / "dataset/manifest.json", folder / "norm_stats/manifest.json"
    build_dataset([folder / "replay/manifest.json"], dataset, prompt=TASK.prompt)
    build_image_cache(dataset, folder / "cache/manifest.json", image_size=64)
    compute_norm_stats(dataset, norm_stats, actions=actions)
    init_checkpoint(
        norm_stats,
        folder / "checkpoints/0.json",
        task="StackCube-v1",
        prompt=TASK.prompt,
        robot=TASK.robot,
        replay=replay,
        dataset=Dataset(),
        actions=actions,
        model=Model(variant="pi05_tiny", weights=None, tokenizer=None, continuous_state_token=True),
    )
    return folder


@pytest.fixture(scope="module")
def data(run) -> Data:
    return Data.read(run / "dataset/manifest.json", run / "cache/manifest.json")


@pytest.fixture(scope="module")
def policy(run):
    return read_policy_metadata(run / "checkpoints/0")


def check(run: Path, evaluation: Evaluation = EVALUATION) -> None:
    """Run the whole stage."""
    check_before_training(
        run / "checkpoints/0.json",
        run / "dataset/manifest.json",
        run / "cache/manifest.json",
        run / "preflight.json",
        task="StackCube-v1",
        object=TASK.object,
        evaluation=evaluation,
    )


def execute(policy, data: Data) -> tuple[Probe, list[EpisodeResult]]:
    """Execute the demonstrations."""
    probe = Probe(data, EVALUATION.replan_steps)
    settings = make_episode_settings(
        policy, "StackCube-v1", TASK.object, TASK.milestones, EVALUATION
    )
    return probe, list(run_episodes(settings, probe.seeds, 1, probe.load))


def errors_of(probe: Probe, results: list[EpisodeResult]) -> list[str]:
    """Return the sentences of the errors."""
    findings = check_episodes(probe, results, 0.0, EVALUATION.min_demo_success)
    return [finding.sentence for finding in findings if finding.level == "error"]


@pytest.fixture(scope="module")
def executed(run) -> tuple[Probe, list[EpisodeResult]]:
    """The demonstrations, as the stage has executed them."""
    seen = []

    def watch(probe, results, *settings):
        seen.extend([probe, results])
        return check_episodes(probe, results, *settings)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(preflight, "check_episodes", watch)
        check(run)
    return seen[0], seen[1]


def errors_with_images(executed, images: dict[str, np.ndarray]) -> list[str]:
    """Return the errors if the dataset had other images."""
    probe, results = executed
    other = Probe(dataclasses.replace(probe.data, images=images), EVALUATION.replan_steps)
    other.first = probe.first
    return errors_of(other, results)


def test_a_sound_run_passes_and_its_demonstrations_succeed(run, executed):
    metadata = read_manifest(run / "preflight.json")["metadata"]
    assert metadata["demos"] == 2
    assert metadata["success_of_demos"] == 1
    assert metadata["warnings"] == []


def test_a_limit_below_the_demonstrations_stops_the_run(run):
    short = EVALUATION.model_copy(update={"max_episode_steps": 50})
    with pytest.raises(UserError, match="max_episode_steps is 50, and of the demonstrations"):
        check(run, short)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"prompt": "push the cube"}, "the prompt is 'stack the red"),
        ({"control_mode": "pd_ee_delta_pose"}, "the control mode is 'pd_joint_pos'"),
        ({"action_dim": 7}, "the number of action dimensions is 8"),
        ({"state": ["qpos", "tcp_pose"]}, "the state is"),
    ],
)
def test_a_policy_of_other_settings_is_found(policy, data, changes, sentence):
    other = dataclasses.replace(policy, **changes)
    (finding,) = check_settings(other, data, EVALUATION)
    assert finding.level == "error"
    assert sentence in finding.sentence


def test_another_frequency_is_found(policy, data):
    slow = dataclasses.replace(data, metadata=data.metadata | {"fps": 10})
    (finding,) = check_settings(policy, slow, EVALUATION)
    assert "the control frequency is 10 in the dataset and 20" in finding.sentence


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda images: images * 0, "black"),
        (lambda images: images * 0 + images[:1], "all the same"),
    ],
)
def test_a_camera_that_shows_nothing_is_found(data, change, sentence):
    images = data.images | {"hand_camera": change(np.array(data.images["hand_camera"]))}
    (finding,) = check_images(dataclasses.replace(data, images=images))
    assert f"the images of hand_camera are {sentence}" in finding.sentence
    assert not list(check_images(data))


def each(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[NormStats], NormStats]:
    """Return a function that changes each array of norm stats."""
    return lambda stats: NormStats(**{name: change(values) for name, values in vars(stats).items()})


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (each(lambda values: values[::-1]), "in another order"),
        (each(lambda values: values + 0.5), "another dataset's"),
        (
            lambda stats: dataclasses.replace(stats, q01=stats.q01 - 20, q99=stats.q99 + 20),
            "less than a tenth",
        ),
        (each(lambda values: values[:8]), "have 8 dimensions of state, and the dataset 9"),
    ],
    ids=["order", "shifted", "wide", "dims"],
)
def test_norm_stats_of_other_data_are_found(run, policy, data, change, sentence):
    stats = load_norm_stats(find_assets(run / "checkpoints/0") / "norm_stats.json")
    assert not list(check_norm_stats(policy, data, stats))
    findings = check_norm_stats(policy, data, stats | {"state": change(stats["state"])})
    (error,) = [finding.sentence for finding in findings if finding.level == "error"]
    assert sentence in error


def test_swapped_cameras_are_found(executed, data):
    assert errors_of(*executed) == []
    base, hand = data.images["base_camera"], data.images["hand_camera"]
    sentences = errors_with_images(executed, {"base_camera": hand, "hand_camera": base})
    assert len(sentences) == 2
    assert all("the cameras are swapped" in sentence for sentence in sentences)


def test_blue_for_red_is_found(executed, data):
    images = {camera: np.array(images)[..., ::-1] for camera, images in data.images.items()}
    sentences = errors_with_images(executed, images)
    assert len(sentences) == 2
    assert all("(BGR)" in sentence for sentence in sentences)


def test_images_of_another_view_are_found(executed, data):
    images = {camera: np.array(images)[:, ::-1] for camera, images in data.images.items()}
    sentences = errors_with_images(executed, images)
    assert len(sentences) == 2
    assert all("shows something else in evaluation" in sentence for sentence in sentences)


def test_a_gripper_of_the_other_sign_is_found(policy, data):
    action = data.action.copy()
    action[:, -1] *= -1
    (sentence,) = errors_of(*execute(policy, dataclasses.replace(data, action=action)))
    assert sentence.startswith("0% of 2 demonstrations succeed")
