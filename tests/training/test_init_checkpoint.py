"""Checkpoint 0: what it says of the policy, and LoRA on weights that were trained before."""

import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from demo2eval.checkpoints.openpi import load_params
from demo2eval.checkpoints.policy_metadata import read_policy_metadata
from demo2eval.config import Actions, Dataset, Model, Replay, Training
from demo2eval.errors import UserError
from demo2eval.pi0.params import flatten
from demo2eval.provenance import read_manifest
from demo2eval.training.init_checkpoint import init_checkpoint
from demo2eval.training.train import train

TRAINING = Training(batch_size=4, warmup_steps=2, peak_lr=1e-3, ema_decay=0.9)


def make_checkpoint(run: Path, output: Path, **model) -> None:
    init_checkpoint(
        run / "norm_stats/manifest.json",
        output,
        task="PushCube-v1",
        prompt="push the blue cube into the red and white target region",
        robot="panda",
        replay=Replay(),
        dataset=Dataset(),
        actions=Actions(action_horizon=8),
        model=Model(**model),
    )


def test_the_policy_is_described_as_its_data_was_made(pushcube_run):
    policy = read_policy_metadata(pushcube_run / "checkpoints/0")
    assert (policy.task, policy.robot, policy.control_mode) == (
        "PushCube-v1",
        "panda",
        "pd_joint_pos",
    )
    assert policy.cameras == {"base_0_rgb": "base_camera"}
    assert policy.delta_action_mask == [True] * 7 + [False]
    assert policy.use_quantiles
    assert policy.config.action_horizon == 8
    metadata = read_manifest(pushcube_run / "checkpoints/0.json")["metadata"]
    assert metadata["step"] == 0
    assert metadata["dataset"] == read_manifest(pushcube_run / "dataset/manifest.json")["digest"]


@pytest.mark.parametrize(
    ("model", "sentence"),
    [
        ({"weights": "missing", "tokenizer": None}, "need the tokenizer"),
        ({"weights": "missing"}, "the base weights missing do not exist"),
    ],
)
def test_missing_weights_are_a_sentence(pushcube_run, tmp_path, model, sentence):
    tokenizer = next((pushcube_run / "checkpoints/0").glob("assets/**/tokenizer.model"))
    with pytest.raises(UserError, match=sentence):
        make_checkpoint(
            pushcube_run,
            tmp_path / "0.json",
            variant="pi05_tiny",
            **{"tokenizer": str(tokenizer)} | model,
        )
    assert not (tmp_path / "0.json").exists()


def test_lora_trains_its_factors_on_base_weights_and_freezes_the_rest(pushcube_run, tmp_path):
    """Only what openpi would train moves, and it resumes bit for bit."""

    def train_steps(folder: Path, steps: list[int], training: Training) -> None:
        for previous, step in pairwise([0, *steps]):
            train(
                folder / f"{previous}.json",
                pushcube_run / "cache_64/manifest.json",
                folder / f"{step}.json",
                step=step,
                training=training,
                actions=Actions(state_noise=0.03),
            )

    shutil.copytree(pushcube_run / "checkpoints", tmp_path / "base")
    train_steps(tmp_path / "base", [3], TRAINING)
    base = tmp_path / "base/3"
    make_checkpoint(
        pushcube_run,
        tmp_path / "whole/0.json",
        variant="pi05_tiny_lora",
        weights=str(base),
        tokenizer=str(next(base.glob("assets/**/tokenizer.model"))),
        continuous_state_token=True,
        overrides={"vocab_size": read_policy_metadata(base).config.vocab_size},
    )
    shutil.copytree(tmp_path / "whole", tmp_path / "resumed", symlinks=True)
    for folder, steps in (("whole", [6]), ("resumed", [3, 6])):
        train_steps(tmp_path / folder, steps, TRAINING.model_copy(update={"ema_decay": None}))
    digests = {
        read_manifest(tmp_path / folder / "6.json")["digest"] for folder in ("whole", "resumed")
    }
    assert len(digests) == 1
    before, start, after = (
        flatten(load_params(path))
        for path in (base / "params", tmp_path / "whole/0/params", tmp_path / "whole/6/params")
    )
    factors = after.keys() - before.keys()
    assert factors
    assert all("lora" in name for name in factors)
    assert all(not np.array_equal(after[name], start[name]) for name in factors)
    for name, value in before.items():
        if "/llm/" in name:
            assert after[name].dtype == "bfloat16"
            expected = value.astype(after[name].dtype)
            np.testing.assert_array_equal(after[name], expected, err_msg=name)
    assert not np.array_equal(after["action_in_proj/kernel"], before["action_in_proj/kernel"])
