# Helper functions of the rules; no rule.
#
# Demonstrations, replays, datasets and image caches are shared: their names end in a hash of all
# settings that made them. Runs with equal settings share the work, and changed settings make new work
# beside the old.

import csv
import hashlib
import json
import os
import subprocess
import sys
from base64 import urlsafe_b64encode
from functools import cache
from operator import attrgetter
from pathlib import Path

from snakemake.logging import logger

WORKFLOW = Path(str(workflow.current_basedir)).parent
sys.path.insert(0, str(WORKFLOW))

from demo2eval import config as settings
from demo2eval.data import sources
from demo2eval.doctor import read_environment
from demo2eval.errors import UserError
from demo2eval.fingerprint import code_fingerprint
from demo2eval.provenance import read_manifest

CHEAP_TRAINING_S = 600  # finished training below this is repeated without a question
PLANNING_PYTHON = WORKFLOW.parent / "envs/planning/.venv/bin/python"
python_path = [str(WORKFLOW), *filter(None, [os.environ.get("PYTHONPATH")])]
# Jobs inherit these. They stand in no command, so another machine's Python makes nothing stale. What
# one job compiled, the next one need not.
os.environ |= read_environment() | {
    "DEMO2EVAL_VERBOSE": str(int(workflow.output_settings.verbose)),
    "PYTHON": sys.executable,
    "PLANNING_PYTHON": str(PLANNING_PYTHON),
    "PYTHONPATH": os.pathsep.join(python_path),
    "JAX_COMPILATION_CACHE_DIR": "results/.jax_cache",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "1",
}

try:
    RUNS = settings.load(config)
except UserError as error:
    raise WorkflowError(f"the configuration is wrong:\n{error}")


def get_run(name):
    """The settings of a run, a `demo2eval.config.Run`."""
    if name not in RUNS:
        raise WorkflowError(
            f"there is no run {name!r} in the configuration.{settings.suggest(name, RUNS)} There are "
            f"{', '.join(RUNS)}. Runs of another file need --configfile."
        )
    return RUNS[name]


def code(module):
    """A hash of what a module and its imports do, for `params`: an edit of words makes nothing stale."""
    return code_fingerprint(f"demo2eval.{module}")


def section(name, of=lambda wildcards: get_run(wildcards.run)):
    """For `params`: a section of the configuration, as JSON for the module's command line.

    Args:
        name: of the section.
        of: from wildcards to the run.
    """
    return lambda wildcards: json.dumps(getattr(of(wildcards), name).result_settings())


def field(name, of=lambda wildcards: get_run(wildcards.run)):
    """For `params`: one setting, such as "task" or "demos.num_demos"."""
    return lambda wildcards: attrgetter(name)(of(wildcards))


def in_report(file, category, figure):
    """An output that Snakemake's report shows, with its caption from workflow/report.

    Args:
        category: of the report's menu.
        figure: what it shows; the caption's file name, with spaces.
    """

    def labels(wildcards):
        step = {"checkpoint": wildcards.step} if "step" in wildcards.keys() else {}
        task = get_run(wildcards.run).task
        return {"figure": figure, "run": wildcards.run, "task": task} | step

    caption = f"../report/{figure.replace(' ', '_')}.rst"
    return report(file, caption=caption, category=category, labels=labels)


def schedule(name):
    """For `resources`: a setting that decides how fast or how safely work is done; as text."""
    value_of = field(name)
    return lambda wildcards: json.dumps(value_of(wildcards))


def goes_to_cluster():
    """Whether jobs will be submitted (--jobs), and this is not the Snakemake of such a job."""
    return workflow.resource_settings.nodes and not workflow.remote_exec


def request(name):
    """For `resources`: what `demo2eval.requests` says of a run, if jobs go to a cluster, else None."""

    def evaluate(wildcards):
        if not goes_to_cluster():
            return None
        # JAX takes seconds to import.
        from demo2eval import requests

        return getattr(requests, name)(get_run(wildcards.run))

    return evaluate


