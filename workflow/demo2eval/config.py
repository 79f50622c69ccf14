"""The configuration: every setting once, with its type, default, bounds and meaning.

A setting is a field of a section class below. The workflow, the command line of each module, the
generated `config/README.md` and the schema for editors all read it from here. The defaults are
openpi's where openpi has the setting.

A run's settings are, later ones win: the defaults, its task's, those of the run that it extends,
its own. They are merged key by key within a section.

    python -m demo2eval.config readme > config/README.md
    python -m demo2eval.config schema > config/schema.json
"""

import difflib
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    model_validator,
)

from demo2eval.errors import UserError
from demo2eval.pi0.config import Pi0Config, make_config, merge_overrides
from demo2eval.robots import CAMERAS, Robot

SHARD_SEEDS = 100_000
MAX_SEED = 2**31 - 1
MAX_CHECKPOINTS = 300
MAX_PARAMS = 100_000_000_000
ALL_DEMOS = 1_000_000
"""What `demos.num_demos: all` means; no source has as many."""
BASE_WEIGHTS = {"pi05": "pi05_base", "pi0": "pi0_base"}
MILESTONES = ("reach", "grasp", "lift", "move", "place")
SCHEDULE: dict[str, Any] = {"schedule": True}
"""Marks a setting that decides how much is done or how fast, but not what a finished job holds."""


def _number(value: Any) -> Any:
    """Refuse what Python takes for a number and nobody means as one."""
    if isinstance(value, bool):
        raise ValueError("should be a number, not a truth value")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError("should be a finite number")
    return value


def _integer(value: Any) -> Any:
    if isinstance(value, float):
        raise ValueError("should be an integer, written without a decimal point")
    return _number(value)


Int = Annotated[int, BeforeValidator(_integer)]
Float = Annotated[float, BeforeValidator(_number), Field(allow_inf_nan=False)]
Seed = Annotated[Int, Field(ge=0, le=MAX_SEED)]
RunName = Annotated[str, StringConstraints(pattern=r"^[a-z][a-z0-9_]*$")]
ControlMode = Literal["pd_joint_pos", "pd_joint_delta_pos", "pd_ee_delta_pos", "pd_ee_delta_pose"]
ModelCamera = Literal["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"]
OnInvalid = Literal["error", "skip"]


class Section(BaseModel):
    """A part of the configuration. Unknown keys are refused; text is read as the field's type."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _read_null(cls, values: Any) -> Any:
        """Read null as it arrives from Snakemake's `--config`, which passes on text."""
        if not isinstance(values, Mapping):
            return values
        return {key: None if value == "null" else value for key, value in values.items()}

    def result_settings(self) -> dict[str, Any]:
        """Return the settings that change a result, as JSON can hold them."""
        scheduling = {
            name
            for name, field in type(self).model_fields.items()
            if field.json_schema_extra == SCHEDULE
        }
        return self.model_dump(mode="json", exclude=scheduling)


def _source(value: Any) -> Any:
    """Refuse what names no files; see `Demos.source`."""
    paths = value if isinstance(value, list) else [value]
    if not paths or not all(isinstance(path, str) and path for path in paths):
        raise ValueError("should be plan, published, a path, or a list of paths")
    if any("{" in path or "}" in path for path in paths):
        raise ValueError("has braces, which Snakemake takes for wildcards; rename the file")
    return value


def _count(value: Any) -> Any:
    return ALL_DEMOS if value == "all" else _integer(value)


