"""Training on the real chain's data: resumed equals uninterrupted, and the loss falls."""

import csv
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from demo2eval.checkpoints.openpi import load_params
from demo2eval.config import Actions, Training
from demo2eval.errors import UserError
from demo2eval.provenance import read_manifest
from demo2eval.training.state import tree_digest
from demo2eval.training.train import train

TRAINING = Training(batch_size=4, warmup_steps=2, peak_lr=1e-3, ema_decay=0.9, augment=True)
ACTIONS = Actions(state_noise=0.03)


def train_steps(run: Path, steps: list[int], output: Path, seed: int = 0, **changes) -> Path:
    """Train from a run's checkpoint 0 to each of the steps; return the folder of checkpoints."""
    shutil.copytree(run / "checkpoints", output, symlinks=True)
    for previous, step in zip([0, *steps], steps, strict=False):
        train(
            output / f"{previous}.json",
            run / "cache_64/manifest.json",
            output / f"{step}.json",
            step=step,
            seed=seed,
            training=TRAINING.model_copy(update=changes),
            actions=ACTIONS,
        )
    return output


def digest(manifest: Path) -> str:
    return read_manifest(manifest)["digest"]


@pytest.fixture(scope="module")
def checkpoints(pushcube_run, tmp_path_factory) -> Path:
    """A folder of checkpoints 0, 3, 6 and 9."""
    return train_steps(pushcube_run, [3, 6, 9], tmp_path_factory.mktemp("train") / "checkpoints")


def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(pushcube_run, checkpoints, tmp_path):
    whole = train_steps(pushcube_run, [9], tmp_path / "whole")
    assert digest(whole / "9.json") == digest(checkpoints / "9.json")
    trees = (load_params(folder / "9/params") for folder in (whole, checkpoints))
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_another_seed_trains_another_policy(pushcube_run, checkpoints, tmp_path):
    other = train_steps(pushcube_run, [3], tmp_path / "other", seed=1)
    assert digest(other / "3.json") != digest(checkpoints / "3.json")


def test_a_checkpoint_says_what_made_it(checkpoints):
    manifest = read_manifest(checkpoints / "6.json")
    assert manifest["metadata"]["step"] == 6
    assert manifest["inputs"]["previous"][0]["digest"] == digest(checkpoints / "3.json")
    assert manifest["digest"] == tree_digest(load_params(checkpoints / "6/params"))
    assert (checkpoints / "6/assets/maniskill/PushCube-v1/norm_stats.json").is_file()
    assert "6/metrics.csv" in manifest["outputs"]
    assert not [name for name in manifest["outputs"] if "train_state" in name]


def test_only_the_newest_training_states_are_kept(checkpoints):
    kept = [step for step in (3, 6, 9) if (checkpoints / f"{step}/train_state").is_dir()]
    assert kept == [6, 9]


def test_the_loss_falls_and_is_logged(pushcube_run, tmp_path):
    folder = train_steps(pushcube_run, [60], tmp_path / "longer", augment=False)
    with open(folder / "60/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "loss", "grad_norm", "learning_rate"]
    assert [int(row["step"]) for row in rows] == [20, 40, 60]
    losses = [float(row["loss"]) for row in rows]
    assert losses[-1] < 0.8 * losses[0]


def test_a_pruned_training_state_is_a_sentence(pushcube_run, checkpoints, tmp_path):
    image_cache = pushcube_run / "cache_64/manifest.json"
    with pytest.raises(UserError, match="train_state does not exist"):
        train(checkpoints / "3.json", image_cache, tmp_path / "5.json", step=5, training=TRAINING)


def test_training_must_go_forward(pushcube_run, checkpoints, tmp_path):
    image_cache = pushcube_run / "cache_64/manifest.json"
    with pytest.raises(UserError, match="not before 6"):
        train(checkpoints / "9.json", image_cache, tmp_path / "6.json", step=6, training=TRAINING)


def test_shifted_images_and_several_noises_train(pushcube_run, tmp_path):
    changes = {"augment": False, "random_shift": 3, "num_noise_samples": 2}
    folder = train_steps(pushcube_run, [2], tmp_path / "shifted", **changes)
    params = load_params(folder / "2/params")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(params))
    assert tree_digest(params) != tree_digest(load_params(folder / "0/params"))
