"""Runs a command on GPUs of its own, which no other command that runs this way has.

    python -m demo2eval.gpus 1 python train.py

waits for as many free GPUs as it is told, names them in CUDA_VISIBLE_DEVICES and becomes the
command. A GPU is free again when the command and its children have ended, however they ended. Of
several GPUs that the shell has in CUDA_VISIBLE_DEVICES already, only those are given out.

Within a job of SLURM the GPUs are those of the job. Nothing is done where there is no GPU, and
where srun started several processes, each of which has its own.
"""

import fcntl
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from demo2eval.cli import report_errors
from demo2eval.errors import UserError

VARIABLE = "CUDA_VISIBLE_DEVICES"


def list_devices() -> list[str]:
    """Return the GPUs to give out, as CUDA_VISIBLE_DEVICES names them."""
    if (given := os.environ.get(VARIABLE)) is not None:
        return [device for device in given.split(",") if device not in ("", "-1")]
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return re.findall(r"^GPU (\d+):", listed.stdout, re.MULTILINE)


def claim_gpus(count: int, devices: Sequence[str], folder: Path) -> list[str]:
    """Wait until so many GPUs are free, and hold them for as long as this process has children.

    Args:
        devices: to choose from.
        folder: of the locks, the same for all that share the GPUs.

    Raises:
        UserError: if there are not so many.
    """
    if count > len(devices):
        raise UserError(
            f"the job takes {count} GPUs and there are {len(devices)}; lower its resource `gpu`, "
            "or training.fsdp_devices."
        )
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        # All or none: two that wait for each other's would wait for ever.
        held = {}
        for device in devices:
            lock = os.open(folder / f"{device}.lock", os.O_CREAT | os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                os.close(lock)
                continue
            held[device] = lock
            if len(held) == count:
                for descriptor in held.values():
                    os.set_inheritable(descriptor, True)
                return list(held)
        for descriptor in held.values():
            os.close(descriptor)
        time.sleep(1)


def main() -> None:
    """Become the command of the command line."""
    count, command = int(sys.argv[1]), sys.argv[2:]
    devices = list_devices()
    if devices and int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) == 1:
        # Two jobs of SLURM may name different GPUs alike.
        job = os.environ.get("SLURM_JOB_ID", "")
        folder = Path(tempfile.gettempdir()) / f"demo2eval-gpus-{os.getuid()}-{job}"
        with report_errors():
            os.environ[VARIABLE] = ",".join(claim_gpus(count, devices, folder))
    os.execvp(command[0], command)


if __name__ == "__main__":
    main()
