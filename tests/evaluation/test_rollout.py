"""Rollouts in the real simulator: every episode once, the same whoever plays it, and nothing lost by a kill."""

import dataclasses
import multiprocessing
import threading
import time
from pathlib import Path

import numpy as np
import pytest

from demo2eval.checkpoints.policy_metadata import read_policy_metadata
from demo2eval.data.trajectory import read_demonstrations
from demo2eval.errors import UserError
from demo2eval.evaluation.rollout import (
    Answerer,
    Settings,
    episode_settings,
    read_finished,
    rollout,
    row_of,
    write_episodes,
)
from demo2eval.evaluation.workers import (
    FILM_SIZE,
    EpisodeSettings,
    make_simulator,
    play,
    play_episode,
)
from demo2eval.pi0.normalize import NormStats, save_norm_stats
from demo2eval.provenance import making, read_manifest, sha256_file
from demo2eval.training.init_checkpoint import Settings as InitSettings
from demo2eval.training.init_checkpoint import init_checkpoint

SIMULATOR = EpisodeSettings(
    task="PushCube-v1",
    control_mode="pd_joint_pos",
    cameras=("base_camera",),
    image_size=64,
    state=("qpos", "tcp_pose"),
    max_episode_steps=84,
    replan_steps=20,
)
STAGE = {
    "task": "PushCube-v1",
    "episodes": 4,
    "max_episode_steps": 12,
    "replan_steps": 6,
    "num_steps": 2,
}


class PlaysBack:
    """A policy that gives the actions of the demonstration with the episode's seed, and keeps what it was shown.

    Its cubes are pushed, so that contacts are part of what is compared.
    """

    def __init__(self, demonstrations):
        self.actions = {
            demonstration.seed: demonstration.actions for demonstration in demonstrations
        }
        self.seen = {}

    def prepare(self):
        pass

    def __call__(self, looks):
        return [self.answer(*look) for look in looks]

    def answer(self, seed, number, observation):
        self.seen[seed, number] = observation
        rows = np.arange(number * SIMULATOR.replan_steps, (number + 1) * SIMULATOR.replan_steps)
        return self.actions[seed][np.minimum(rows, len(self.actions[seed]) - 1)]


@pytest.fixture(scope="module")
def demonstrations(pushcube_demos) -> list:
    return read_demonstrations(pushcube_demos.parent / "trajectory.h5", "PushCube-v1")[0]


def play_back(simulator, demonstrations):
    """Play episodes one after the other in this process; return the results by seed, and all that the policy saw."""
    policy, results = PlaysBack(demonstrations), {}
    for seed in policy.actions:
        results[seed] = play_episode(
            simulator,
            SIMULATOR,
            seed,
            lambda look, seen, seed=seed: policy.answer(seed, look, seen),
        )
    return results, policy.seen


@pytest.fixture(scope="module")
def simulator():
    return make_simulator(dataclasses.replace(SIMULATOR, film=True))


@pytest.fixture(scope="module")
def played(simulator, demonstrations):
    return play_back(simulator, demonstrations)


def test_demonstrations_succeed_when_they_are_played_back(played, demonstrations):
    results, seen = played
    for demonstration in demonstrations:
        result = results[demonstration.seed]
        assert result.success_once
        assert result.success_at_end
        assert result.first_success_step == np.argmax(demonstration.success) + 1
        assert (result.steps, result.looks) == (84, 5)
    assert {number for _, number in seen} == {0, 1, 2, 3, 4}
    assert seen[demonstrations[0].seed, 0]["state"].shape == (16,)


def test_an_episode_does_not_depend_on_what_was_played_before(played, simulator, demonstrations):
    results, seen = played
    again, seen_again = play_back(simulator, [*reversed(demonstrations)])
    assert again == results
    assert seen_again.keys() == seen.keys()
    for key, observation in seen.items():
        np.testing.assert_array_equal(seen_again[key]["state"], observation["state"])
        np.testing.assert_array_equal(
            seen_again[key]["images"]["base_camera"], observation["images"]["base_camera"]
        )


def test_a_film_is_of_the_same_episode(played, simulator, demonstrations):
    seed, (results, seen) = demonstrations[0].seed, played
    policy = PlaysBack(demonstrations)
    filmed = play_episode(
        simulator,
        dataclasses.replace(SIMULATOR, film=True),
        seed,
        lambda look, seen: policy.answer(seed, look, seen),
    )
    assert dataclasses.replace(filmed, film=None, successes=None) == results[seed]
    for key, observation in policy.seen.items():
        np.testing.assert_array_equal(
            observation["images"]["base_camera"], seen[key]["images"]["base_camera"]
        )
    assert filmed.film.shape == (85, FILM_SIZE, FILM_SIZE, 3)
    assert np.abs(filmed.film[0].astype(float) - filmed.film[-1]).max() > 100
    assert np.argmax(filmed.successes) == filmed.first_success_step
    assert filmed.successes[-1]


