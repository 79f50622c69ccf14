"""The whole chain once, at its smallest, with the real planner, simulator, reader and model.

Then: what makes it stale, what brings a deleted file back, and what the user sees.
"""

import functools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import pandas
import pytest
import yaml
from slurm_cluster import PROGRAMS, SlurmCluster, find_programs

from demo2eval.fold_dag import fold

ROOT = Path(__file__).resolve().parents[1]
TARGET = "results/smallest/success.csv"
ROLLOUTS_AND_AFTER = {"rollout": 2, "video": 1, "success_table": 1}
TRAINING_AND_AFTER = {"train": 1, "loss_curve": 1, "rollout": 1, "video": 1, "success_table": 1}
pytestmark = pytest.mark.simulator


def snakemake(
    directory: Path, *words: str, target: str = TARGET, **changes: dict
) -> subprocess.CompletedProcess[str]:
    """Run Snakemake on the smallest configuration, with changes to `runs` and `tasks`."""
    (directory / "changes.yaml").write_text(yaml.safe_dump({"runs": {}} | changes))
    command = [sys.executable, "-m", "snakemake", target, *words]
    command += ["--configfile", "tests/config/smallest.yaml", "changes.yaml"]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    return subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True)


def planned_jobs(directory: Path, target: str = TARGET, **changes: dict) -> dict[str, int]:
    """Return {rule: number of jobs} that would run."""
    result = snakemake(directory, "--dry-run", target=target, **changes)
    said = result.stdout + result.stderr
    assert result.returncode == 0, said
    if "Nothing to be done" in said:
        return {}
    table = said.split("Job stats:")[1].split("\n\n")[0]
    jobs = re.findall(r"^(\w+) +(\d+)$", table, re.MULTILINE)
    return {rule: int(count) for rule, count in jobs if rule != "total"}


@pytest.fixture(scope="module")
def checkout(tmp_path_factory) -> Path:
    """A copy of the repository, so that its modules can be edited, in which the chain has run."""
    directory = tmp_path_factory.mktemp("checkout")
    for name in ("workflow", "config", "tests/config"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, directory / name, ignore=ignored)
    shutil.copy(ROOT / "Snakefile", directory)
    (directory / "profiles").symlink_to("workflow/profiles")
    (directory / "envs/planning").mkdir(parents=True)
    (directory / "envs/planning/.venv").symlink_to(ROOT / "envs/planning/.venv")
    result = snakemake(directory, "--cores", "2")
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-6000:]
    assert re.search(r"^smallest: \d of 2 episodes at step 2", result.stderr, re.MULTILINE)
    return directory


@pytest.fixture
def edit(checkout):
    """A function that edits a file of the checkout; the file is put back at the end."""
    originals = {}

    def change(name: str, function: Callable[[str], str]) -> None:
        file = checkout / name
        originals.setdefault(file, file.read_bytes())
        file.write_text(function(file.read_text()))

    yield change
    for file, content in originals.items():
        file.write_bytes(content)


def with_training(**training) -> dict:
    """Return a change to the training of the smallest run."""
    return {"smallest": {"training": training}}


def test_the_chain_ends_in_a_table(checkout):
    table = pandas.read_csv(checkout / TARGET)
    assert list(table["step"]) == [0, 2]
    assert (table["episodes"] == 2).all()
    assert (table["success_at_end"] <= table["success_once"]).all()
    assert (table["ci_low"] <= table["success_once"]).all()
    assert (table["success_once"] <= table["ci_high"]).all()
    assert (checkout / "results/smallest/success.png").stat().st_size > 10_000
    run = checkout / "results/smallest"
    assert (run / "dataset/contact_sheet.png").stat().st_size > 10_000
    assert "<video" in (run / "videos/2.html").read_text()
    page = (run / "provenance.html").read_text()
    # Each name leads to its row, and the demos' seeds are among them.
    links, rows = (set(re.findall(key, page)) for key in (r'href="#(\w+)"', r'<tr id="(\w+)"'))
    assert links <= rows
    assert re.search(r"<summary>plan: 2</summary>.*?>1000000-1000001<", page, re.DOTALL)
    metrics = pandas.read_csv(checkout / "results/smallest/metrics.csv")
    assert metrics.step.tolist() == [1, 2]
    assert (checkout / "results/smallest/loss.png").stat().st_size > 10_000
    assert (checkout / "results/smallest/videos/2.mp4").stat().st_size > 1_000
    log = (checkout / "results/smallest/logs/train_2.log").read_text()
    assert "training.peak_lr: 0.001" in log
    assert not [file for file in checkout.rglob("*.log") if b"\r" in file.read_bytes()]


