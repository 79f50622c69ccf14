"""The configuration: what is shipped is as it should be, and every mistake is a sentence."""

import copy
from pathlib import Path

import pytest
import yaml

from demo2eval import config as module
from demo2eval.errors import UserError

ROOT = Path(__file__).resolve().parents[1]
TASKS = {
    "stackcube": ("StackCube-v1", 20, 256),
    "pickcube": ("PickCube-v1", 10, 256),
    "pushcube": ("PushCube-v1", 10, 16),
    "pullcube": ("PullCube-v1", 10, 16),
    "placesphere": ("PlaceSphere-v1", 10, 256),
    "peginsertionside": ("PegInsertionSide-v1", 10, 16),
}


def read(*names: str) -> dict:
    """Read files of config/ as Snakemake would merge them."""
    merged: dict = {}
    for name in names:
        for key, value in yaml.safe_load((ROOT / "config" / name).read_text()).items():
            merged.setdefault(key, {}).update(value)
    return merged


@pytest.fixture
def config() -> dict:
    return copy.deepcopy(read("config.yaml", "quickstart.yaml"))


def message(config: dict) -> str:
    """Return the sentences with which a configuration is refused."""
    with pytest.raises(UserError) as error:
        module.load(config)
    return str(error.value)


def quickstart_with(config: dict, **changes: dict) -> dict:
    """Return the configuration with changes to sections of the quickstart."""
    run = config["runs"]["quickstart"]
    for section, change in changes.items():
        run[section] = run.get(section, {}) | change
    return config


@pytest.mark.parametrize("name", ["quickstart", "small", "experiments", "datasets"])
def test_what_is_shipped_is_valid(name):
    assert module.load(read("config.yaml", f"{name}.yaml"))


@pytest.mark.parametrize("family", ["pi05", "pi0"])
@pytest.mark.parametrize("name", TASKS)
def test_the_six_tasks_and_their_pi0_twins(config, name, family):
    task, horizon, batch_size = TASKS[name]
    run = module.load(config)[name if family == "pi05" else f"{name}_pi0"]
    training = run.training
    assert (run.task, run.family, run.actions.action_horizon) == (task, family, horizon)
    assert run.model.weights == f"weights/{family}_base"
    assert training.batch_size == batch_size
    assert (training.num_train_steps, training.save_interval) == (30_000, 500)
    assert (training.warmup_steps, training.peak_lr) == (10_000, 5e-5)
    assert (training.decay_steps, training.decay_lr) == (1_000_000, 5e-5)
    assert (training.ema_decay, training.clip_gradient_norm) == (0.999, 1.0)


def test_prompts_differ_between_tasks(config):
    assert len({task["prompt"] for task in config["tasks"].values()}) == 6


def test_defaults_are_openpis():
    training = module.Training()
    assert (training.batch_size, training.num_train_steps, training.save_interval) == (
        32,
        30_000,
        1000,
    )
    assert (training.warmup_steps, training.peak_lr) == (1000, 2.5e-5)
    assert (training.decay_steps, training.decay_lr) == (30_000, 2.5e-6)
    assert (training.ema_decay, training.weight_decay) == (0.99, 1e-10)


def test_a_run_builds_on_another(config):
    config["runs"]["mine"] = {"extends": "quickstart", "seed": 1, "training": {"peak_lr": 2e-3}}
    runs = module.load(config)
    mine, quickstart = runs["mine"], runs["quickstart"]
    assert (mine.seed, quickstart.seed) == (1, 0)
    assert mine.training == quickstart.training.model_copy(update={"peak_lr": 2e-3})
    assert (mine.task, mine.demos, mine.model) == (
        quickstart.task,
        quickstart.demos,
        quickstart.model,
    )


def test_the_prompt_of_an_extended_run_stays_with_its_task(config):
    config["runs"]["quickstart"]["prompt"] = "push it"
    config["runs"]["same"] = {"extends": "quickstart"}
    config["runs"]["other"] = {"extends": "quickstart", "task": "PullCube-v1"}
    runs = module.load(config)
    assert runs["same"].prompt == "push it"
    assert runs["other"].prompt == config["tasks"]["PullCube-v1"]["prompt"]