class Demos(Section):
    """Where demonstrations come from."""

    source: Annotated[str | list[str], BeforeValidator(_source)] = Field(
        default="plan",
        description="plan: ManiSkill's motion planner. published: ManiSkill's own demonstrations. "
        "Else trajectory files, .h5 with the .json beside it: a path, a folder, a glob such as "
        "demos/**/*.h5, or a list of these",
    )
    num_demos: Annotated[
        int, BeforeValidator(_count, json_schema_input_type=int | Literal["all"])
    ] = Field(
        default=200,
        ge=1,
        le=ALL_DEMOS,
        description="successful demonstrations, the first of the source; all: of those that are "
        "not planned",
        json_schema_extra=SCHEDULE,
    )
    shard_size: Int = Field(
        default=25,
        ge=1,
        le=10_000,
        description="demonstrations per shard, each a process; more demonstrations only add shards",
    )
    first_seed: Seed = Field(
        default=1_000_000,
        description=f"shard k plans with seeds from first_seed + {SHARD_SEEDS} k; evaluation seeds "
        "must lie below",
    )
    on_invalid: OnInvalid = Field(
        default="error",
        description="error: stop if a demonstration is invalid. skip: leave it out and name it in "
        "the manifest",
    )


class Replay(Section):
    """How demonstrations are replayed with images."""

    control_mode: ControlMode = Field(
        default="pd_joint_pos",
        description="what the actions mean; the planner records pd_joint_pos",
    )
    cameras: Annotated[dict[ModelCamera, str], Field(min_length=1)] = Field(
        default={"base_0_rgb": "base_camera"},
        description="camera of the model: camera of ManiSkill",
    )
    image_size: Int = Field(
        default=128, ge=16, le=1024, description="side of the rendered images, pixels"
    )
    image_stride: Int = Field(
        default=1, ge=1, le=1000, description="render every k-th control step; every action is kept"
    )
    joint_perturbation: Float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="standard deviation, radians, by which the arm's joints are displaced before "
        "an image is rendered (DART); needs pd_joint_pos, whose targets lead back",
    )


class Dataset(Section):
    """What the LeRobot dataset holds."""

    state: Annotated[list[str], Field(min_length=1)] = Field(
        default=["qpos"], description="parts of observation.state, in this order"
    )
    image_storage: Literal["png", "video"] = Field(
        default="png", description="png: exact. video: h264 4:4:4, much smaller"
    )
    video_crf: Int = Field(
        default=0, ge=0, le=51, description="h264 quality, 0 (best, 52 dB) to 51; 10 is 44 dB"
    )


class Actions(Section):
    """What the model predicts, and how states and actions are normalized."""

    action_horizon: Int = Field(default=10, ge=1, le=1000, description="actions per chunk")
    delta: bool = Field(
        default=True,
        description="arm joints as difference from the state (openpi's DeltaActions); needs "
        "pd_joint_pos and qpos as the first part of the state",
    )
    per_timestep_action_stats: bool = Field(
        default=False,
        description="normalize each timestep of the chunk by its own statistics; openpi: by those "
        "of all",
    )
    min_scale: Float = Field(
        default=0.0,
        ge=0,
        le=100,
        description="smallest std and smallest half of q99 - q01, in data units",
    )
    state_noise: Float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="standard deviation, radians, of training noise on the arm's joints, the same "
        "in the state and in the delta actions; the norm stats account for it",
    )


class Model(Section):
    """The model and where its weights start."""

    variant: Literal[
        "pi05",
        "pi0",
        "pi05_lora",
        "pi0_lora",
        "pi05_small",
        "pi0_small",
        "pi05_tiny",
        "pi0_tiny",
        "pi05_tiny_lora",
    ] = Field(
        default="pi05", description="full size; with low-rank adapters; 27 M or 0.9 M parameters"
    )
    weights: str | None = Field(
        default="weights/pi05_base",
        description="openpi checkpoint or Hugging Face safetensors to start from; null: from "
        "scratch",
    )
    tokenizer: str | None = Field(
        default="weights/paligemma_tokenizer.model",
        description="SentencePiece model of the weights; null: trained from the prompt",
    )
    overrides: dict[str, Any] = Field(
        default={},
        description="fields of demo2eval.pi0.config.Pi0Config that differ from the variant's, with "
        "dots for nested ones: {siglip.width: 96}",
    )
    discrete_state_input: bool = Field(
        default=False, description="Pi0.5: write the state into the prompt"
    )
    continuous_state_token: bool = Field(
        default=False,
        description="Pi0.5 from scratch: the state as one more prefix token; not in openpi",
    )


