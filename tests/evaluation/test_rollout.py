"""Rollouts of a checkpoint: a kill loses nothing, and what does not fit is a sentence."""

import multiprocessing
import threading
import time
from pathlib import Path

import pytest
from conftest import find_task

from demo2eval.checkpoints.policy_metadata import read_policy_metadata
from demo2eval.config import Evaluation
from demo2eval.errors import UserError
from demo2eval.evaluation.rollout import (
    find_task_facts,
    policy_loader,
    read_rows,
    run_rollouts,
    to_row,
    write_rows,
)
from demo2eval.evaluation.workers import (
    EpisodeResult,
    make_episode_settings,
    make_rollout_env,
    run_episode,
)
from demo2eval.provenance import read_manifest, run_stage, sha256_file

pytestmark = pytest.mark.simulator

TASK = find_task("PushCube-v1")
EVALUATION = Evaluation(num_episodes=4, max_episode_steps=12, replan_steps=6, num_steps=2)


def evaluate(run: Path, output: Path, task="PushCube-v1", dataset=None, **changes) -> Path:
    """Evaluate checkpoint 0 of a run; return the table of episodes."""
    run_rollouts(
        run / "checkpoints/0.json",
        dataset or run / "dataset/manifest.json",
        output / "0.json",
        task=task,
        object=TASK.object,
        milestones=TASK.milestones,
        evaluation=EVALUATION.model_copy(update=changes),
    )
    return output / "0.csv"


def run_undisturbed(run: Path, table: Path) -> bytes:
    """Run the same episodes in this process, in one env; return the table."""
    checkpoint = run / "checkpoints/0"
    settings = make_episode_settings(
        read_policy_metadata(checkpoint), "PushCube-v1", TASK.object, TASK.milestones, EVALUATION
    )
    env, infer = make_rollout_env(settings), policy_loader(checkpoint, EVALUATION)()
    write_rows(table, [to_row(run_episode(env, settings, seed, infer)) for seed in range(4)])
    return table.read_bytes()


def test_kill_and_go_on_gives_the_undisturbed_table(pushcube_run, tmp_path):
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed.csv"

    def kill_after_the_first_episode() -> None:
        while not any(map(read_rows, killed.glob(".0.partial-*/episodes.csv"))):
            time.sleep(0.02)
        for process in multiprocessing.active_children():
            process.kill()

    killer = threading.Thread(target=kill_after_the_first_episode, daemon=True)
    killer.start()
    with pytest.raises(
        UserError, match=r"simulator process 0 died with status -9 in the episode of seed [123]"
    ):
        evaluate(pushcube_run, killed, num_workers=1)
    killer.join()
    assert not multiprocessing.active_children()
    assert not (killed / "0.json").exists()
    (partial,) = killed.glob(".0.partial-*/episodes.csv")
    before = partial.read_text()
    # What a kill in the middle of a write leaves: looks like an episode, and is not one.
    partial.write_text(before + "3,1,1,2,2")
    table = evaluate(pushcube_run, killed, num_workers=2)
    assert table.read_text().startswith(before)
    assert table.read_bytes() == run_undisturbed(pushcube_run, undisturbed)
    rows = [line.split(",") for line in table.read_text().splitlines()[1:]]
    assert [(row[0], row[4]) for row in rows] == [
        ("0", "12"),
        ("1", "12"),
        ("2", "12"),
        ("3", "12"),
    ]
    manifest = read_manifest(killed / "0.json")
    assert manifest["outputs"]["0.csv"]["sha256"] == sha256_file(undisturbed)
    for name, file in (("checkpoint", "checkpoints/0.json"), ("dataset", "dataset/manifest.json")):
        assert manifest["metadata"][name] == read_manifest(pushcube_run / file)["digest"]
    assert not list(killed.glob(".0.partial-*"))


def test_a_row_has_whole_numbers_and_keeps_both_kinds_of_success_apart():
    result = EpisodeResult(7, True, False, 30, 84, 5, "place", 0.01234)
    assert list(to_row(result).values()) == [7, 1, 0, 30, 84, 5, "place", 12.3]
    failed = EpisodeResult(7, False, False, None, 84, 5, "nothing", 0.2)
    assert list(to_row(failed).values()) == [7, 0, 0, "", 84, 5, "nothing", 200.0]


def test_demonstrated_seeds_are_not_evaluated(pushcube_run, tmp_path):
    seeds = read_manifest(pushcube_run / "dataset/manifest.json")["metadata"]["seeds"]
    with pytest.raises(
        UserError,
        match=rf"1 evaluation seeds, {min(seeds)} among them, are those of demonstrations",
    ):
        evaluate(pushcube_run, tmp_path, first_seed=min(seeds) - 3)
    assert not (tmp_path / "0.json").exists()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"replan_steps": 9}, r"evaluation.replan_steps 9 is more than the policy's 8 actions"),
        ({"task": "PullCube-v1"}, r"a policy for PushCube-v1, not for PullCube-v1"),
    ],
)
def test_what_does_not_fit_the_policy_is_a_sentence(pushcube_run, tmp_path, changes, sentence):
    with pytest.raises(UserError, match=sentence):
        evaluate(pushcube_run, tmp_path, **changes)
    assert not (tmp_path / "0.json").exists()


def test_the_checkpoint_knows_its_task(pushcube_run):
    known = find_task_facts(pushcube_run / "checkpoints/0.json", None, None, None)
    assert known == ("PushCube-v1", TASK.object, TASK.milestones)


def test_another_dataset_does_not_prove_that_seeds_are_new(pushcube_run, tmp_path):
    (tmp_path / "other.txt").write_text("stands for another dataset")
    with run_stage(
        tmp_path / "other.json", stage="dataset", module="demo2eval.data.dataset", settings={}
    ) as job:
        job.finish([tmp_path / "other.txt"], seeds=[])
    with pytest.raises(UserError, match="was not trained on"):
        evaluate(pushcube_run, tmp_path, dataset=tmp_path / "other.json")