def test_text_is_read_as_the_type_of_its_key(config):
    """Snakemake passes what follows `--config` on as text."""
    changes = {"num_train_steps": "3800", "decay_steps": "3800", "peak_lr": "1e-3"}
    changes |= {"ema_decay": "null", "augment": "true"}
    training = module.load(quickstart_with(config, training=changes))["quickstart"].training
    assert (training.num_train_steps, training.peak_lr) == (3800, 1e-3)
    assert training.ema_decay is None
    assert training.augment is True


BAD_VALUES = [
    ("demos", {"source": "my{x}.h5"}, "demos.source is 'my{x}.h5'; it has braces"),
    ("training", {"stepps": 6}, "unknown key 'stepps'"),
    ("training", {"batchsize": 16}, "Did you mean 'batch_size'?"),
    ("training", {"lr": 1e-3}, "Did you mean 'peak_lr'?"),
    ("training", {"batch_size": "many"}, "training.batch_size is 'many'"),
    ("training", {"batch_size": 2.0}, "should be an integer"),
    ("training", {"batch_size": True}, "not a truth value"),
    ("training", {"batch_size": 10**12}, "less than or equal to"),
    ("training", {"batch_size": 0}, "greater than or equal to 1"),
    ("training", {"peak_lr": float("nan")}, "peak_lr is nan; it should be a finite number"),
    ("training", {"peak_lr": float("inf")}, "peak_lr is inf; it should be a finite number"),
    ("training", {"peak_lr": -1e-3}, "greater than 0"),
    ("training", {"ema_decay": float("nan")}, "training.ema_decay"),
    ("training", {"ema_decay": 1.0}, "less than 1"),
    ("training", {"clip_gradient_norm": 0}, "greater than 0"),
    ("training", {"warmup_steps": 5000}, "not below training.decay_steps"),
    ("training", {"num_train_steps": 2850}, "learning rate of 0"),
    ("training", {"num_train_steps": 2000}, "not a multiple"),
    ("training", {"save_interval": 1}, "more than 300 checkpoints"),
    ("training", {"num_val_demos": 600}, "leaves none"),
    ("evaluation", {"first_seed": 2**31}, "less than or equal to 2147483647"),
    ("evaluation", {"first_seed": 2**31 - 10}, "beyond 2147483647"),
    ("evaluation", {"first_seed": 999_990}, "demos.first_seed"),
    ("evaluation", {"num_episodes": -1}, "greater than or equal to 1"),
    ("evaluation", {"max_episode_steps": 77}, "longest planned demonstration"),
    ("evaluation", {"replan_steps": 17}, "actions.action_horizon"),
    ("demos", {"first_seed": 2**31 - 1000}, "beyond 2147483647"),
    ("demos", {"on_invalid": "ignore"}, "error or skip"),
    ("demos", {"num_demos": None}, "demos.num_demos is None"),
    ("demos", {"num_demos": "every"}, "demos.num_demos is 'every'"),
    ("demos", {"num_demos": "all"}, "no end to what is planned"),
    ("demos", {"source": ["a.h5", 2]}, "it should be plan, published, a path"),
    ("demos", {"source": []}, "it should be plan, published, a path"),
    ("replay", {"image_size": 100_000}, "less than or equal to 1024"),
    ("replay", {"control_mode": "pd_joint_delta"}, "Did you mean 'pd_joint_delta_pos'?"),
    ("replay", {"control_mode": "pd_ee_delta_pose"}, "actions.delta needs"),
    ("replay", {"cameras": {"base_0_rgb": "base"}}, "Did you mean 'base_camera'?"),
    ("replay", {"cameras": {"base_0_rgb": "hand_camera"}}, "it has base_camera."),
    ("replay", {"cameras": {"front": "base_camera"}}, "base_0_rgb"),
    ("dataset", {"state": ["tcp_pose"]}, "qpos"),
    ("dataset", {"state": ["qpos", "goal"]}, "dataset.state has 'goal'"),
    ("dataset", {"state": []}, "it should have at least 1 item"),
    ("dataset", {"state": ["qpos", "qpos"]}, "twice"),
    ("model", {"variant": "pi5"}, "Did you mean 'pi05'?"),
    ("model", {"overrides": {"siglip.widht": 96}}, "Did you mean 'width'?"),
    ("model", {"overrides": {"siglip.width": "wide"}}, "'wide' for 'width'"),
    ("model", {"overrides": {"siglip.patch_size": 0}}, "a 0 where"),
    ("model", {"overrides": {"paligemma.width": 10**9}}, "no machine holds it"),
]