@cache
def jobs_left():
    """Jobs in SLURM's queue that a former Snakemake submitted from this folder: {comment: id}."""
    command = ["squeue", "--noheader", "--user", str(os.getuid()), "--format", "%i|%Z|%k"]
    try:
        queue = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return {}
    rows = (line.split("|", 2) for line in queue.splitlines())
    return {comment: job for job, folder, comment in rows if folder == os.getcwd()}


def slurm(*options):
    """For `slurm_extra` in `resources`: options of sbatch.

    A job that a former Snakemake left in the queue goes on. Its duplicate starts after it, so that
    it holds nothing meanwhile, and reuses what it finished.
    """

    def evaluate(wildcards, attempt, rulename):
        if not goes_to_cluster():
            return None
        # The comment that the SLURM plugin gives its jobs.
        comment = f"rule_{rulename}_wildcards_{'_'.join(wildcards).replace(os.sep, '_')}"
        job = jobs_left().get(comment) if attempt == 1 else None
        after = [f"--dependency=afterany:{job}"] if job else []
        return " ".join([*options, *after]) or None

    return evaluate


def as_json(wildcards, input):
    """For `params`: all input files as a JSON list."""
    return json.dumps(list(input))


def input_as_json(name):
    """For `params`: the input files of a name as a JSON list."""
    return lambda wildcards, input: json.dumps(list(input[name]))


# Names of shared work: <task>-<stage>-<hash of all settings that made it>.


def shared_name(run, stage, *values):
    task = run.task.removesuffix("-v1").lower()
    text = json.dumps(values, sort_keys=True)
    return f"{task}-{stage}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def demos_name(run):
    demos = run.demos
    values = [run.task, run.robot, demos.shard_size]
    if demos.source == "plan":
        return shared_name(run, "planned", *values, demos.first_seed)
    if demos.source == "published":
        return shared_name(run, "published", *values, demos.on_invalid)
    files = sources.list_files(demos.source)
    return shared_name(run, "file", *values, sources.content_id(files), demos.on_invalid)


def replay_name(run):
    return shared_name(run, "replayed", demos_name(run), run.object, run.replay.result_settings())


def dataset_name(run):
    demos = run.demos
    values = [run.prompt, demos.num_demos, demos.on_invalid, run.dataset.result_settings()]
    return shared_name(run, "dataset", replay_name(run), *values)


def image_cache_name(run):
    return shared_name(run, "images", dataset_name(run), run.pi0_config().siglip.image_size)


def sharing(naming, wildcard):
    """For `of`: from the name of shared work back to a run that uses it; any of them will do."""

    @cache
    def list_runs():
        return {naming(run): run for run in RUNS.values()}

    def find(wildcards):
        name, runs = getattr(wildcards, wildcard), list_runs()
        if name not in runs:
            raise WorkflowError(
                f"no run of the configuration needs {name!r} any more; ask for "
                "results/<run>/success.csv."
            )
        return runs[name]

    return find


run_of_demos = sharing(demos_name, "demos")
run_of_replay = sharing(replay_name, "replay")
run_of_dataset = sharing(dataset_name, "dataset")
run_of_image_cache = sharing(image_cache_name, "cache")


# Paths of inputs.


def archive_of_demos(wildcards):
    """What ManiSkill has published, if the shard is of that."""
    return [f"results/demos/{wildcards.demos}/archive.json"] * ("-published-" in wildcards.demos)


def source_files(run):
    """The trajectory files that shards are imported from."""
    if run.demos.source == "published":
        return [Path(f"results/demos/{demos_name(run)}/trajectory.h5")]
    return sources.list_files(run.demos.source)


def count_demos(run):
    """How many demonstrations the source of a run has for it."""
    demos = run.demos
    if demos.source == "published" and demos.num_demos == settings.ALL_DEMOS:
        # Known when they are downloaded.
        checkpoints.download_demos.get(demos=demos_name(run))
    elif demos.source in ("plan", "published"):
        return demos.num_demos
    return min(demos.num_demos, sum(map(sources.count_demos, source_files(run))))