class Training(Section):
    """The optimization."""

    num_train_steps: Int = Field(
        default=30_000,
        ge=1,
        le=100_000_000,
        description="steps; may be raised later, only the new ones are trained",
        json_schema_extra=SCHEDULE,
    )
    save_interval: Int = Field(
        default=1000,
        ge=1,
        le=100_000_000,
        description="steps per checkpoint",
        json_schema_extra=SCHEDULE,
    )
    batch_size: Int = Field(default=32, ge=1, le=65_536, description="samples per step")
    micro_batch_size: Annotated[Int, Field(ge=1, le=65_536)] | None = Field(
        default=None,
        description="samples whose gradient a device computes at a time; null: what fits and is "
        "fastest. The result is that of the whole batch",
        json_schema_extra=SCHEDULE,
    )
    remat: Literal["none", "elementwise", "vision", "all"] | None = Field(
        default=None,
        description="what the backward pass computes again to save memory; null: what fits and is "
        "fastest",
        json_schema_extra=SCHEDULE,
    )
    fsdp_devices: Int = Field(
        default=1,
        ge=1,
        le=4096,
        description="GPUs that share the training state, and that a job takes; 1: each has all of "
        "it. The batch is divided among all GPUs of the job",
        json_schema_extra=SCHEDULE,
    )
    keep_period: Annotated[Int, Field(ge=1, le=100_000_000)] | None = Field(
        default=None,
        description="weights of other steps than its multiples and the last are removed once they "
        "are evaluated; null: all are kept. openpi: 5000",
        json_schema_extra=SCHEDULE,
    )
    save_minutes: Annotated[Float, Field(ge=0, le=10_000)] | None = Field(
        default=20.0,
        description="minutes between saves on the way to a checkpoint, from which a job goes on "
        "that was killed; null: none",
        json_schema_extra=SCHEDULE,
    )
    params_dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="of those weights in a checkpoint that the model casts before each use; "
        "bfloat16 takes two fifths less disk and rolls out the same. The training state keeps "
        "float32",
    )
    tracker: Literal["tensorboard", "wandb"] | None = Field(
        default=None,
        description="shows metrics there too while training; needs uv sync --inexact --extra "
        "tensorboard or wandb",
        json_schema_extra=SCHEDULE,
    )
    warmup_steps: Int = Field(
        default=1000,
        ge=0,
        le=100_000_000,
        description="steps from peak_lr / (warmup_steps + 1) to peak_lr",
    )
    peak_lr: Float = Field(
        default=2.5e-5, gt=0, le=1, description="learning rate after the warm-up"
    )
    decay_steps: Int = Field(
        default=30_000,
        ge=1,
        le=1_000_000_000,
        description="end of the cosine, the warm-up included",
    )
    decay_lr: Float = Field(
        default=2.5e-6, ge=0, le=1, description="learning rate at the cosine's end"
    )
    clip_gradient_norm: Float = Field(
        default=1.0, gt=0, description="largest global norm of the gradient"
    )
    weight_decay: Float = Field(default=1e-10, ge=0, le=1, description="AdamW's, on all parameters")
    ema_decay: Annotated[Float, Field(gt=0, lt=1)] | None = Field(
        default=0.99, description="moving average of the weights, which is evaluated; null: none"
    )
    augment: bool = Field(
        default=True, description="openpi's random crop, rotation and color jitter"
    )
    random_shift: Int = Field(
        default=0,
        ge=0,
        le=512,
        description="largest random shift of each image, pixels; not in openpi",
    )
    num_noise_samples: Int = Field(
        default=1,
        ge=1,
        le=64,
        description="draws of noise and time per sample, whose prefix is computed once; openpi: 1",
    )
    num_val_demos: Int = Field(
        default=0,
        ge=0,
        le=1_000_000,
        description="the last so many demonstrations are not trained on",
    )


