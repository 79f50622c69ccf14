"""The configuration: checked against the schema, overlaid section by section, and read as one settings tree a run."""

import copy
import difflib
import math
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import jsonschema
import yaml

from demo2eval.errors import UserError
from demo2eval.maniskill.observation import check_state_parts
from demo2eval.maniskill.tasks import check_cameras, find_task

SCHEMA = Path(__file__).resolve().parent.parent / "schemas" / "config.schema.yaml"
SECTIONS = ("demos", "replay", "dataset", "model", "actions", "training", "evaluation")
CONTROL_MODE_WIDTH = {
    "pd_joint_pos": 8,
    "pd_joint_delta_pos": 8,
    "pd_ee_delta_pos": 4,
    "pd_ee_delta_pose": 7,
}
ARM_JOINTS = 7
SHARD_SEEDS = 100_000
DEMO_SOURCES = ("plan", "published")
WEIGHT_NAMES = {"pi05": "pi05_base", "pi0": "pi0_base"}


@cache
def _schema() -> dict:
    return yaml.safe_load(SCHEMA.read_text(encoding="utf-8"))


def nearest(word: str, known) -> str:
    """Return " Did you mean 'x'?" for the known word nearest to `word`, or an empty string if none is near."""
    close = difflib.get_close_matches(str(word), [str(item) for item in known], n=1, cutoff=0.5)
    return f" Did you mean {close[0]!r}?" if close else ""


def _sentence(error: jsonschema.ValidationError) -> str:
    """Turn one finding of the schema into a sentence with the key's full path."""
    place = ".".join(str(part) for part in error.absolute_path)
    where = f"the configuration's {place!r}" if place else "the configuration"
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        unknown = [key for key in error.instance if key not in known]
        hint = nearest(unknown[0], known) or f" Known keys: {', '.join(known)}."
        return f"{where} has an unknown key {unknown[0]!r}.{hint}"
    if error.validator == "required":
        return f"{where} lacks the key {error.message.split(' is ')[0]}."
    if error.validator == "enum":
        known = [str(item) for item in error.validator_value]
        return f"{where} is {error.instance!r}; it may be one of {', '.join(known)}.{nearest(error.instance, known)}"
    return f"{where} is wrong: {error.message}."


def check_schema(config: Mapping) -> None:
    """Compare the whole configuration with the schema.

    Raises:
        UserError: names the first wrong key and, for a misspelt one, the nearest that exists.
    """
    errors = jsonschema.Draft202012Validator(_schema()).iter_errors(config)
    first = min(
        errors, key=lambda error: (len(error.absolute_path), str(error.absolute_path)), default=None
    )
    if first is not None:
        raise UserError(_sentence(first))


def check(config: Mapping) -> None:
    """Check the schema and the settings of every run; raises UserError at the first mistake."""
    check_schema(config)
    for run in config["runs"]:
        run_settings(config, run)


def _overlay(base: dict, top: Mapping) -> dict:
    """Overlay `top` on `base`, section by section; a list or a mapping inside a section replaces the whole one below it."""
    for section in SECTIONS:
        base[section] = {**base.get(section, {}), **copy.deepcopy(dict(top.get(section, {})))}
    return base


def run_settings(config: Mapping, run: str) -> dict:
    """Return the complete settings of one run: `task`, `prompt` and the seven sections.

    Raises:
        UserError: if there is no such run or task, or if the settings contradict each other.
    """
    if run not in config["runs"]:
        raise UserError(
            f"there is no run {run!r} in the configuration.{nearest(run, config['runs'])}"
        )
    own = config["runs"][run]
    find_task(own["task"])
    if own["task"] not in config["tasks"]:
        raise UserError(
            f"run {run!r}: task {own['task']!r} has no entry under 'tasks'.{nearest(own['task'], config['tasks'])}"
        )
    task = config["tasks"][own["task"]]
    settings = _overlay(_overlay(_overlay({}, config["defaults"]), task), own)
    settings["task"] = own["task"]
    settings["prompt"] = own.get("prompt", task["prompt"])
    try:
        check_state_parts(settings["task"], settings["dataset"]["state"])
        check_cameras(settings["task"], settings["replay"]["cameras"].values())
    except UserError as error:
        raise UserError(f"run {run!r}: {error}") from None
    for problem in problems(settings):
        raise UserError(f"run {run!r}: {problem}")
    return settings


def family(settings: Mapping) -> str:
    """Return "pi05" or "pi0", the family of a run's model."""
    return settings["model"]["variant"].split("_")[0]