def test_the_demonstrations_were_executed_before_training(checkout):
    manifest = json.loads((checkout / "results/smallest/preflight.json").read_text())
    assert manifest["metadata"]["success_of_demos"] == 1


def test_a_changed_preflight_trains_and_evaluates_nothing_again(checkout, edit):
    edit("workflow/demo2eval/evaluation/preflight.py", lambda text: text + "\nEDITED = 1\n")
    assert planned_jobs(checkout) == {"preflight": 1}


def test_checkpoints_are_compared_on_the_same_seeds(checkout):
    target = "results/comparisons/smallest.csv"
    result = snakemake(checkout, "--cores", "1", target=target)
    assert result.returncode == 0, result.stderr
    table = pandas.read_csv(checkout / target)
    assert table[["step", "other_step", "episodes"]].values.tolist() == [[2, 0, 2]]


def test_a_number_leads_back_to_the_seeds_of_the_demos(checkout):
    manifest = json.loads((checkout / "results/smallest/rollouts/2.json").read_text())
    seeds = []
    while manifest["stage"] != "plan":
        sources = [item for group in manifest["inputs"].values() for item in group]
        manifest = json.loads((checkout / sources[-1]["path"]).read_text())
        seeds = manifest["metadata"].get("seeds", seeds)
    assert all(seed >= 1_000_000 for seed in seeds)


def test_nothing_changed_nothing_runs(checkout):
    assert planned_jobs(checkout) == {}


def test_a_learning_rate_reruns_training_and_what_follows(checkout):
    assert planned_jobs(checkout, runs=with_training(peak_lr=0.002)) == TRAINING_AND_AFTER


def test_the_training_augmentation_leaves_the_data_alone(checkout, edit):
    assert planned_jobs(checkout, runs=with_training(random_shift=2)) == TRAINING_AND_AFTER
    edit("workflow/demo2eval/training/augmentation.py", lambda text: text + "\nEDITED = 1\n")
    assert planned_jobs(checkout) == TRAINING_AND_AFTER


def test_more_steps_run_only_the_new_ones(checkout):
    more = planned_jobs(checkout, runs=with_training(num_train_steps=4))
    assert more == TRAINING_AND_AFTER


def test_a_milestone_reruns_the_rollouts_alone(checkout):
    tasks = {"PushCube-v1": {"milestones": {"reach_distance": 0.1}}}
    assert planned_jobs(checkout, tasks=tasks) == ROLLOUTS_AND_AFTER


def test_a_seventh_task_leaves_the_others_alone(checkout):
    """LiftPegUpright-v1 is ManiSkill's; nothing of it is in our code."""
    task = {
        "prompt": "stand the peg upright",
        "longest_demo": 100,
        "object": "peg",
        "milestones": {"names": ["reach", "upright"]},
    }
    changes = {"tasks": {"LiftPegUpright-v1": task}}
    assert planned_jobs(checkout, **changes) == {}
    lift = {"lift": {"extends": "smallest", "task": "LiftPegUpright-v1"}}
    jobs = planned_jobs(checkout, "results/lift/success.csv", **changes, runs=lift)
    assert (jobs["plan"], jobs["rollout"]) == (2, 2)


def test_worker_counts_and_touched_files_make_nothing_stale(checkout):
    assert planned_jobs(checkout, runs={"smallest": {"evaluation": {"num_workers": 7}}}) == {}
    for file in (checkout / "workflow").rglob("*.py"):
        file.touch()
    assert planned_jobs(checkout) == {}