class Evaluation(Section):
    """The rollouts."""

    num_episodes: Int = Field(
        default=100, ge=1, le=100_000, description="episodes per checkpoint, each on its own seed"
    )
    first_seed: Seed = Field(
        default=0, description="seeds first_seed .. first_seed + num_episodes - 1"
    )
    max_episode_steps: Int = Field(
        default=200,
        ge=1,
        le=100_000,
        description="control steps per episode; more than demonstrations take",
    )
    replan_steps: Int = Field(
        default=5, ge=1, le=1000, description="actions executed between two policy calls"
    )
    num_steps: Int = Field(default=10, ge=1, le=1000, description="Euler steps of flow matching")
    policy_seed: Seed = Field(default=0, description="seed of the policy's noise")
    num_workers: Int = Field(
        default=8, ge=1, le=1024, description="simulator processes", json_schema_extra=SCHEDULE
    )
    min_demo_success: Float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="share of demonstrations that must succeed in the preflight; 0 where their "
        "seeds do not give their scenes, as with demonstrations from ManiSkill's GPU simulation",
        json_schema_extra=SCHEDULE,
    )
    num_videos: Int = Field(
        default=6, ge=1, le=100, description="episodes in a video", json_schema_extra=SCHEDULE
    )


class Milestones(Section):
    """Sub-goals by which a failed episode says how far it came. They change no success."""

    names: Annotated[list[str], Field(min_length=1)] = Field(
        description="reach, grasp, lift, move, place, or a name of your own for the last, success"
    )
    reach_distance: Float = Field(
        default=0.025, gt=0, description="meters from gripper to object that count as reached"
    )
    placed: str | None = Field(
        default=None,
        description="key of ManiSkill's info for the milestone place, if it is not the last",
    )
    half_length: str | None = Field(
        default=None,
        description="env attribute [1, 3]: half of a long object's length, along its x axis",
    )

    @model_validator(mode="after")
    def _check_names(self) -> "Milestones":
        for name in self.names[:-1]:
            if name not in MILESTONES:
                known = ", ".join(MILESTONES)
                raise ValueError(
                    f"has {name!r} before its end; there only {known} are known."
                    f"{suggest(name, MILESTONES)}"
                )
        if "place" in self.names[:-1] and self.placed is None:
            raise ValueError("needs `placed`, the key of ManiSkill's info for `place`")
        return self


class Sections(Section):
    """What tasks and runs may set."""

    demos: Demos = Demos()
    replay: Replay = Replay()
    dataset: Dataset = Dataset()
    actions: Actions = Actions()
    model: Model = Model()
    training: Training = Training()
    evaluation: Evaluation = Evaluation()


class Task(Sections):
    """A ManiSkill task: facts about it, and the settings that follow from them."""

    prompt: Annotated[str, Field(min_length=1)] = Field(description="the instruction")
    robot: Robot = Field(
        default="panda", description="ManiSkill's robot for the task, from planning to evaluation"
    )
    longest_demo: Int = Field(
        ge=1, description="control steps of the longest planned demonstration"
    )
    observations: list[str] = Field(
        default=["qpos", "tcp_pose"], description="parts that ManiSkill offers for the state"
    )
    hidden_goal: str | None = Field(
        default=None, description="part of the state with the goal, if no camera shows it"
    )
    object: str = Field(description="env attribute: the object that is manipulated")
    milestones: Milestones = Field(description="sub-goals, in order")
    published: dict[str, Annotated[Float, Field(ge=0, le=100)]] = Field(
        default={},
        description="success rates of others, percent, which curves are drawn with: name: 74.0",
    )


class RunEntry(Sections):
    """A run as it is written: only what differs."""

    extends: str | None = Field(
        default=None, description="run whose keys hold where this one says nothing"
    )
    task: str | None = Field(default=None, description="key of `tasks`, ManiSkill's environment id")
    prompt: str | None = Field(default=None, description="instruction instead of the task's")
    seed: Seed | None = Field(
        default=None, description="seed of initial weights, batches and noise; 0"
    )


