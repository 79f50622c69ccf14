"""Whatever kills a training, and whenever: it ends as if left alone, bit for bit."""

import multiprocessing
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest
from test_train import ACTIONS, TRAINING, assert_same_checkpoint

from demo2eval.training.train import STOPPED, train

NUM_HISTORIES = int(os.environ.get("DEMO2EVAL_HISTORIES", "2"))
STEPS = (20, 40, 60)


def train_rest(run: Path, checkpoints: Path, log: Path, steps: tuple[int, ...] = STEPS) -> None:
    """Train the checkpoints that are missing, as Snakemake's jobs would; save twice a second."""
    sys.stderr = sys.stdout = open(log, "a")  # noqa: SIM115
    done = 0
    for step in steps:
        if not (checkpoints / f"{step}.json").exists():
            train(
                checkpoints / f"{done}.json",
                run / "cache_64/manifest.json",
                checkpoints / f"{step}.json",
                step=step,
                training=TRAINING.model_copy(update={"save_minutes": 1 / 120}),
                actions=ACTIONS,
            )
        done = step


@pytest.fixture(scope="module")
def server():
    """Starts processes that have imported everything and compiled nothing."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["test_histories", "demo2eval.training.trainer"])
    return server


@pytest.fixture(scope="module")
def undisturbed(server, pushcube_run, tmp_path_factory) -> tuple[Path, float]:
    """Checkpoints of one training of 60 steps, and the seconds that three segments took."""
    folder, seconds = tmp_path_factory.mktemp("undisturbed"), 0.0
    for name, steps in (("whole", STEPS[-1:]), ("segments", STEPS)):
        shutil.copytree(pushcube_run / "checkpoints", folder / name)
        started = time.monotonic()
        job = server.Process(
            target=train_rest, args=(pushcube_run, folder / name, folder / "log", steps)
        )
        job.start()
        job.join()
        assert job.exitcode == 0, (folder / "log").read_text()
        seconds = time.monotonic() - started
    assert_same_checkpoint(folder / "segments/60", folder / "whole/60", metrics=False)
    whole = (folder / "whole/60/metrics.csv").read_text()
    assert whole == read_metrics(folder / "segments")
    return folder / "segments", seconds


def read_metrics(checkpoints: Path) -> str:
    """Return the rows of all segments below one header."""
    texts = [(checkpoints / f"{step}/metrics.csv").read_text() for step in STEPS]
    return texts[0] + "".join(text.split("\n", 1)[1] for text in texts[1:])


@pytest.mark.parametrize("history", range(NUM_HISTORIES))
def test_any_history_of_kills_ends_the_same(server, pushcube_run, undisturbed, tmp_path, history):
    expected, seconds = undisturbed
    choose = random.Random(history)
    shutil.copytree(pushcube_run / "checkpoints", tmp_path / "checkpoints")
    kills = []
    for _ in range(choose.randint(1, 4)):
        sent = choose.choice([signal.SIGKILL, signal.SIGTERM])
        job = server.Process(
            target=train_rest, args=(pushcube_run, tmp_path / "checkpoints", tmp_path / "log")
        )
        job.start()
        job.join(choose.uniform(0, 0.9 * seconds))
        if job.is_alive():
            os.kill(job.pid, sent)
        job.join()
        kills.append(job.exitcode)
        # Before and after its steps a job has nothing to save, and SIGTERM ends it at once.
        assert job.exitcode in (0, STOPPED, -sent), (tmp_path / "log").read_text()
    job = server.Process(
        target=train_rest, args=(pushcube_run, tmp_path / "checkpoints", tmp_path / "log")
    )
    job.start()
    job.join()
    assert job.exitcode == 0, (tmp_path / "log").read_text()
    print("exit codes:", *kills)
    for step in STEPS:
        assert_same_checkpoint(
            tmp_path / f"checkpoints/{step}", expected / str(step), with_state=step == STEPS[-1]
        )