def test_a_process_that_cannot_start_says_why(demonstrations):
    settings = dataclasses.replace(SIMULATOR, control_mode="pd_nothing")
    with pytest.raises(
        RuntimeError, match=r"(?s)simulator process 0 failed while it started.*pd_nothing"
    ):
        list(play(settings, [0], 1, PlaysBack(demonstrations)))
    assert not multiprocessing.active_children()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """A folder with the manifests of a dataset and of checkpoint 0, whose policy moves the arm a little."""
    folder = tmp_path_factory.mktemp("run")
    (folder / "dataset.txt").write_text("stands for a dataset")
    with making(
        folder / "dataset.json", stage="dataset", module="demo2eval.data.dataset", settings={}
    ) as work:
        work.finish([folder / "dataset.txt"], seeds=[1000, 1001])
    inputs = {"dataset": folder / "dataset.json"}
    with making(
        folder / "norm_stats.json",
        stage="norm_stats",
        module="demo2eval.data.norm_stats",
        settings={},
        inputs=inputs,
    ) as work:
        stats = {
            name: NormStats(
                np.zeros(width), np.ones(width), np.full(width, -0.1), np.full(width, 0.1)
            )
            for name, width in (("state", 9), ("actions", 8))
        }
        (folder / "norm_stats").mkdir()
        save_norm_stats(folder / "norm_stats/norm_stats.json", stats)
        work.finish([folder / "norm_stats"])
    (folder / "norm_stats.json").rename(folder / "norm_stats/manifest.json")
    settings = InitSettings(
        task="PushCube-v1",
        prompt="push the cube",
        variant="pi05_tiny",
        model_overrides={
            "action_horizon": 8,
            "discrete_state_input": False,
            "continuous_state_token": True,
        },
        cameras={"base_0_rgb": "base_camera"},
        image_size=64,
        state=["qpos"],
        control_mode="pd_joint_pos",
        delta_action_mask=[True] * 7 + [False],
    )
    init_checkpoint(settings, folder / "norm_stats/manifest.json", folder / "checkpoints/0.json")
    return folder


def evaluate(run: Path, output: str, workers: int, **changes) -> Path:
    settings = Settings(**STAGE | changes)
    rollout(
        settings,
        run / "checkpoints/0.json",
        run / "dataset.json",
        run / output / "0.json",
        workers=workers,
    )
    return run / output / "0/episodes.csv"


def undisturbed(run: Path, simulator, folder: Path) -> bytes:
    """Play the same episodes one after the other in this process, whose simulator has played others before; return the table."""
    settings, payload = Settings(**STAGE), run / "checkpoints/0"
    simulators, answerer = (
        episode_settings(settings, read_policy_metadata(payload)),
        Answerer(payload, settings),
    )
    answerer.prepare()

    def played(seed: int) -> dict:
        return row_of(
            play_episode(
                simulator, simulators, seed, lambda look, seen: answerer([(seed, look, seen)])[0]
            )
        )

    write_episodes(folder / "episodes.csv", [played(seed) for seed in settings.seeds])
    return (folder / "episodes.csv").read_bytes()


def test_kill_and_go_on_gives_the_undisturbed_table(run, simulator, tmp_path):
    def kill_after_the_first_episode() -> None:
        while not (
            partial := list((run / "killed").glob(".0.partial-*/episodes.csv"))
        ) or not read_finished(partial[0]):
            time.sleep(0.02)
        for process in multiprocessing.active_children():
            process.kill()

    killer = threading.Thread(target=kill_after_the_first_episode, daemon=True)
    killer.start()
    with pytest.raises(
        UserError, match=r"simulator process 0 died with status -9 while it played seed [123]"
    ):
        evaluate(run, "killed", workers=1)
    killer.join()
    assert not multiprocessing.active_children()
    assert not (run / "killed/0.json").exists()
    (partial,) = (run / "killed").glob(".0.partial-*/episodes.csv")
    before = partial.read_text()
    # What a kill in the middle of a write leaves: looks like an episode, and is not one.
    partial.write_text(before + "3,1,1,2,2")
    table = evaluate(run, "killed", workers=2)
    assert table.read_text().startswith(before)
    assert table.read_bytes() == undisturbed(run, simulator, tmp_path)
    assert [int(line.split(",")[0]) for line in table.read_text().splitlines()[1:]] == [0, 1, 2, 3]
    assert {line.split(",")[4] for line in table.read_text().splitlines()[1:]} == {"12"}
    manifest = read_manifest(run / "killed/0.json")
    assert manifest["files"]["0/episodes.csv"]["sha256"] == sha256_file(tmp_path / "episodes.csv")
    assert manifest["facts"]["checkpoint"] == read_manifest(run / "checkpoints/0.json")["digest"]
    assert manifest["facts"]["dataset"] == read_manifest(run / "dataset.json")["digest"]
    assert not list((run / "killed").glob(".0.partial-*"))


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"first_seed": 997}, r"1 evaluation seeds, 1000 among them, were used by demonstrations"),
        ({"replan_steps": 9}, r"longer than the policy's 8 actions"),
        ({"replan_steps": 0}, r"replan_steps is 0"),
        ({"task": "PullCube-v1"}, r"a policy for PushCube-v1, not for PullCube-v1"),
    ],
)
def test_bad_settings_are_sentences(run, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluate(run, "bad", workers=1, **changes)
    assert not (run / "bad/0.json").exists()


def test_another_dataset_does_not_prove_that_seeds_are_new(run):
    (run / "other.txt").write_text("stands for another dataset")
    with making(
        run / "other.json", stage="dataset", module="demo2eval.data.dataset", settings={}
    ) as work:
        work.finish([run / "other.txt"], seeds=[])
    with pytest.raises(UserError, match="was not trained on"):
        rollout(
            Settings(**STAGE), run / "checkpoints/0.json", run / "other.json", run / "bad/0.json"
        )
