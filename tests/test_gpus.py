"""GPUs of their own for the jobs of one machine; the environment says which GPUs there are."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# Its own devices, and how long it had them.
COMMAND = """
import os, sys, time
began = time.time()
time.sleep(float(sys.argv[2]))
with open(sys.argv[1], "a") as file:
    file.write(f"{os.environ['CUDA_VISIBLE_DEVICES']} {began} {time.time()}\\n")
"""


@pytest.fixture
def start(tmp_path, monkeypatch):
    """A function that starts a command on so many GPUs; the commands are ended at the end."""
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", str(ROOT / "workflow"))
    for name in ("SLURM_JOB_ID", "SLURM_STEP_NUM_TASKS"):
        monkeypatch.delenv(name, raising=False)
    processes = []

    def run(count: int, devices: str, seconds: float) -> subprocess.Popen:
        words = [str(count), sys.executable, "-c", COMMAND, str(tmp_path / "out"), str(seconds)]
        environment = os.environ | {"CUDA_VISIBLE_DEVICES": devices}
        command = [sys.executable, "-m", "demo2eval.gpus", *words]
        processes.append(subprocess.Popen(command, env=environment, stderr=subprocess.PIPE))
        return processes[-1]

    yield run
    for process in processes:
        process.kill()
        process.wait()


def read_uses(folder: Path) -> list[tuple[list[str], float, float]]:
    """Return (GPUs, begin, end) of each command that ended well."""
    lines = [line.split() for line in (folder / "out").read_text().splitlines()]
    return [(devices.split(","), float(began), float(ended)) for devices, began, ended in lines]


def test_no_two_commands_have_the_same_gpu_at_a_time(start, tmp_path):
    for process in [start(1 + index % 2, "2,5,7", 0.5) for index in range(8)]:
        assert process.wait(60) == 0
    uses = read_uses(tmp_path)
    assert sorted(len(devices) for devices, *_ in uses) == [1] * 4 + [2] * 4
    for index, (devices, began, ended) in enumerate(uses):
        assert set(devices) <= {"2", "5", "7"}
        for others, other_began, other_ended in uses[:index]:
            apart = ended <= other_began or other_ended <= began
            assert apart or not set(devices) & set(others)


def test_a_killed_command_frees_its_gpu(start, tmp_path):
    killed = start(1, "0", 60)
    while not list(tmp_path.glob("demo2eval-gpus-*/*.lock")):
        time.sleep(0.05)
    time.sleep(0.5)
    waiting = start(1, "0", 0)
    time.sleep(1)
    assert waiting.poll() is None
    killed.send_signal(signal.SIGKILL)
    assert waiting.wait(30) == 0
    assert [devices for devices, *_ in read_uses(tmp_path)] == [["0"]]


def test_more_gpus_than_there_are_is_a_sentence(start):
    process = start(2, "4", 0)
    assert process.wait(30) == 1
    assert "takes 2 GPUs and there are 1" in process.stderr.read().decode()


def test_sruns_choice_and_a_machine_without_gpus_are_left_alone(start, tmp_path, monkeypatch):
    assert start(2, "", 0).wait(30) == 0
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "2")
    assert start(2, "3", 0).wait(30) == 0
    assert (tmp_path / "out").read_text().split()[-3] == "3"


def test_two_jobs_of_slurm_may_name_different_gpus_alike(start, tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    first = start(1, "0", 3)
    while not list(tmp_path.glob("demo2eval-gpus-*-1/*.lock")):
        time.sleep(0.05)
    monkeypatch.setenv("SLURM_JOB_ID", "2")
    assert start(1, "0", 0).wait(30) == 0
    assert first.poll() is None
    assert first.wait(30) == 0


def test_eight_gpus_run_eight_jobs_of_the_default_profile(tmp_path):
    """Each job ends when all eight have begun."""
    (tmp_path / "Snakefile").write_text(
        f"""
rule all:
    input: expand("{{job}}.txt", job=range(8))

rule job:
    output: "{{job}}.txt"
    resources: gpu=1
    shell:
        "{sys.executable} -m demo2eval.gpus {{resources.gpu}} sh -c '"
        "touch $CUDA_VISIBLE_DEVICES.began;"
        " while test $(ls *.began | wc -l) -lt 8; do sleep 0.2; done;"
        " echo $CUDA_VISIBLE_DEVICES > {{output}}'"
"""
    )
    (tmp_path / "profiles").symlink_to(ROOT / "workflow/profiles")
    devices = "0,1,2,3,4,5,6,7"
    environment = os.environ | {
        "CUDA_VISIBLE_DEVICES": devices,
        "PYTHONPATH": str(ROOT / "workflow"),
        "TMPDIR": str(tmp_path),
    }
    command = [sys.executable, "-m", "snakemake", "--cores", "8"]
    result = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert result.returncode == 0, result.stderr
    seen = [(tmp_path / f"{job}.txt").read_text().strip() for job in range(8)]
    assert sorted(seen) == devices.split(",")
