"""One training by several processes, one per GPU, as srun starts them on one host or several.

    srun --ntasks-per-node=8 --gpus-per-task=1 python -m demo2eval.training.train ...

Each process computes its devices' part of every step. The first one alone holds the lock, writes
metrics, weights and manifest; the training state is written by all. The folder of the run must be
on a disk that all hosts share.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from demo2eval.fingerprint import code_fingerprint
from demo2eval.provenance import StageJob, run_stage


def join_processes() -> bool:
    """Join the processes that srun started for this training; return whether there are several.

    JAX finds their number and addresses in SLURM's variables.
    """
    if int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        return False
    import jax

    if not jax.distributed.is_initialized():
        # Without GPUs, as in tests, processes talk to each other through Gloo.
        jax.config.update("jax_cpu_collectives_implementation", "gloo")
        # JAX takes the GPU of the process's number on its host, but srun may show it only its own.
        shown = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        has_own = shown != "" and "," not in shown
        jax.distributed.initialize(local_device_ids=[0] if has_own else None)
    return True


@contextmanager
def run_stage_together(
    output: Path, *, stage: str, module: str, settings: dict, inputs: dict[str, Path]
) -> Iterator[StageJob]:
    """Do as `run_stage` does in the first process; the others get its job without the lock."""
    together = join_processes()
    if is_first():
        with run_stage(output, stage=stage, module=module, settings=settings, inputs=inputs) as job:
            if together:
                any_process([job.reused])
            yield job
        return
    paths = {name: [path] for name, path in inputs.items()}
    job = StageJob(output, stage, settings, paths, code_fingerprint(module))
    (job.reused,) = any_process([False])
    yield job


def is_first() -> bool:
    """Return whether this process is the one that writes."""
    return os.environ.get("SLURM_PROCID", "0") == "0"


def wait_for_all(name: str) -> None:
    """Wait until every process is here."""
    from jax.experimental import multihost_utils

    multihost_utils.sync_global_devices(name)


def any_process(values: list[bool]) -> list[bool]:
    """Return, of each value, whether it is true in any process."""
    from jax.experimental import multihost_utils

    gathered = multihost_utils.process_allgather(np.array(values))
    return gathered.reshape(-1, len(values)).any(axis=0).tolist()


def fetch(tree: Any) -> Any:
    """Return a tree with every array whole in this process's memory; all processes must call it."""
    import jax
    from jax.experimental import multihost_utils

    if jax.process_count() == 1:
        return jax.device_get(tree)
    return jax.tree.map(lambda leaf: multihost_utils.process_allgather(leaf, tiled=True), tree)
