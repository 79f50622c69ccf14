"""The configuration: six tasks as they should be, and a sentence for every mistake."""

import copy
from pathlib import Path

import pytest
import yaml

from demo2eval import config as configuration
from demo2eval.errors import UserError

ROOT = Path(__file__).resolve().parent.parent
TASKS = {
    "stackcube": ("StackCube-v1", 20, 256),
    "pickcube": ("PickCube-v1", 10, 256),
    "pushcube": ("PushCube-v1", 10, 16),
    "pullcube": ("PullCube-v1", 10, 16),
    "placesphere": ("PlaceSphere-v1", 10, 256),
    "peginsertionside": ("PegInsertionSide-v1", 10, 16),
}


@pytest.fixture(scope="module")
def shipped():
    config = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    config["runs"] |= yaml.safe_load((ROOT / "config/quickstart.yaml").read_text())["runs"]
    return config


@pytest.fixture
def config(shipped):
    return copy.deepcopy(shipped)


def message(config, run=None):
    """Return the sentence with which the configuration is refused."""
    try:
        configuration.check_schema(config)
        configuration.run_settings(config, run or "stackcube")
    except UserError as error:
        return str(error)
    pytest.fail("the configuration was accepted")


def test_what_is_shipped_is_valid(shipped):
    configuration.check_schema(shipped)
    for run in shipped["runs"]:
        assert configuration.run_settings(shipped, run)["prompt"]


@pytest.mark.parametrize("family", ["pi05", "pi0"])
@pytest.mark.parametrize("name", TASKS)
def test_the_six_tasks_and_their_pi0_twins(shipped, name, family):
    task, horizon, batch_size = TASKS[name]
    settings = configuration.run_settings(shipped, name if family == "pi05" else f"{name}_pi0")
    training = settings["training"]
    assert settings["task"] == task
    assert configuration.family(settings) == family
    assert settings["model"]["weights"] == f"weights/{family}_base"
    assert settings["model"]["action_horizon"] == horizon
    assert (training["batch_size"], training["steps"], training["save_interval"]) == (
        batch_size,
        30_000,
        500,
    )
    assert (training["warmup_steps"], training["peak_lr"], training["decay_steps"]) == (
        10_000,
        5e-5,
        1_000_000,
    )
    assert (training["decay_lr"], training["ema_decay"], training["clip_gradient_norm"]) == (
        5e-5,
        0.999,
        1.0,
    )


def test_prompts_differ_between_tasks(shipped):
    prompts = [task["prompt"] for task in shipped["tasks"].values()]
    assert len(set(prompts)) == 6


def test_a_misspelt_key_names_the_nearest(config):
    config["runs"]["stackcube"]["training"] = {"batchsize": 16}
    said = message(config)
    assert "runs.stackcube.training" in said
    assert "'batchsize'" in said
    assert "'batch_size'" in said


def test_an_unknown_task_names_the_nearest(config):
    config["runs"]["stackcube"]["task"] = "StackCubes-v1"
    assert "'StackCube-v1'" in message(config)


def test_an_unknown_run_names_the_nearest(config):
    assert "'stackcube'" in message(config, "stackcub")


@pytest.mark.parametrize(
    ("section", "change", "expected"),
    [
        ("training", {"save_interval": 7}, "multiple"),
        ("training", {"save_interval": 10}, "300 checkpoints"),
        ("training", {"batch_size": "many"}, "training.batch_size"),
        ("training", {"ema_decay": 1.0}, "training.ema_decay"),
        ("evaluation", {"max_episode_steps": 120}, "longest planned demonstration"),
        ("evaluation", {"replan_steps": 21}, "action_horizon"),
        ("evaluation", {"first_seed": 999_999}, "demos.first_seed"),
        ("replay", {"control_mode": "pd_ee_delta_pose"}, "actions.delta"),
        ("replay", {"control_mode": "pd_joint_delta"}, "'pd_joint_delta_pos'"),
        ("replay", {"cameras": {"base_0_rgb": "base"}}, "'base_camera'"),
        ("demos", {"on_invalid": "ignore"}, "error, skip"),
        ("dataset", {"state": ["tcp_pose"]}, "qpos"),
        ("dataset", {"state": ["qpos", "goal"]}, "dataset.state"),
        ("model", {"variant": "pi5"}, "'pi05'"),
    ],
)
def test_each_contradiction_is_a_sentence(config, section, change, expected):
    config["runs"]["stackcube"][section] = config["runs"]["stackcube"].get(section, {}) | change
    assert expected in message(config)


def test_a_displaced_arm_needs_actions_that_lead_back(config):
    config["runs"]["stackcube"] |= {
        "replay": {"control_mode": "pd_joint_delta_pos", "joint_perturbation": 0.03},
        "actions": {"delta": False},
    }
    assert "replay.joint_perturbation needs replay.control_mode pd_joint_pos" in message(config)


@pytest.mark.parametrize("run", ["pickcube", "pushcube", "pullcube", "placesphere"])
def test_a_camera_that_the_robot_lacks_names_those_there_are(config, run):
    config["runs"][run]["replay"] = {
        "cameras": {"base_0_rgb": "base_camera", "left_wrist_0_rgb": "hand_camera"}
    }
    said = message(config, run)
    assert f"run {run!r}" in said
    assert "'hand_camera'" in said
    assert "it has base_camera." in said


def test_an_unknown_camera_names_those_there_are(config):
    config["runs"]["stackcube"]["replay"] = {"cameras": {"base_0_rgb": "top_camera"}}
    said = message(config, "stackcube")
    assert "'top_camera'" in said
    assert "it has base_camera, hand_camera." in said


def test_a_hidden_goal_must_reach_the_model(config):
    config["runs"]["pickcube"]["dataset"] = {"state": ["qpos"]}
    assert "goal_pos" in message(config, "pickcube")
    config["runs"]["pickcube"] = {"task": "PickCube-v1", "model": {"discrete_state_input": False}}
    assert "discrete_state_input" in message(config, "pickcube")


def test_missing_weights_are_one_sentence_with_two_ways_out(config, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    settings = configuration.run_settings(config, "stackcube_pi0")
    said = configuration.missing_weights(settings, "stackcube_pi0")
    assert "weights/pi0_base" in said
    assert "from scratch" in said
    (tmp_path / "weights/pi0_base").mkdir(parents=True)
    assert "tokenizer" in configuration.missing_weights(settings, "stackcube_pi0")
    (tmp_path / "weights/paligemma_tokenizer.model").touch()
    assert configuration.missing_weights(settings, "stackcube_pi0") is None
    assert (
        configuration.missing_weights(
            configuration.run_settings(config, "quickstart"), "quickstart"
        )
        is None
    )
