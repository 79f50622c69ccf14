# Helper functions of the rules; no rule.
#
# A run's settings decide what its demonstrations, replays, dataset and training cache are called: the name holds a hash of all
# settings that matter to that stage, so runs with equal settings share the work, and a change of settings makes new work beside
# the old.

import fcntl
import hashlib
import json
import shlex
import shutil
import sys
from functools import cache
from pathlib import Path

BASE = Path(workflow.basedir)
sys.path.insert(0, str(BASE / "workflow"))

from demo2eval import config
from demo2eval.config import SHARD_SEEDS, delta_action_mask, shard_count, steps_of
from demo2eval.errors import UserError
from demo2eval.fingerprint import code_fingerprint

# Jobs run with the Python that runs Snakemake, and find its packages also where PYTHONPATH leads to them.
MODULES = f'PYTHONPATH={shlex.quote(str(BASE / "workflow"))}"${{PYTHONPATH:+:$PYTHONPATH}}"'
PYTHON = f"{MODULES} {shlex.quote(sys.executable)}"
# What was compiled once is not compiled again for the next segment or checkpoint.
JAX_PYTHON = f"JAX_COMPILATION_CACHE_DIR=results/.jax_cache JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS=1 {PYTHON}"
PLANNING_PYTHON = BASE / "envs/planning/.venv/bin/python"
PLAN = f"PYTHONPATH={shlex.quote(str(BASE / 'workflow'))} {shlex.quote(str(PLANNING_PYTHON))}"


def told(function):
    """Let a user's mistake reach the terminal as Snakemake's own kind of error, a sentence and no traceback."""

    def wrapped(*arguments):
        try:
            return function(*arguments)
        except UserError as error:
            raise WorkflowError(str(error)) from None

    return wrapped