@pytest.mark.parametrize(("section", "change", "expected"), BAD_VALUES)
def test_a_bad_value_is_a_sentence_with_its_key(config, section, change, expected):
    assert expected in message(quickstart_with(config, **{section: change}))


def test_all_mistakes_are_said_at_once(config):
    said = message(
        quickstart_with(
            config, training={"batch_size": 0, "stepps": 1}, evaluation={"num_episodes": 0}
        )
    )
    assert len(said.splitlines()) == 3


def test_all_contradictions_of_all_runs_are_said_at_once(config):
    config["runs"]["stackcube"]["replay"] = {"cameras": {"base_0_rgb": "top_camera"}}
    said = message(
        quickstart_with(config, training={"num_train_steps": 2000, "warmup_steps": 5000})
    )
    assert "run 'stackcube': replay.cameras has 'top_camera'" in said
    assert said.count("run 'quickstart'") == 3


def test_the_perturbed_arm_needs_actions_that_lead_back(config):
    replay = {"control_mode": "pd_joint_delta_pos", "joint_perturbation": 0.03}
    said = message(quickstart_with(config, replay=replay, actions={"delta": False}))
    assert "replay.joint_perturbation needs replay.control_mode pd_joint_pos" in said


def test_unknown_names_suggest_the_nearest(config):
    config["runs"]["quickstart"]["task"] = "PushCubes-v1"
    config["runs"]["mine"] = {"extends": "quickstrat"}
    config["runs"]["empty"] = {}
    said = message(config)
    assert "Did you mean 'PushCube-v1'?" in said
    assert "Did you mean 'quickstart'?" in said
    assert "run 'empty': has no task" in said


@pytest.mark.parametrize(
    ("names", "expected"),
    [(["reach", "grab", "lift", "done"], "'grab'"), (["reach", "place", "done"], "needs `placed`")],
)
def test_milestones_are_known_before_the_last(config, names, expected):
    config["tasks"]["PushCube-v1"]["milestones"] = {"names": names}
    assert expected in message(config)


def test_runs_that_extend_each_other_are_refused(config):
    config["runs"]["a"], config["runs"]["b"] = {"extends": "b"}, {"extends": "a"}
    assert "a -> b -> a" in message(config)


def test_a_hidden_goal_must_reach_the_model(config):
    config["runs"]["pickcube"]["dataset"] = {"state": ["qpos"]}
    assert "goal_pos" in message(config)
    config["runs"]["pickcube"].pop("dataset")
    config["runs"]["pickcube"]["model"] = {"discrete_state_input": False}
    assert "discrete_state_input" in message(config)


def test_missing_weights_are_one_sentence_with_two_ways_out(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    runs = module.load(config)
    said = module.missing_weights(runs["stackcube_pi0"])
    assert said is not None
    assert "weights/pi0_base" in said
    assert "from scratch" in said
    (tmp_path / "weights/pi0_base").mkdir(parents=True)
    assert "tokenizer" in (module.missing_weights(runs["stackcube_pi0"]) or "")
    (tmp_path / "weights/paligemma_tokenizer.model").touch()
    assert module.missing_weights(runs["stackcube_pi0"]) is None
    assert module.missing_weights(runs["quickstart"]) is None


@pytest.mark.parametrize(("name", "made"), [("README.md", "readme"), ("schema.json", "schema")])
def test_generated_files_are_up_to_date(name, made, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["config", made])
    module.main()
    assert (ROOT / "config" / name).read_text() == capsys.readouterr().out, "run `make docs`"