class Config(Section):
    """All configuration files together."""

    tasks: dict[str, Task]
    runs: dict[RunName, RunEntry]
    overwrite: bool = Field(
        default=False,
        description="replace finished checkpoints that took long to train and are stale now",
    )


class Run(Sections):
    """The complete settings of one run."""

    name: str
    task: str
    prompt: str
    seed: int
    robot: Robot
    longest_demo: int
    observations: list[str]
    hidden_goal: str | None
    object: str
    milestones: Milestones
    published: dict[str, float]

    def shards(self, available: int = ALL_DEMOS) -> range:
        """Return the numbers of the shards, of a source that has so many demonstrations."""
        num_demos = min(self.demos.num_demos, available)
        return range(math.ceil(num_demos / self.demos.shard_size))

    @property
    def steps(self) -> list[int]:
        """The training steps that have a checkpoint, the untrained 0 first."""
        training = self.training
        return list(range(0, training.num_train_steps + 1, training.save_interval))

    @property
    def evaluation_seeds(self) -> range:
        """The seed of each episode."""
        first = self.evaluation.first_seed
        return range(first, first + self.evaluation.num_episodes)

    @property
    def family(self) -> str:
        """The family of the model, "pi05" or "pi0"."""
        return self.model.variant.split("_")[0]

    def pi0_config(self) -> Pi0Config:
        """Return the model's configuration; raises UserError if an override is wrong."""
        overrides = merge_overrides(
            self.model.overrides,
            action_horizon=self.actions.action_horizon,
            discrete_state_input=self.model.discrete_state_input,
            continuous_state_token=self.model.continuous_state_token,
        )
        return make_config(self.model.variant, **overrides)


def suggest(word: str, known: Iterable[str]) -> str:
    """Return " Did you mean 'x'?" for the nearest of the known words, or "" if none is near."""
    known = list(known)
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.5)
    close = close or [item for item in known if word in item.split("_")]
    return f" Did you mean {close[0]!r}?" if close else ""


def _keys_at(path: tuple[str, ...]) -> list[str]:
    """Return the keys that the part of the configuration at `path` may have."""
    model: type[BaseModel] = Config
    for key in path:
        if key not in model.model_fields:
            continue
        annotation = model.model_fields[key].annotation
        nested = [annotation, *get_args(annotation)]
        model = next((item for item in nested if _is_section(item)), model)
    return list(model.model_fields)


def _is_section(item: Any) -> bool:
    return isinstance(item, type) and issubclass(item, BaseModel)


def _sentence(error: Mapping[str, Any]) -> str:
    """Turn one of pydantic's errors into a sentence with the key's full path."""
    path = tuple(
        str(key) for key in error["loc"] if key not in ("[key]", "function-before[_integer(), int]")
    )
    name, value = ".".join(path), error.get("input")
    if error["type"] == "extra_forbidden":
        parent, known = ".".join(path[:-1]), _keys_at(path[:-1])
        sections = [item for item in Sections.model_fields if path[-1] in _keys_at(("runs", item))]
        hint = f" It is a key of {sections[0]}." if sections else suggest(path[-1], known)
        hint = hint or f" Known keys: {', '.join(known)}."
        return f"{parent or 'the configuration'} has an unknown key {path[-1]!r}.{hint}"
    if error["type"] == "missing":
        return f"{name} is missing; the configuration needs it."
    if error["type"] == "literal_error":
        expected = error["ctx"]["expected"].replace("'", "")
        known = expected.replace(" or ", ", ").split(", ")
        return f"{name} is {value!r}; it may be {expected}.{suggest(str(value), known)}"
    reason = re.sub(r"^(Value error, |Input |List |Dictionary |String )", "", error["msg"])
    if isinstance(value, Mapping):
        return f"{name} {reason.rstrip('.')}."
    return f"{name} is {value!r}; it {reason}."


