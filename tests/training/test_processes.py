"""A training by several processes is that of one; either goes on from the other's checkpoints."""

import json
import multiprocessing
import os
import shutil
import socket
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from test_train import ACTIONS, TRAINING

from demo2eval.training.train import train

BATCH = {"batch_size": 4, "save_minutes": None}


def train_process(
    run: Path, checkpoints: Path, steps: tuple[int, int], process: int, processes: int, port: int
) -> None:
    """Train from the first to the second step as one of several processes that srun started."""
    sys.stderr = sys.stdout = open(checkpoints / f"{process}.log", "a")  # noqa: SIM115
    os.environ |= {
        "SLURM_JOB_ID": "1",
        "SLURM_STEP_NODELIST": "localhost",
        "SLURM_STEP_NUM_TASKS": str(processes),
        "SLURM_STEP_NUM_NODES": "1",
        "SLURM_NTASKS": str(processes),
        "SLURM_PROCID": str(process),
        "SLURM_LOCALID": str(process),
        "JAX_COORDINATOR_PORT": str(port),
    }
    train(
        checkpoints / f"{steps[0]}.json",
        run / "cache_64/manifest.json",
        checkpoints / f"{steps[1]}.json",
        step=steps[1],
        training=TRAINING.model_copy(update=BATCH | {"fsdp_devices": processes}),
        actions=ACTIONS,
    )


def train_together(run: Path, checkpoints: Path, steps: tuple[int, int], processes: int) -> None:
    """Train with some processes, and wait for them."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    spawn = multiprocessing.get_context("spawn")
    jobs = [
        spawn.Process(target=train_process, args=(run, checkpoints, steps, index, processes, port))
        for index in range(processes)
    ]
    for job in jobs:
        job.start()
    for job in jobs:
        job.join()
    logs = [path.read_text() for path in sorted(checkpoints.glob("*.log"))]
    assert [job.exitcode for job in jobs] == [0] * processes, "\n".join(logs)


@pytest.mark.slow
@pytest.mark.skipif(
    not {"gloo", "nccl"} & {os.environ.get("DEMO2EVAL_COLLECTIVES")},
    reason="without GPUs processes talk through Gloo, which is not reliable in jaxlib 0.12.0 "
    "(github.com/jax-ml/jax/issues/40830); DEMO2EVAL_COLLECTIVES=gloo or nccl runs it",
)
def test_two_processes_train_as_one_and_hand_over(pushcube_run, tmp_path):
    histories = {"one": (1, 1), "two": (2, 2), "changed": (1, 2)}
    for name, processes in histories.items():
        shutil.copytree(pushcube_run / "checkpoints", tmp_path / name)
        for steps, count in zip(((0, 3), (3, 6)), processes, strict=True):
            train_together(pushcube_run, tmp_path / name, steps, count)
    metrics = {
        name: pd.concat([pd.read_csv(tmp_path / f"{name}/{step}/metrics.csv") for step in (3, 6)])
        for name in histories
    }
    assert metrics["one"].step.tolist() == [1, 2, 3, 4, 5, 6]
    for name in ("two", "changed"):
        np.testing.assert_allclose(metrics[name], metrics["one"], rtol=2e-4)
    manifest = json.loads((tmp_path / "two/6.json").read_text())
    assert manifest["metadata"]["num_devices"] == 2
