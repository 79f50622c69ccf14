"""Command lines: what a user types, and what a log begins with."""

import subprocess
import sys
from pathlib import Path

import pytest

from demo2eval.cli import expand_words, find_manifest, list_options
from demo2eval.command import split_settings
from demo2eval.data.dataset import build_dataset
from demo2eval.errors import UserError
from demo2eval.training.train import train


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        ("--training.augment --step 5", "--training.augment=true --step 5"),
        ("--training.no-augment", "--training.augment=false"),
        ("--training.augment false", "--training.augment false"),
        ("--actions.no-delta --seed 1", "--actions.delta=false --seed 1"),
        ("--training.peak_lr 1e-4", "--training.peak_lr 1e-4"),
    ],
)
def test_flags_need_no_value(typed, read):
    options = dict(list_options(train))
    assert expand_words(typed.split(), options) == read.split()


def test_the_values_of_a_list_follow_each_other():
    options = dict(list_options(build_dataset))
    words = ["--replays", "a b.json", "c.json", "--dataset.state", "qpos", "goal_pos"]
    read = ['--replays=["a b.json", "c.json"]', '--dataset.state=["qpos", "goal_pos"]']
    assert expand_words(words, options) == read
    assert expand_words(["--replays", '["a"]'], options) == ["--replays", '["a"]']


def test_a_folder_stands_for_its_manifest(tmp_path):
    for name in ("500", "dataset"):
        (tmp_path / name).mkdir()
    (tmp_path / "500.json").touch()
    (tmp_path / "dataset/manifest.json").touch()
    assert find_manifest(tmp_path / "500") == tmp_path / "500.json"
    assert find_manifest(tmp_path / "dataset") == tmp_path / "dataset/manifest.json"
    assert find_manifest(tmp_path) == tmp_path
    assert find_manifest("500") == "500"


def test_a_log_begins_with_date_machine_and_settings(tmp_path):
    words = ["--dataset", str(tmp_path / "missing.json"), "--output", str(tmp_path / "out.json")]
    words += ["--actions.no-delta", "--actions.min_scale", "0.5"]
    command = [sys.executable, "-m", "demo2eval.data.norm_stats", *words]
    result = subprocess.run(command, capture_output=True, text=True)
    lines = result.stderr.splitlines()
    assert "demo2eval.data.norm_stats on " in lines[0]
    assert " x " in lines[1]
    assert {"  actions.delta: False", "  actions.min_scale: 0.5"} <= set(lines)
    assert lines[-1].startswith("demo2eval: error: ")
    assert "missing.json does not exist" in lines[-1]


def test_settings_of_a_run_are_told_from_snakemakes_options():
    words = ["--training.peak_lr", "5e-4", "--dry-run", "--training.no-augment", "--cores", "4"]
    settings, others = split_settings("mine", words)
    assert settings == ["--config", "runs={mine: {training: {peak_lr: 5e-4, augment: false}}}"]
    assert others == ["--dry-run", "--cores", "4"]
    with pytest.raises(UserError, match="has no value"):
        split_settings("mine", ["--training.peak_lr", "--dry-run"])


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["run", "quickstrat"], "Did you mean 'quickstart'?"),
        (["run", "small_pickcub"], "Did you mean 'small_pickcube'?"),
        (["runs", "quickstart"], "unrecognized arguments"),
        (["rnu"], "invalid choice"),
    ],
)
def test_a_mistyped_command_is_a_sentence(words, expected):
    root = Path(__file__).resolve().parents[1]
    command = [sys.executable, "-m", "demo2eval.command", *words]
    result = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert result.returncode != 0
    assert expected in result.stderr
    assert "Traceback" not in result.stderr


def test_a_run_of_another_file_is_found_with_what_it_extends(tmp_path, monkeypatch):
    from demo2eval.command import find_run

    root = Path(__file__).resolve().parents[1]
    (tmp_path / "config").symlink_to(root / "config")
    (tmp_path / "my.yaml").write_text("runs: {mine: {extends: small_pickcube}}")
    monkeypatch.chdir(tmp_path)
    assert find_run("mine") == ["config/small.yaml", "my.yaml"]
    assert find_run("stackcube") == []
