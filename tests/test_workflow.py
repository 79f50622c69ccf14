"""The whole chain once, at its smallest, with the real planner, simulator, reader and model; then what makes it stale."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pandas
import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
TARGET = "results/smallest/success.csv"
TRAINING_AND_AFTER = {"train_segment": 1, "rollout": 1, "video": 1, "success_table": 1}


def snakemake(
    directory: Path, *arguments: str, target: str = TARGET, runs: dict | None = None
) -> subprocess.CompletedProcess:
    """Run Snakemake on the smallest configuration, with changes to its runs."""
    changes = directory / "changes.yaml"
    changes.write_text(yaml.safe_dump({"runs": runs or {}}))
    configuration = ["--configfile", "tests/config/smallest.yaml", str(changes)]
    command = [
        sys.executable,
        "-m",
        "snakemake",
        target,
        "--cores",
        "2",
        *arguments,
        *configuration,
    ]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)


def planned(directory: Path, target: str = TARGET, **runs: dict) -> dict[str, int]:
    """Return {rule: number of jobs} that would run with changes to runs."""
    result = snakemake(directory, "--dry-run", target=target, runs=runs)
    assert result.returncode == 0, result.stdout + result.stderr
    said = result.stdout + result.stderr
    if "Nothing to be done" in said:
        return {}
    table = said.split("Job stats:")[1].split("\n\n")[0]
    return {
        rule: int(count)
        for rule, count in re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)
        if rule != "total"
    }


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the repository, so that its modules can be edited, in which the chain has run."""
    directory = tmp_path_factory.mktemp("checkout")
    for name in ("workflow", "config", "profiles", "tests/config"):
        shutil.copytree(ROOT / name, directory / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", directory)
    (directory / "envs/planning").mkdir(parents=True)
    (directory / "envs/planning/.venv").symlink_to(ROOT / "envs/planning/.venv")
    result = snakemake(directory)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    return directory


@pytest.fixture
def edited(checkout):
    """A function that edits a file of the checkout; the file is put back at the end."""
    originals = {}

    def edit(name: str, change) -> None:
        file = checkout / name
        originals.setdefault(file, file.read_bytes())
        file.write_text(change(file.read_text()))

    yield edit
    for file, content in originals.items():
        file.write_bytes(content)


def test_the_chain_ends_in_a_table(checkout):
    table = pandas.read_csv(checkout / TARGET)
    assert list(table["step"]) == [0, 2]
    assert (table["episodes"] == 2).all()
    assert (table["success_at_end"] <= table["success_once"]).all()
    assert (
        (table["ci_low"] <= table["success_once"]) & (table["success_once"] <= table["ci_high"])
    ).all()
    assert (checkout / "results/smallest/success.png").stat().st_size > 10_000
    assert (checkout / "results/smallest/videos/2.mp4").stat().st_size > 1_000


def test_nothing_changed_nothing_runs(checkout):
    assert planned(checkout) == {}


def test_a_learning_rate_reruns_training_and_what_follows(checkout):
    assert planned(checkout, smallest={"training": {"peak_lr": 0.002}}) == TRAINING_AND_AFTER


def test_more_steps_run_only_the_new_segments(checkout):
    more = planned(checkout, smallest={"training": {"steps": 4}})
    assert more == {"train_segment": 1, "rollout": 1, "video": 1, "success_table": 1}


def test_worker_counts_and_touched_files_make_nothing_stale(checkout):
    assert planned(checkout, smallest={"evaluation": {"workers": 7}}) == {}
    for file in (checkout / "workflow").rglob("*.py"):
        file.touch()
    assert planned(checkout) == {}


def test_an_edited_module_reruns_its_stage_and_restored_is_fresh(checkout, edited):
    edited("workflow/demo2eval/success_table.py", lambda text: text + "\nEDITED = 1\n")
    assert planned(checkout) == {"success_table": 1}
    edited("workflow/demo2eval/success_table.py", lambda text: text.removesuffix("\nEDITED = 1\n"))
    assert planned(checkout) == {}


def test_an_edit_deep_in_the_model_reruns_training_but_not_the_data(checkout, edited):
    edited("workflow/demo2eval/pi0/gemma.py", lambda text: text + "\nEDITED = 1\n")
    # The weights that training starts from do not depend on what the layers compute, but their rollout does.
    assert planned(checkout) == TRAINING_AND_AFTER | {"rollout": 2}


def test_a_comment_and_a_docstring_rerun_nothing(checkout, edited):
    for name in ("plan", "dataset", "train_segment", "rollout"):
        edited(
            f"workflow/demo2eval/{name}.py",
            lambda text: text.replace('"""', '"""Reworded. ', 1) + "\n# a comment\n",
        )
    assert planned(checkout) == {}


def test_another_run_shares_the_data(checkout):
    smallest = yaml.safe_load((ROOT / "tests/config/smallest.yaml").read_text())["runs"]["smallest"]
    twin = smallest | {"training": smallest["training"] | {"seed": 1}}
    jobs = planned(checkout, target="results/twin/success.csv", twin=twin)
    assert not {"plan", "replay", "dataset", "training_cache"} & set(jobs)
    assert jobs["train_segment"] == 1


def test_skipping_bad_demonstrations_begins_at_the_replay_and_refusing_changes_nothing(checkout):
    assert planned(checkout, smallest={"demos": {"on_invalid": "error"}}) == {}
    jobs = planned(checkout, smallest={"demos": {"on_invalid": "skip"}})
    assert "plan" not in jobs
    assert jobs["replay"] >= 1


def test_full_size_plans_the_whole_chain(checkout):
    jobs = planned(checkout, target="results/stackcube/success.csv")
    assert (jobs["plan"], jobs["replay"], jobs["train_segment"], jobs["rollout"]) == (8, 8, 60, 61)


def test_missing_weights_stop_before_any_work(checkout):
    result = snakemake(checkout, target="results/stackcube/success.csv")
    assert result.returncode != 0
    assert "weights/pi05_base" in result.stderr
    assert "from scratch" in result.stderr
    assert not list(checkout.glob("results/demos/stackcube*"))


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"training": {"stepps": 6}}, "'steps'"),
        ({"task": "PushCubes-v1"}, "'PushCube-v1'"),
    ],
)
def test_a_wrong_configuration_is_a_sentence(checkout, changed, expected):
    result = snakemake(checkout, "--dry-run", runs={"smallest": changed})
    # A dry run writes its messages to the other stream than a real one.
    said = result.stdout + result.stderr
    assert result.returncode != 0
    assert expected in said
    assert "Traceback" not in said