def load(config: Mapping[str, Any]) -> dict[str, Run]:
    """Check a whole configuration and return the settings of every run.

    Args:
        config: {"tasks": {...}, "runs": {...}}, as YAML files or Snakemake give it.

    Raises:
        UserError: lists everything that is wrong, a sentence each, with the key's path.
    """
    try:
        entries = Config.model_validate(dict(config))
    except ValidationError as error:
        raise UserError(_list(dict.fromkeys(map(_sentence, error.errors())))) from None
    runs, problems = {}, []
    for name in entries.runs:
        try:
            runs[name] = resolve(entries, name)
            problems += [f"run {name!r}: {problem}" for problem in contradictions(runs[name])]
            others = [task for task in entries.tasks if task != runs[name].task]
            problems += [
                f"run {name!r}: its prompt is that of {task}, and its task is "
                f"{runs[name].task}; mend `prompt`."
                for task in others
                if entries.tasks[task].prompt == runs[name].prompt
            ]
        except UserError as error:
            problems.append(f"run {name!r}: {error}")
    if problems:
        raise UserError(_list(problems))
    return runs


def _list(sentences: Iterable[str]) -> str:
    sentences = list(sentences)
    return sentences[0] if len(sentences) == 1 else "\n".join(f"- {item}" for item in sentences)


def resolve(config: Config, name: str) -> Run:
    """Merge a run with what it extends, its task and the defaults.

    Raises:
        UserError: if the task or an extended run does not exist, or runs extend each other.
    """
    chain: list[RunEntry] = []
    names, extended = [], name
    while extended is not None:
        if extended in names:
            raise UserError(f"extends itself: {' -> '.join([*names, extended])}.")
        if extended not in config.runs:
            raise UserError(
                f"extends {extended!r}, which is no run.{suggest(extended, config.runs)}"
            )
        names.append(extended)
        chain.append(config.runs[extended])
        extended = chain[-1].extends

    def first(key: str, entries: list[RunEntry] = chain) -> Any:
        return next(
            (value for entry in entries if (value := getattr(entry, key)) is not None), None
        )

    task_name = first("task")
    if task_name is None:
        raise UserError("has no task; set `task` to one of the configuration's `tasks`.")
    if task_name not in config.tasks:
        known = ", ".join(config.tasks)
        hint = suggest(task_name, config.tasks)
        raise UserError(f"task {task_name!r} is not among `tasks`, which has {known}.{hint}")
    task = config.tasks[task_name]
    # An extended run's prompt belongs to its task, which this run may have changed.
    own = chain[: next(index for index, entry in enumerate(chain) if entry.task) + 1]
    sections = {}
    for section in Sections.model_fields:
        layers = [getattr(entry, section) for entry in (task, *reversed(chain))]
        written = [layer.model_dump(exclude_unset=True) for layer in layers]
        sections[section] = {key: value for layer in written for key, value in layer.items()}
    facts = {key: getattr(task, key) for key in Task.model_fields if key != "prompt"}
    return Run(
        **(facts | sections),
        name=name,
        task=task_name,
        prompt=first("prompt", own) or task.prompt,
        seed=first("seed") or 0,
    )


def find_task(name: str) -> Task:
    """Return a task of the project's config/config.yaml.

    Raises:
        UserError: if it has none of that name.
    """
    import yaml

    file = Path(__file__).resolve().parents[2] / "config/config.yaml"
    tasks = yaml.safe_load(file.read_text(encoding="utf-8"))["tasks"] if file.exists() else {}
    if name not in tasks:
        raise UserError(f"{file} has no task {name!r}; give its object and milestones.")
    return Task.model_validate(tasks[name])


def contradictions(run: Run) -> Iterator[str]:
    """Yield what contradicts itself in a run's settings, a sentence each."""
    yield from _observation_contradictions(run)
    yield from _model_contradictions(run)
    yield from _training_contradictions(run)
    yield from _evaluation_contradictions(run)


