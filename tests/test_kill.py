"""Nothing is lost: the chain from demonstrations to dataset, killed once in each stage, ends as if it had been left alone."""

import subprocess
import sys
import time

import pytest
from benchmark_modules import load_benchmark

kill_benchmark = load_benchmark("kill")


def test_killed_in_each_stage_the_same_command_ends_the_same(tmp_path):
    kills, lost = kill_benchmark.run(
        tmp_path, instants=3, seed=0, shards=1, demonstrations=1, cores=2
    )
    assert [kill.rule for kill in kills] == ["plan", "replay", "dataset"]
    assert all(kill.seconds is not None and kill.kept for kill in kills)
    assert lost == {"killed-0": []}
    # What is compared is there.
    assert list(tmp_path.glob("undisturbed/results/datasets/*/lerobot/**/*.mp4"))


@pytest.mark.parametrize("alive", [True, False])
def test_a_lock_holds_as_long_as_its_snakemake_lives(tmp_path, alive):
    """The jobs of a killed Snakemake live on; they do not hold its lock."""
    kill_benchmark.make_copy(tmp_path / "copy", 1, 1)
    command = kill_benchmark.Command(tmp_path / "copy", 1)
    if not alive:
        assert command.kill("plan", 0.0, alone=True) is not None
    while alive and not command.began:
        time.sleep(0.01)
    words = [
        "--cores",
        "1",
        "--configfile",
        kill_benchmark.CONFIGURATION,
        "--until",
        "plan",
        "--",
        "results/killed/success.csv",
    ]
    second = subprocess.run(
        [sys.executable, "-m", "snakemake", *words],
        cwd=tmp_path / "copy",
        capture_output=True,
        text=True,
    )
    command.stop()
    assert (second.returncode != 0) == alive, second.stderr
    assert ("cannot be locked" in second.stdout + second.stderr) == alive
    assert len(list(tmp_path.glob("copy/results/demos/*/*/manifest.json"))) == (not alive)