def sees_state(settings: Mapping) -> bool:
    """Whether the state reaches the model at all."""
    model = settings["model"]
    return (
        family(settings) == "pi0"
        or model["discrete_state_input"]
        or model["continuous_state_token"]
    )


def problems(settings: Mapping) -> Iterator[str]:
    """Yield what contradicts itself in a run's settings, each as one sentence."""
    task = find_task(settings["task"])
    dataset, actions, training, evaluation = (
        settings[name] for name in ("dataset", "actions", "training", "evaluation")
    )
    if task.hidden_goal and task.hidden_goal not in dataset["state"]:
        yield (
            f"the goal of {settings['task']} is in no camera; dataset.state must hold {task.hidden_goal!r}, "
            f"or no policy can know where to go."
        )
    elif task.hidden_goal and not sees_state(settings):
        yield (
            f"the goal of {settings['task']} is only in the state, which this model does not see; "
            f"set model.discrete_state_input (or, for a model from scratch, model.continuous_state_token) to true."
        )
    if family(settings) == "pi0" and (
        settings["model"]["discrete_state_input"] or settings["model"]["continuous_state_token"]
    ):
        yield "Pi0 has a state token already; set model.discrete_state_input and model.continuous_state_token to false."
    if actions["delta"] and (
        settings["replay"]["control_mode"] != "pd_joint_pos" or dataset["state"][0] != "qpos"
    ):
        yield "actions.delta needs replay.control_mode pd_joint_pos and 'qpos' as the first part of dataset.state."
    if training["state_noise"] and dataset["state"][0] != "qpos":
        yield "training.state_noise needs 'qpos' as the first part of dataset.state."
    if (
        settings["replay"]["joint_perturbation"]
        and settings["replay"]["control_mode"] != "pd_joint_pos"
    ):
        yield "replay.joint_perturbation needs replay.control_mode pd_joint_pos: only absolute joint targets lead a displaced arm back."
    if training["steps"] % training["save_interval"]:
        yield f"training.steps {training['steps']} is not a multiple of training.save_interval {training['save_interval']}."
    if training["steps"] // training["save_interval"] > 300:
        yield f"training.save_interval {training['save_interval']} makes more than 300 checkpoints; raise it."
    if evaluation["max_episode_steps"] <= task.longest_demonstration:
        yield (
            f"evaluation.max_episode_steps {evaluation['max_episode_steps']} is not longer than the longest planned "
            f"demonstration of {settings['task']}, {task.longest_demonstration} steps."
        )
    if evaluation["replan_steps"] > settings["model"]["action_horizon"]:
        yield "evaluation.replan_steps is longer than model.action_horizon; there would be no action left to execute."
    last_seed = evaluation["first_seed"] + evaluation["episodes"] - 1
    if settings["demos"]["source"] == "plan" and last_seed >= settings["demos"]["first_seed"]:
        yield f"evaluation seeds reach {last_seed}, where demos.first_seed {settings['demos']['first_seed']} begins; move one."


def delta_action_mask(settings: Mapping) -> list[bool] | None:
    """Return for each action dimension whether it is a difference from the state, or None if no one is."""
    if not settings["actions"]["delta"]:
        return None
    width = CONTROL_MODE_WIDTH[settings["replay"]["control_mode"]]
    return [True] * ARM_JOINTS + [False] * (width - ARM_JOINTS)


def shard_count(settings: Mapping) -> int:
    """Return the number of shards of demonstrations; demonstrations from a file are one shard."""
    demos = settings["demos"]
    return math.ceil(demos["count"] / demos["shard_size"]) if demos["source"] == "plan" else 1


def steps_of(settings: Mapping) -> list[int]:
    """Return the training steps at which a run has a checkpoint, the untrained 0 first."""
    training = settings["training"]
    return list(range(0, training["steps"] + 1, training["save_interval"]))


def missing_weights(settings: Mapping, run: str) -> str | None:
    """Return one sentence if the run's base weights or their tokenizer are not there, else None."""
    model = settings["model"]
    for key in ("weights", "tokenizer"):
        if (
            model["weights"] is not None
            and model[key] is not None
            and not Path(model[key]).exists()
        ):
            name = WEIGHT_NAMES[family(settings)]
            what = (
                f"the openpi checkpoint gs://openpi-assets/checkpoints/{name} or lerobot/{name} from Hugging Face"
                if key == "weights"
                else "PaliGemma's SentencePiece model, paligemma_tokenizer.model"
            )
            return (
                f"run {run!r} starts from {model[key]!r}, which does not exist: put {what} there "
                f"(or set runs.{run}.model.{key} to where it is), or train from scratch with "
                f"runs.{run}.model: {{weights: null, tokenizer: null}}."
            )
    return None
