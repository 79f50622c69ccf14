"""Nothing is lost: the chain up to the dataset, killed in each stage, ends as if left alone."""

import pytest
from benchmark_modules import load_benchmark

kill_benchmark = load_benchmark("kill")


@pytest.mark.simulator
def test_killed_in_each_stage_the_same_command_ends_the_same(tmp_path):
    # Seed 44 kills early in each stage: a machine that is faster than before is met as well.
    kills, lost = kill_benchmark.run(
        tmp_path, instants=3, seed=44, shards=1, demonstrations=1, cores=2
    )
    assert [kill.rule for kill in kills] == ["plan", "replay", "dataset"]
    assert all(kill.seconds is not None and kill.kept for kill in kills)
    assert lost == {"killed-0": []}
    # What is compared is there.
    assert list(tmp_path.glob("undisturbed/results/datasets/*/lerobot/**/*.mp4"))


@pytest.mark.simulator
def test_a_killed_snakemake_is_unlocked_and_its_living_job_is_reused(tmp_path):
    """The job of a killed Snakemake lives on; after --unlock the same command waits for it."""
    folder = tmp_path / "copy"
    kill_benchmark.make_copy(folder, 1, 1)
    assert kill_benchmark.Command(folder, 1).kill("plan", 4.0, alone=True) is not None
    words = ["--cores", "1", "--configfile", kill_benchmark.CONFIGURATION, "--until", "plan"]
    locked = kill_benchmark.snakemake(folder, *words, "--", kill_benchmark.TARGET)
    assert locked.returncode != 0
    assert "--unlock" in locked.stdout + locked.stderr
    kill_benchmark.snakemake(folder, "--unlock", *words, "--", kill_benchmark.TARGET)
    again = kill_benchmark.snakemake(folder, *words, "--", kill_benchmark.TARGET)
    assert again.returncode == 0, again.stderr
    (log,) = folder.glob("results/demos/*/logs/plan-*.log")
    assert "reused" in log.read_text()