def be_alone_or_beside_the_living():
    """Remove the lock that a killed Snakemake left in this folder, unless another one is alive here; return what to hold on to.

    Snakemake's own lock is made of files, which outlive it: after a kill the same command would be refused. So every Snakemake also holds
    a lock of the kernel's, which ends with its process. Where the file system has none, Snakemake says what to do.
    """
    try:
        Path(".snakemake").mkdir(exist_ok=True)
        alive = open(".snakemake/alive.lock", "a")
        try:
            fcntl.flock(alive, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(".snakemake/locks", ignore_errors=True)
        except BlockingIOError:
            pass
        fcntl.flock(alive, fcntl.LOCK_SH)
        return alive
    except OSError:
        return None


ALIVE = be_alone_or_beside_the_living() if workflow.is_main_process else None

told(config.check)(config)


@cache
@told
def settings(run):
    return config.run_settings(config, run)


def code(module):
    """What the module of a rule does, for `params`: an edit that changes nothing makes nothing stale."""
    return code_fingerprint(f"demo2eval.{module}")


def options(values):
    """Command-line options from a dictionary; lists and dictionaries are written as JSON."""

    def text(value):
        return value if isinstance(value, str) else json.dumps(value)

    return " ".join(f"--{key.replace('_', '-')} {shlex.quote(text(value))}" for key, value in values.items())


def name(run, stage, values):
    """<task>-<stage of origin>-<hash>: the name of work that runs with equal settings share."""
    task = settings(run)["task"].removesuffix("-v1").lower()
    return f"{task}-{stage}-{hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:8]}"


# What each stage is given, as options of its module. The names of shared work follow from these.


def on_invalid(run):
    """What is to be done about bad demonstrations, as a setting of the stages that read them; nothing where they are refused."""
    wanted = settings(run)["demos"]["on_invalid"]
    return {} if wanted == "error" else {"on_invalid": wanted}


def demos_settings(run):
    demos = settings(run)["demos"]
    planned = demos["source"] == "plan"
    kept = ("shard_size", "first_seed") if planned else ("count",)
    common = {"task": settings(run)["task"], "source": demos["source"]} | {key: demos[key] for key in kept}
    return common | ({} if planned else on_invalid(run))


def demos_name(run):
    source = settings(run)["demos"]["source"]
    stage = {"plan": "planned", "published": "published"}.get(source, "file")
    return name(run, stage, demos_settings(run))


def replay_settings(run):
    replay = settings(run)["replay"]
    return {
        "task": settings(run)["task"],
        "control_mode": replay["control_mode"],
        "cameras": sorted(replay["cameras"].values()),
        "image_size": replay["image_size"],
        "image_stride": replay["image_stride"],
        "joint_perturbation": replay["joint_perturbation"],
    } | on_invalid(run)


def replay_name(run):
    return name(run, "replayed", [demos_name(run), replay_settings(run)])


def dataset_settings(run):
    dataset = settings(run)["dataset"]
    video = {"video_crf": dataset["video_crf"]} if dataset["image_storage"] == "video" else {}
    return (
        {
            "prompt": settings(run)["prompt"],
            "cameras": sorted(settings(run)["replay"]["cameras"].values()),
            "state": dataset["state"],
            "image_storage": dataset["image_storage"],
            "count": settings(run)["demos"]["count"],
        }
        | video
        | on_invalid(run)
    )


def dataset_name(run):
    return name(run, "dataset", [replay_name(run), dataset_settings(run)])


def cache_settings(run):
    return {"image_size": model_image_size(run)}


def cache_name(run):
    return name(run, "cache", [dataset_name(run), cache_settings(run)])


def norm_stats_settings(run):
    actions = settings(run)["actions"]
    return {
        "action_horizon": settings(run)["model"]["action_horizon"],
        "delta_action_mask": delta_action_mask(settings(run)),
        "per_timestep_action_stats": actions["per_timestep_action_stats"],
        "min_scale": actions["min_scale"],
        "state_noise": settings(run)["training"]["state_noise"],
    }


def model_overrides(run):
    model = settings(run)["model"]
    keys = ("action_horizon", "discrete_state_input", "continuous_state_token")
    return {key: model[key] for key in keys} | model["overrides"]


@cache
@told
def model_image_size(run):
    from demo2eval.pi0.config import make_config

    return make_config(settings(run)["model"]["variant"], **model_overrides(run)).siglip.image_size


def init_settings(run):
    model, replay, training = (settings(run)[section] for section in ("model", "replay", "training"))
    return {
        "task": settings(run)["task"],
        "prompt": settings(run)["prompt"],
        "variant": model["variant"],
        "model_overrides": model_overrides(run),
        "weights": model["weights"],
        "tokenizer": model["tokenizer"],
        "seed": training["seed"],
        "cameras": replay["cameras"],
        "image_size": replay["image_size"],
        "state": settings(run)["dataset"]["state"],
        "control_mode": replay["control_mode"],
        "delta_action_mask": delta_action_mask(settings(run)),
    }


def training_settings(run):
    training = settings(run)["training"]
    return {key: value for key, value in training.items() if key not in ("steps", "save_interval")}


def rollout_settings(run):
    evaluation = settings(run)["evaluation"]
    keys = ("episodes", "first_seed", "max_episode_steps", "replan_steps", "num_steps", "policy_seed")
    return {"task": settings(run)["task"]} | {key: evaluation[key] for key in keys}


def video_settings(run):
    evaluation = settings(run)["evaluation"]
    return rollout_settings(run) | {"episodes": min(evaluation["episodes"], evaluation["num_videos"])}


def action_error_settings(run):
    evaluation = settings(run)["evaluation"]
    kept = {key: evaluation[key] for key in ("replan_steps", "num_steps", "policy_seed")}
    return {"num_val_demos": settings(run)["training"]["num_val_demos"]} | kept


# From the wildcards of shared work back to a run that uses it. Equal names mean equal settings, so any such run will do.


@cache
def runs_by(naming):
    return {naming(run): run for run in reversed(config["runs"])}


def run_of(naming, wanted):
    if wanted not in runs_by(naming):
        raise WorkflowError(f"no run of the configuration needs {wanted!r} any more; ask for results/<run>/success.csv.")
    return runs_by(naming)[wanted]


def plan_options(wildcards):
    run, shard = run_of(demos_name, wildcards.demos), int(wildcards.shard)
    demos = settings(run)["demos"]
    count = max(settings(other)["demos"]["count"] for other in config["runs"] if demos_name(other) == wildcards.demos)
    planned = min(demos["shard_size"], count - shard * demos["shard_size"])
    return options({"task": settings(run)["task"], "count": planned, "first_seed": demos["first_seed"] + shard * SHARD_SEEDS})


def demos_source(wildcards):
    return settings(run_of(demos_name, wildcards.demos))["demos"]["source"]


def taken_options(wildcards):
    run = run_of(demos_name, wildcards.demos)
    return options({"task": settings(run)["task"], "count": settings(run)["demos"]["count"]} | on_invalid(run))


def shards(stage, naming):
    """Input function: the manifests of all shards that a run's dataset is made from."""

    def manifests(wildcards):
        run = run_of(dataset_name, wildcards.dataset)
        return [f"results/{stage}/{naming(run)}/shard-{shard:03d}/manifest.json" for shard in range(shard_count(settings(run)))]

    return manifests


def checkpoint(run, step):
    return f"results/{run}/checkpoints/{step}.json"


def previous_checkpoint(wildcards):
    every = settings(wildcards.run)["training"]["save_interval"]
    if int(wildcards.step) % every:
        raise WorkflowError(f"run {wildcards.run!r} has a checkpoint every {every} steps; {wildcards.step} is none of them.")
    return checkpoint(wildcards.run, int(wildcards.step) - every)


def check_before_work():
    """Look for what has to be brought from outside, before any job starts."""
    if workflow.touch:
        return
    jobs = list(workflow.dag.needrun_jobs())
    for run in sorted({job.wildcards.run for job in jobs if job.rule.name == "init_checkpoint"}):
        if sentence := config.missing_weights(settings(run), run):
            raise WorkflowError(sentence)
    if any(job.rule.name == "plan" for job in jobs) and not PLANNING_PYTHON.exists():
        raise WorkflowError("the planning environment, envs/planning/.venv, does not exist: run `make setup`.")


wildcard_constraints:
    run="[a-z][a-z0-9_]*",
    step=r"\d+",
    shard=r"\d{3}",