def test_an_edited_module_reruns_its_stage_and_restored_is_fresh(checkout, edit):
    name = "workflow/demo2eval/evaluation/success_table.py"
    edit(name, lambda text: text + "\nEDITED = 1\n")
    assert planned_jobs(checkout) == {"success_table": 1}
    edit(name, lambda text: text.removesuffix("\nEDITED = 1\n"))
    assert planned_jobs(checkout) == {}


def test_an_edit_deep_in_the_model_reruns_training_but_not_the_data(checkout, edit):
    edit("workflow/demo2eval/pi0/gemma.py", lambda text: text + "\nEDITED = 1\n")
    # What training starts from does not depend on what the layers compute, but its rollout does.
    assert planned_jobs(checkout) == TRAINING_AND_AFTER | {"rollout": 2}


@pytest.mark.parametrize(
    "module", ["data/plan", "data/dataset", "training/train", "evaluation/rollout"]
)
def test_a_comment_and_a_docstring_rerun_nothing(checkout, edit, module):
    def reword(text: str) -> str:
        return text.replace('"""', '"""Reworded. ', 1) + "\n# a comment\n"

    edit(f"workflow/demo2eval/{module}.py", reword)
    assert planned_jobs(checkout) == {}


def test_another_run_shares_the_data(checkout):
    twin = {"twin": {"extends": "smallest", "seed": 1}}
    jobs = planned_jobs(checkout, "results/twin/success.csv", runs=twin)
    assert not {"plan", "replay", "dataset", "image_cache"} & set(jobs)
    assert jobs["train"] == 1


def test_to_skip_invalid_demos_concerns_the_dataset(checkout):
    skip = {"smallest": {"demos": {"on_invalid": "skip"}}}
    jobs = planned_jobs(checkout, runs=skip)
    assert not {"plan", "replay"} & set(jobs)
    assert jobs["dataset"] == 1


@pytest.mark.parametrize(
    "name",
    ["videos/2.mp4", "norm_stats/norm_stats.json", "rollouts/0.csv", "checkpoints/2/metrics.csv"],
)
def test_a_deleted_file_comes_back(checkout, name):
    file = checkout / "results/smallest" / name
    content = file.read_bytes()
    file.unlink()
    target = f"results/smallest/{name}"
    assert snakemake(checkout, "--cores", "2", target=target).returncode == 0
    assert file.read_bytes() == content
    assert snakemake(checkout, "--cores", "2").returncode == 0
    assert planned_jobs(checkout) == {}


@pytest.mark.parametrize(
    "words",
    [
        ["--dag", "dot"],
        ["--rulegraph", "mermaid-js"],
        ["--summary"],
        ["--list-changes", "code"],
    ],
    ids=lambda words: words[0],
)
def test_snakemakes_views_need_no_cores(checkout, words):
    result = snakemake(checkout, *words)
    assert result.returncode == 0, result.stderr


def test_a_report_shows_all_figures_and_makes_nothing_stale(checkout):
    assert snakemake(checkout, "--cores", "2", target="report").returncode == 0
    for file in ("report.html", "report.zip"):
        result = snakemake(checkout, "--report", file, target="report")
        assert result.returncode == 0, result.stderr
    html = (checkout / "report.html").read_text()
    (results,) = re.findall(r"^    var results = (.*);$", html, re.MULTILINE)
    entries = json.loads(results)
    shown = {path.removeprefix("results/smallest/") for path in entries}
    assert shown >= {
        *("success.csv", "success.png", "milestones.png", "loss.png", "throughput.png"),
        *("dataset/contact_sheet.png", "dataset/action_histograms.png"),
        *("dataset/demo_lengths.png", "videos/2.html", "provenance.html"),
        "results/success_curves.png",
    }
    for entry in entries.values():
        assert entry["caption"]
        # Chromium shows no page above 2 MiB inside a report.
        assert entry["mime_type"] != "text/html" or len(entry["data_uri"]) < 2 << 20
    with zipfile.ZipFile(checkout / "report.zip") as file:
        assert len(file.namelist()) == len(entries) + 1
    assert planned_jobs(checkout) == {}
    assert planned_jobs(checkout, "report") == {}