def shard_range(wildcards):
    """The first demonstration of a shard and their number, for the run that needs most."""
    size = run_of_demos(wildcards).demos.shard_size
    runs = [run for run in RUNS.values() if demos_name(run) == wildcards.demos]
    first = int(wildcards.shard) * size
    return first, min(size, max(map(count_demos, runs)) - first)


def shard_demos(wildcards):
    """How many demonstrations a shard needs."""
    return shard_range(wildcards)[1]


def shard_source(wildcards):
    """The files of an imported shard, and where it begins in them."""
    run, shard = run_of_demos(wildcards), shard_range(wildcards)
    files = source_files(run)
    # What was published cannot be counted yet; it is one file.
    is_published = run.demos.source == "published"
    return (files, shard[0]) if is_published else sources.select_shard(files, *shard)


def first_demo(wildcards):
    return shard_source(wildcards)[1]


def shard_files(wildcards, input):
    """For `params`: the files of an imported shard.

    Snakemake does not compare parameters that depend on `input`: moved files make nothing stale.
    """
    return shard_source(wildcards)[0]


def demos_shard(wildcards):
    return f"results/demos/{demos_name(run_of_replay(wildcards))}/shard-{wildcards.shard}/manifest.json"


def replay_shards(wildcards):
    run = run_of_dataset(wildcards)
    return [
        f"results/replays/{replay_name(run)}/shard-{shard:03d}/manifest.json"
        for shard in run.shards(count_demos(run))
    ]


def dataset_of_cache(wildcards):
    return f"results/datasets/{dataset_name(run_of_image_cache(wildcards))}/manifest.json"


@cache
def checked_dataset(name):
    """The dataset of a run; whether its trajectory files fit the run was looked at once."""
    run = get_run(name)
    if run.demos.source not in ("plan", "published") and (sentence := sources.find_problems(run)):
        raise WorkflowError(sentence)
    return f"results/datasets/{dataset_name(run)}/manifest.json"


def dataset_of_run(wildcards):
    return checked_dataset(wildcards.run)


def image_cache_of_run(wildcards):
    return f"results/image_caches/{image_cache_name(get_run(wildcards.run))}/manifest.json"


def previous_checkpoint(wildcards):
    interval = get_run(wildcards.run).training.save_interval
    if int(wildcards.step) % interval:
        raise WorkflowError(
            f"run {wildcards.run!r} has a checkpoint every {interval} steps; {wildcards.step} is none."
        )
    return f"results/{wildcards.run}/checkpoints/{int(wildcards.step) - interval}.json"


def all_rollouts(wildcards):
    return [
        f"results/{wildcards.run}/rollouts/{step}.json" for step in get_run(wildcards.run).steps
    ]


def rollouts_of_runs(wildcards):
    return [
        f"results/{name}/rollouts/{step}.json"
        for name in wildcards.runs.split("+")
        for step in get_run(name).steps
    ]


def all_metrics(wildcards):
    steps = get_run(wildcards.run).steps[1:]
    return [f"results/{wildcards.run}/checkpoints/{step}/metrics.csv" for step in steps]


def trained_checkpoints(wildcards):
    steps = get_run(wildcards.run).steps[1:]
    return [f"results/{wildcards.run}/checkpoints/{step}.json" for step in steps]


def finished_runs():
    """The runs that have a success table."""
    return [run for run in RUNS.values() if Path(f"results/{run.name}/success.csv").exists()]


def finished_tables(wildcards):
    if not (runs := finished_runs()):
        raise WorkflowError(
            "no run of the configuration has a success table yet: ask for results/<run>/success.csv "
            "first. Runs of another file need --configfile."
        )
    return [f"results/{run.name}/success.csv" for run in runs]