def _observation_contradictions(run: Run) -> Iterator[str]:
    known_cameras = CAMERAS[run.robot]
    for camera in run.replay.cameras.values():
        if camera not in known_cameras:
            yield (
                f"replay.cameras has {camera!r}, which {run.task} does not have; it has "
                f"{', '.join(known_cameras)}.{suggest(camera, known_cameras)}"
            )
    for part in run.dataset.state:
        if part not in run.observations:
            yield (
                f"dataset.state has {part!r}, which {run.task} does not have; it has "
                f"{', '.join(run.observations)}.{suggest(part, run.observations)}"
            )
    if len(set(run.dataset.state)) < len(run.dataset.state):
        yield "dataset.state names a part twice."
    joints_lead = run.dataset.state[0] == "qpos"
    joint_targets = run.replay.control_mode == "pd_joint_pos"
    if run.actions.delta and not (joints_lead and joint_targets):
        yield (
            "actions.delta needs replay.control_mode pd_joint_pos and 'qpos' as the first part of "
            "dataset.state."
        )
    if run.actions.state_noise and not joints_lead:
        yield "actions.state_noise needs 'qpos' as the first part of dataset.state."
    if run.replay.joint_perturbation and not joint_targets:
        yield (
            "replay.joint_perturbation needs replay.control_mode pd_joint_pos: only absolute joint "
            "targets lead a displaced arm back."
        )


def _model_contradictions(run: Run) -> Iterator[str]:
    model = run.model
    sees_state = run.family == "pi0" or model.discrete_state_input or model.continuous_state_token
    if run.hidden_goal and run.hidden_goal not in run.dataset.state:
        yield (
            f"no camera shows the goal of {run.task}; dataset.state must have {run.hidden_goal!r}, "
            "or no policy can know where to go."
        )
    elif run.hidden_goal and not sees_state:
        yield (
            f"the goal of {run.task} is only in the state, which this model does not see; set "
            "model.discrete_state_input (or, from scratch, model.continuous_state_token) to true."
        )
    if run.family == "pi0" and (model.discrete_state_input or model.continuous_state_token):
        yield (
            "Pi0 has a state token already; set model.discrete_state_input and "
            "model.continuous_state_token to false."
        )
    try:
        size = _approximate_size(run.pi0_config())
    except UserError as error:
        yield str(error)
    except ZeroDivisionError:
        yield "model.overrides has a 0 where no model can have one."
    else:
        if size > MAX_PARAMS:
            yield f"model.overrides make a model of {size:.3g} parameters; no machine holds it."


def _approximate_size(config: Pi0Config) -> int:
    """Return about how many parameters a model has; only what is large counts."""
    size = config.vocab_size * config.paligemma.width
    size += config.siglip.num_patches * config.siglip.width
    parts = (config.paligemma, config.action_expert, config.siglip)
    return size + sum(part.depth * part.layer_size for part in parts)


def _training_contradictions(run: Run) -> Iterator[str]:
    training, steps = run.training, run.training.num_train_steps
    if steps % training.save_interval:
        yield (
            f"training.num_train_steps {steps} is not a multiple of training.save_interval "
            f"{training.save_interval}."
        )
    if steps // training.save_interval > MAX_CHECKPOINTS:
        yield (
            f"training.save_interval {training.save_interval} makes more than {MAX_CHECKPOINTS} "
            "checkpoints; raise it."
        )
    if training.warmup_steps >= training.decay_steps:
        yield (
            f"training.warmup_steps {training.warmup_steps} is not below training.decay_steps "
            f"{training.decay_steps}, which includes the warm-up."
        )
    if training.decay_lr == 0 and steps > training.decay_steps:
        yield (
            f"training.decay_lr 0 is reached at training.decay_steps {training.decay_steps}, and "
            f"num_train_steps {steps} would train on at a learning rate of 0; raise decay_steps."
        )
    if training.num_val_demos >= run.demos.num_demos:
        yield (
            f"training.num_val_demos {training.num_val_demos} leaves none of demos.num_demos "
            f"{run.demos.num_demos} to train on."
        )