def test_the_readmes_graph_has_the_rules_of_the_chain(checkout):
    graph = re.search(r"```mermaid\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert graph
    rules = set(re.findall(r"[a-z_]{4,}", re.sub(r'"[^"]*"|flowchart', "", graph[1])))
    result = snakemake(checkout, "--rulegraph", "mermaid-js")
    assert rules == set(re.findall(r"\[(\w+)\]", result.stdout))


def test_own_files_are_named_by_their_content(checkout, pushcube_demos):
    """Nothing in a path or a prompt is executed; moved, the files make nothing again."""
    words = """it's "$(touch executed)" `touch executed` | > executed & ; * #"""
    folder, moved = checkout / words, checkout / "moved"
    folder.mkdir()
    for suffix in (".h5", ".json"):
        copy = folder / f"my demos{suffix}"
        copy.write_bytes(pushcube_demos.with_name(f"trajectory{suffix}").read_bytes())
    run = {"extends": "smallest", "prompt": words, "demos": {"source": words, "num_demos": "all"}}
    target, until = "results/own/success.csv", ["--cores", "2", "--until", "import_demos"]
    result = snakemake(checkout, *until, target=target, runs={"own": run})
    assert result.returncode == 0, result.stderr
    manifests = sorted(checkout.glob("results/demos/pushcube-file-*/shard-*/manifest.json"))
    imported = [json.loads(manifest.read_text())["metadata"]["demos"] for manifest in manifests]
    assert imported == [2, 1]
    assert not list(checkout.rglob("executed*"))
    folder.rename(moved)
    run["demos"]["source"] = "moved/*.h5"
    result = snakemake(checkout, *until, target=target, runs={"own": run})
    assert result.returncode == 0, result.stderr
    assert "no job needs to run" in result.stderr


def test_a_job_that_fails_is_a_sentence_and_a_log(checkout, pushcube_demos):
    own = checkout / "spoilt.h5"
    own.write_bytes(pushcube_demos.with_name("trajectory.h5").read_bytes()[:20_000])
    own.with_suffix(".json").write_bytes(pushcube_demos.with_name("trajectory.json").read_bytes())
    runs = {"own": {"extends": "smallest", "demos": {"source": "spoilt.h5"}}}
    result = snakemake(checkout, "--cores", "2", target="results/own/success.csv", runs=runs)
    assert result.returncode != 0
    said = result.stdout + result.stderr
    # One of each shard.
    shown, _ = re.findall(r"^import_demos failed: spoilt.h5: cannot be read.*", said, re.MULTILINE)
    log, _ = re.findall(r"^  log: (.*)", said, re.MULTILINE)
    text = (checkout / log).read_text()
    assert text.splitlines()[-1].removeprefix("demo2eval: error: ") in shown
    assert not {"Traceback", "wrapped", "common.smk", "Error in rule"} & set(
        re.split(r"[\s,]", said)
    )
    assert (checkout / "results/own/logs/demos" / Path(log).name).read_text() == text


def test_stale_results_without_snakemakes_records_are_named(checkout):
    records, kept = checkout / ".snakemake/metadata", checkout / ".snakemake/kept"
    records.rename(kept)
    try:
        unchanged = snakemake(checkout, "--dry-run")
        changed = snakemake(checkout, "--dry-run", runs=with_training(peak_lr=0.002))
    finally:
        shutil.rmtree(records, ignore_errors=True)
        kept.rename(records)
    assert "was made with" not in unchanged.stderr
    assert re.findall(r"(\S+) was made with .* \((.*?)\)", changed.stderr) == [
        ("results/smallest/checkpoints/2.json", "training.peak_lr")
    ]


def test_the_workflow_is_usable_as_a_module(checkout, tmp_path):
    (tmp_path / "Snakefile").write_text(
        f"""
configfile: "{checkout}/config/config.yaml"
configfile: "{checkout}/tests/config/smallest.yaml"
module demo2eval:
    snakefile: "{checkout}/workflow/Snakefile"
    config: config
use rule * from demo2eval as demo2eval_*
"""
    )
    words = ["--cores", "2", "--until", "demo2eval_dataset"]
    command = [sys.executable, "-m", "snakemake", TARGET, *words]
    result = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert list(tmp_path.glob("results/datasets/*/manifest.json"))


def test_full_size_plans_the_whole_chain(checkout):
    jobs = planned_jobs(checkout, target="results/stackcube/success.csv")
    assert (jobs["plan"], jobs["replay"], jobs["train"], jobs["rollout"]) == (8, 8, 60, 61)
    graph = snakemake(checkout, "--dag", "mermaid-js", target="results/stackcube/success.csv")
    folded = fold(graph.stdout)
    assert "train<br/>stackcube<br/>60 steps: 500 to 30000<br/>to do" in folded
    assert folded.count('["') == len(jobs) == 13


def test_missing_weights_stop_before_any_work(checkout):
    result = snakemake(checkout, "--cores", "2", target="results/stackcube/success.csv")
    assert result.returncode != 0
    assert "weights/pi05_base" in result.stderr
    assert "from scratch" in result.stderr
    assert not list(checkout.glob("results/demos/stackcube*"))


def test_demonstrated_seeds_are_refused_before_any_job(checkout, pushcube_demos):
    """ManiSkill's planner script numbers seeds from 0, and so does an evaluation."""
    metadata = json.loads(pushcube_demos.with_name("trajectory.json").read_text())
    for seed, episode in enumerate(metadata["episodes"]):
        episode["episode_seed"] = seed
    (checkout / "own.h5").touch()
    (checkout / "own.json").write_text(json.dumps(metadata))
    own = {"own": {"extends": "smallest", "demos": {"source": "own.h5"}}}
    result = snakemake(checkout, "--dry-run", target="results/own/success.csv", runs=own)
    said = result.stdout + result.stderr
    assert result.returncode != 0
    assert "runs.own.evaluation.first_seed to 3" in said
    assert "common.smk" not in said


@pytest.mark.parametrize(
    ("changed", "expected"),
    [
        ({"training": {"stepps": 6}}, "unknown key 'stepps'"),
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


def test_an_unknown_run_lists_the_runs(checkout):
    result = snakemake(checkout, "--dry-run", target="results/smalest/success.csv")
    said = result.stdout + result.stderr
    assert "Did you mean 'smallest'?" in said
    assert "--configfile" in said


def test_a_cluster_is_asked_for_what_a_full_size_job_takes(checkout):
    pytest.importorskip("snakemake_executor_plugin_slurm")
    words = ["--dry-run", "--cores", "64", "--workflow-profile", "slurm"]
    words += ["--profile", "workflow/profiles/slurm/site.yaml"]
    result = snakemake(checkout, *words, target="results/stackcube/success.csv")
    assert result.returncode == 0, result.stderr
    jobs = re.findall(r"^rule (\w+):\n(.*?)\n\[", result.stdout, re.MULTILINE | re.DOTALL)
    asked = {
        rule: dict(re.findall(r"(\w+)=([^,\n]*)", text.split("resources: ")[1]))
        for rule, text in jobs
        if rule not in ("loss_curve", "success_table")  # these run on the login node
    }
    assert asked.keys() >= {"plan", "replay", "dataset", "init_checkpoint", "train", "rollout"}
    assert all({"mem_mb", "runtime"} <= resources.keys() for resources in asked.values())
    assert (asked["plan"]["slurm_partition"], "gpu" in asked["plan"]) == ("cpu", False)
    train = asked["train"]
    assert [train[key] for key in ("slurm_partition", "gpu", "gpu_model")] == ["gpu", "1", "h100"]
    # 3.3 G parameters, 20 bytes each; 128,000 samples.
    assert 60_000 < int(train["mem_mb"]) < 90_000
    assert 60 < int(train["runtime"]) < 240
    assert int(asked["rollout"]["mem_mb"]) < int(train["mem_mb"])


@pytest.fixture
def cluster():
    """A SLURM of one node with two GPUs; its sockets need a short path."""
    if missing := set(PROGRAMS) - set(find_programs()):
        pytest.skip(
            f"there is no {', '.join(sorted(missing))}: envs/setup.py --slurm could not help"
        )
    with tempfile.TemporaryDirectory(prefix="slurm-", dir="/tmp") as folder:
        cluster = SlurmCluster(Path(folder))
        yield cluster
        cluster.stop()


def visible_gpus(job: str) -> set[str]:
    """Return the CUDA_VISIBLE_DEVICES of our processes in a job of SLURM."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            variables = (process / "environ").read_text().split("\0")
            command = (process / "cmdline").read_text()
        except OSError:
            continue
        if f"SLURM_JOB_ID={job}" in variables and "--output" in command:
            found |= {item for item in variables if item.startswith("CUDA_VISIBLE_DEVICES=")}
    return found


def wait_for(condition: Callable, seconds: float = 180):
    """Wait until a condition is true, and return its value."""
    end = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < end, "it did not come true"
        time.sleep(0.5)
    return value


def test_on_slurm_a_new_head_adopts_the_jobs_of_a_killed_one(checkout, cluster, tmp_path):
    """Training and a rollout run at a time; Snakemake is killed, and both go on."""
    directory = tmp_path / "checkout"
    shutil.copytree(checkout, directory, symlinks=True)
    run = directory / "results/smallest"
    undisturbed = pandas.read_csv(run / "success.csv").drop(columns="wall_time_s")
    (run / "success.csv").unlink()
    shutil.rmtree(run / "rollouts")
    for path in [*run.glob("checkpoints/2*"), *run.glob("checkpoints/.2*")]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    words = [
        *(sys.executable, "-m", "snakemake", TARGET, "--workflow-profile", "slurm"),
        *("--slurm-init-seconds-before-status-checks", "1", "--latency-wait", "5"),
        *("--seconds-between-status-checks", "1"),
        *("--configfile", "tests/config/smallest.yaml"),
    ]
    environment = {key: value for key, value in cluster.environment.items() if key != "PYTHONPATH"}

    def head(*more: str) -> subprocess.Popen:
        with open(tmp_path / "head.log", "a") as log:
            return subprocess.Popen(
                [*words, *more], cwd=directory, env=environment, stdout=log, stderr=log
            )

    def jobs() -> dict[str, tuple[str, str]]:
        """Return {comment: (id, what it waits for)} of the queue; the newest of a name."""
        queue = cluster.command("squeue", "--noheader", "--sort=i", "--format=%k %i %E")
        rows = map(str.split, queue.splitlines())
        return {name: (job, after) for name, job, after in rows}

    first = head()
    train, rollout = "rule_train_wildcards_smallest_2", "rule_rollout_wildcards_smallest_0"
    wait_for(lambda: {train, rollout} <= set(jobs()))
    ids = [jobs()[name][0] for name in (train, rollout)]
    # They stand still until the new head has found them.
    gpus = []
    for job in ids:
        gpus += wait_for(functools.partial(visible_gpus, job))
        cluster.command("scancel", "--signal=STOP", job)
    assert sorted(gpus) == ["CUDA_VISIBLE_DEVICES=0", "CUDA_VISIBLE_DEVICES=1"]
    first.send_signal(signal.SIGKILL)
    first.wait()
    assert head("--unlock").wait() == 0
    second = head()
    waiting = [f"afterany:{job}(unfulfilled)" for job in ids]
    wait_for(lambda: [jobs()[name][1] for name in (train, rollout)] == waiting)
    for job in ids:
        cluster.command("scancel", "--signal=CONT", job)
    said = (tmp_path / "head.log").read_text
    assert second.wait(timeout=900) == 0, said()[-5000:]
    for log in ("train_2", "rollout_0"):
        assert "reused" in (run / f"logs/{log}.log").read_text()
    pandas.testing.assert_frame_equal(
        pandas.read_csv(run / "success.csv").drop(columns="wall_time_s"), undisturbed
    )