def failure_pages(wildcards):
    """Videos of the failures of each finished run's last checkpoint, where there are any."""
    last = [f"results/{run.name}/{{}}/{run.steps[-1]}" for run in finished_runs()]
    episodes = {name: Path(f"{name.format('rollouts')}.csv") for name in last}
    return [
        f"{name.format('failures')}.html"
        for name, file in episodes.items()
        if file.exists() and any(row["success_once"] == "0" for row in csv.DictReader(file.open()))
    ]


def last_video(wildcards):
    return f"results/{wildcards.run}/videos/{get_run(wildcards.run).steps[-1]}.mp4"


def shard_seed(wildcards):
    """The first seed of a planned shard."""
    return run_of_demos(wildcards).demos.first_seed + int(wildcards.shard) * settings.SHARD_SEEDS


def replay_on_invalid(wildcards):
    """Of planned demonstrations, which are valid, the setting concerns the dataset alone."""
    demos = run_of_replay(wildcards).demos
    return "error" if demos.source == "plan" else demos.on_invalid


def link_logs(jobs):
    """Show the logs of shared work below the runs that need it, as results/<run>/logs/replays."""
    for name in {job.wildcards.run for job in jobs if "run" in job.wildcards.keys()} & RUNS.keys():
        run = RUNS[name]
        folders = {"demos": demos_name(run), "replays": replay_name(run)}
        folders |= {"datasets": dataset_name(run), "image_caches": image_cache_name(run)}
        Path(f"results/{name}/logs").mkdir(parents=True, exist_ok=True)
        for kind, work in folders.items():
            link = Path(f"results/{name}/logs/{kind}")
            link.unlink(missing_ok=True)
            link.symlink_to(f"../../{kind}/{work}/logs")


def print_results(jobs):
    """Print where the tables are that these jobs made, and what was left out of their datasets."""
    from demo2eval.results import closing_lines

    made = [job for job in jobs if job.rule.name.endswith("success_table")]
    for run in [get_run(job.wildcards.run) for job in made]:
        manifests = [
            Path(f"results/{folder}/shard-{shard:03d}/manifest.json")
            for folder in (f"demos/{demos_name(run)}", f"replays/{replay_name(run)}")
            for shard in run.shards(count_demos(run))
        ]
        dataset = Path(f"results/datasets/{dataset_name(run)}/manifest.json")
        # By the logger, after what it has said of the last job.
        logger.info("\n".join(closing_lines(run, dataset, manifests)))


def prune_runs(file):
    """Remove the weights that were evaluated and are not kept (training.keep_period), of all runs.

    What was removed is printed and written to `file`.
    """
    from demo2eval.training.train import prune_checkpoints

    removed = []
    for name, run in RUNS.items():
        checkpoints = Path(f"results/{name}/checkpoints")
        steps = [int(path.stem) for path in checkpoints.glob("[0-9]*.json")]
        if steps:
            removed += prune_checkpoints(checkpoints, max(steps), run.training.keep_period)
    lines = "\n".join(f"removed {folder}" for folder in removed) or "nothing to remove"
    file.write_text(f"{lines}\n")
    print(lines)


def print_requirements(file):
    """Print a table of the runs, and write it: parameters, how a step is computed, disk."""
    import pandas as pd
    from demo2eval.training.budget import describe_run

    table = pd.DataFrame(map(describe_run, RUNS.values())).to_string(index=False)
    file.write_text(f"{table}\n")
    print(table)