def _evaluation_contradictions(run: Run) -> Iterator[str]:
    evaluation, demos = run.evaluation, run.demos
    if evaluation.max_episode_steps <= run.longest_demo:
        yield (
            f"evaluation.max_episode_steps {evaluation.max_episode_steps} is not longer than the "
            f"longest planned demonstration of {run.task}, {run.longest_demo} steps."
        )
    if evaluation.replan_steps > run.actions.action_horizon:
        yield (
            f"evaluation.replan_steps {evaluation.replan_steps} is more than the "
            f"{run.actions.action_horizon} actions of a chunk, actions.action_horizon."
        )
    last = run.evaluation_seeds[-1]
    if last > MAX_SEED:
        yield f"evaluation seeds reach {last}, beyond {MAX_SEED}; lower evaluation.first_seed."
    if demos.source == "plan" and demos.num_demos == ALL_DEMOS:
        yield "demos.num_demos is all, but there is no end to what is planned; set a number."
    elif demos.source == "plan":
        if last >= demos.first_seed:
            yield (
                f"evaluation seeds reach {last}, where demos.first_seed {demos.first_seed} begins; "
                "move one of them."
            )
        if demos.first_seed + len(run.shards()) * SHARD_SEEDS > MAX_SEED:
            yield f"the shards' seeds go beyond {MAX_SEED}; lower demos.first_seed."


def missing_weights(run: Run) -> str | None:
    """Return a sentence if the run's base weights or their tokenizer do not exist, else None."""
    if run.model.weights is None:
        return None
    base = BASE_WEIGHTS[run.family]
    needed = {
        "weights": f"the openpi checkpoint gs://openpi-assets/checkpoints/{base}, or "
        f"lerobot/{base} from Hugging Face,",
        "tokenizer": "PaliGemma's SentencePiece model, paligemma_tokenizer.model,",
    }
    for key, what in needed.items():
        path = getattr(run.model, key)
        if path is not None and not Path(path).exists():
            return (
                f"run {run.name!r} starts from {path!r}, which does not exist: put {what} there "
                f"(or set runs.{run.name}.model.{key} to where it is), or train from scratch with "
                f"runs.{run.name}.model: {{weights: null, tokenizer: null}}."
            )
    return None


def _readme() -> str:
    """Return config/README.md."""
    lines = [
        "# Configuration",
        "",
        "Generated from `workflow/demo2eval/config.py` by `make docs`. Every key, its default and",
        "what it means. How the files fit together: [Configuration](../docs/configuration.md).",
    ]
    classes: list[tuple[str, type[Section]]] = [
        ("runs.<run>", RunEntry),
        *((name, field.annotation) for name, field in Sections.model_fields.items()),  # type: ignore
        ("tasks.<task>", Task),
        ("tasks.<task>.milestones", Milestones),
    ]
    for name, section in classes:
        lines += ["", f"## {name}", "", section.__doc__ or "", ""]
        lines += ["| key | default | meaning |", "|---|---|---|"]
        for key, field in section.model_fields.items():
            if key in Sections.model_fields:
                continue
            default = "" if field.is_required() else f"`{json.dumps(field.default)}`"
            allowed = [value for value in get_args(field.annotation) if isinstance(value, str)]
            values = f" ({', '.join(allowed)})" if allowed else ""
            lines.append(f"| `{key}` | {default} | {field.description}{values} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Print the generated page or the JSON schema."""
    documents = {
        "readme": _readme,
        "schema": lambda: json.dumps(Config.model_json_schema(), indent=1) + "\n",
    }
    if len(sys.argv) != 2 or sys.argv[1] not in documents:
        sys.exit("usage: python -m demo2eval.config {readme,schema}")
    sys.stdout.write(documents[sys.argv[1]]())


if __name__ == "__main__":
    main()