def check_requirements(jobs, reason_of, is_local):
    """Look for what this machine lacks, and for what would be thrown away, before any job starts.

    Args:
        jobs: that will run.
        reason_of: from a job to the reason why.
        is_local: whether jobs run on this machine.
    """
    jobs, problems = list(jobs), []
    runs = {job.wildcards.run for job in jobs if job.rule.name.endswith("init_checkpoint")}
    problems += [settings.missing_weights(get_run(name)) for name in sorted(runs)]
    training = {}
    for job in jobs:
        if job.rule.name.endswith("train"):
            training.setdefault(job.wildcards.run, []).append(job)
    for name, train_jobs in sorted(training.items()):
        problems.append(finished_training(name, train_jobs, reason_of))
        if is_local:
            # JAX takes seconds to import.
            from demo2eval.doctor import list_gpus
            from demo2eval.training.budget import list_shortages

            gpus, results = list_gpus()[: train_jobs[0].resources.gpu], Path("results")
            results.mkdir(exist_ok=True)  # or a link to another disk
            problems += list_shortages(get_run(name), len(train_jobs), results, gpus)
    if any(job.rule.name.endswith("plan") for job in jobs) and not PLANNING_PYTHON.exists():
        problems.append("envs/planning/.venv does not exist: run `make setup`.")
    if problems := [problem for problem in problems if problem]:
        raise WorkflowError("\n".join(problems))


def finished_training(name, jobs, reason_of):
    """A sentence if long training would be thrown away that nobody asked to repeat; else None."""
    if config.get("overwrite") in (True, "true"):
        return None
    stale = [job for job in jobs if Path(job.output.manifest).exists()]
    try:
        records = [read_manifest(Path(job.output.manifest)) for job in stale]
    except UserError as error:
        return str(error)
    seconds = sum(record.get("metadata", {}).get("training_time_s", 0) for record in records)
    if seconds < CHEAP_TRAINING_S:
        return None
    steps = ", ".join(job.wildcards.step for job in stale)
    return (
        f"run {name!r} has finished checkpoints ({steps}) that took {seconds / 3600:.1f} hours to train "
        f"and would be trained again: {reason_of(stale[0])}. To keep them, give the changed settings to "
        f"a run of another name, or accept them as they are: snakemake --touch "
        f"{' '.join(str(job.output.manifest) for job in stale)}. To train again: --config overwrite=true."
    )


def find_lost_records():
    """Yield a sentence for each manifest that is stale and of which Snakemake has lost its record.

    Snakemake takes results without a record for fresh. A manifest says itself what made it.
    """
    for run in RUNS.values():
        folders = [f"{run.name}/*", f"datasets/{dataset_name(run)}"]
        folders += [f"demos/{demos_name(run)}/*", f"replays/{replay_name(run)}/*"]
        folders += [f"image_caches/{image_cache_name(run)}"]
        for file in (
            file for name in folders for file in Path("results").glob(f"{name}/[!.]*.json")
        ):
            record = urlsafe_b64encode(str(file).encode()).decode()
            if Path(".snakemake/metadata", record).exists():
                continue
            try:
                manifest = read_manifest(file)
            except UserError:  # said where it is read, or no manifest
                continue
            if changes := find_changes(manifest, run):
                yield (
                    f"{file} was made with other settings or code ({', '.join(changes)}), and "
                    "Snakemake's record of it in .snakemake is lost: it is taken as it is. Delete it, "
                    "and it is made again."
                )


def find_changes(manifest, run):
    """Return what a run's settings and code are other than a manifest says, by name."""
    changes = []
    for section, before in manifest["settings"].items():
        now = getattr(run, section, before)
        if not isinstance(before, dict):
            changes += [section] * (now != before)
            continue
        now = now.result_settings()
        if manifest["stage"] == "video":  # as many episodes as are recorded
            now["num_episodes"] = before.get("num_episodes")
        changes += [f"{section}.{key}" for key in before if now.get(key) != before[key]]
    for module in WORKFLOW.glob(f"demo2eval/*/{manifest['stage']}.py"):
        name = f"{module.parent.name}.{module.stem}"
        changes += [f"demo2eval.{name}"] * (code(name) != manifest["code"])
    return changes


wildcard_constraints:
    run="[a-z][a-z0-9_]*",
    runs=r"[a-z][a-z0-9_]*(\+[a-z][a-z0-9_]*)*",
    step=r"\d+",
    shard=r"\d{3}",
