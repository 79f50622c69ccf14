"""Training on the real chain's data: resumed equals uninterrupted, and the loss falls."""

import csv
import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from demo2eval.checkpoints.openpi import load_params
from demo2eval.checkpoints.policy_metadata import read_policy_metadata
from demo2eval.data import dataset, norm_stats
from demo2eval.data import image_cache as training_cache
from demo2eval.errors import UserError
from demo2eval.evaluation import action_error
from demo2eval.pi0.params import flatten
from demo2eval.provenance import read_manifest
from demo2eval.training import init_checkpoint
from demo2eval.training import train as train_segment
from demo2eval.training.state import tree_digest

PROMPT = "push the blue cube into the red and white target region"
MASK = [True] * 7 + [False]
TRAINING = {
    "batch_size": 4,
    "warmup_steps": 2,
    "peak_lr": 1e-3,
    "ema_decay": 0.9,
    "augment": True,
    "state_noise": 0.03,
}


@pytest.fixture(scope="module")
def run(pushcube_replay, tmp_path_factory) -> Path:
    """A run's folder with dataset, norm stats, training cache and checkpoint 0."""
    folder = tmp_path_factory.mktemp("run")
    data = folder / "dataset/manifest.json"
    dataset.dataset(
        dataset.Settings(prompt=PROMPT, cameras=["base_camera"], state=["qpos"]),
        [pushcube_replay],
        data,
    )
    training_cache.training_cache(
        training_cache.Settings(image_size=64), data, folder / "cache/manifest.json"
    )
    stats = folder / "norm_stats/manifest.json"
    chunk = {
        "action_horizon": 8,
        "delta_action_mask": MASK,
        "per_timestep_action_stats": True,
        "min_scale": 0.02,
    }
    norm_stats.norm_stats(norm_stats.Settings(**chunk), data, stats)
    settings = init_checkpoint.Settings(
        task="PushCube-v1",
        prompt=PROMPT,
        variant="pi05_tiny",
        model_overrides={
            "action_horizon": 8,
            "discrete_state_input": False,
            "continuous_state_token": True,
        },
        cameras={"base_0_rgb": "base_camera"},
        image_size=128,
        state=["qpos"],
        control_mode="pd_joint_pos",
        delta_action_mask=MASK,
    )
    init_checkpoint.init_checkpoint(settings, stats, folder / "checkpoints/0.json")
    return folder


def train(run: Path, steps: list[int], folder: str, **changes) -> Path:
    """Train segments that end at `steps` into run/<folder>; return the folder."""
    output = run / folder
    shutil.copytree(run / "checkpoints/0", output / "0", symlinks=True)
    shutil.copy(run / "checkpoints/0.json", output)
    for previous, step in zip([0, *steps], steps, strict=False):
        settings = train_segment.Settings(to_step=step, **TRAINING | changes)
        train_segment.train_segment(
            settings,
            output / f"{previous}.json",
            run / "cache/manifest.json",
            output / f"{step}.json",
        )
    return output


@pytest.fixture(scope="module")
def segments(run) -> Path:
    return train(run, [3, 6, 9], "segments")


def test_resumed_training_is_the_uninterrupted_one_bit_for_bit(run, segments):
    whole = train(run, [9], "whole")
    assert read_manifest(whole / "9.json")["digest"] == read_manifest(segments / "9.json")["digest"]
    for one, other in zip(
        *(jax.tree.leaves(load_params(path / "9/params")) for path in (whole, segments)),
        strict=True,
    ):
        np.testing.assert_array_equal(one, other)


def test_another_seed_trains_another_policy(run, segments):
    other = train(run, [3], "other", seed=1)
    assert read_manifest(other / "3.json")["digest"] != read_manifest(segments / "3.json")["digest"]


def test_a_checkpoint_says_what_made_it(segments):
    manifest = read_manifest(segments / "6.json")
    assert manifest["facts"]["step"] == 6
    assert (
        manifest["inputs"]["previous"][0]["digest"] == read_manifest(segments / "3.json")["digest"]
    )
    assert manifest["digest"] == tree_digest(load_params(segments / "6/params"))
    assert (segments / "6/assets/maniskill/PushCube-v1/norm_stats.json").is_file()


def test_only_the_newest_training_states_are_kept(segments):
    assert [step for step in (3, 6, 9) if (segments / str(step) / "train_state").is_dir()] == [6, 9]


def test_the_loss_log_and_the_loss(run):
    folder = train(run, [60], "longer", augment=False)
    with open(folder / "60/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert [int(row["step"]) for row in rows] == [20, 40, 60]
    losses = [float(row["loss"]) for row in rows]
    assert losses[-1] < 0.8 * losses[0]


def test_a_pruned_training_state_is_a_sentence(run, segments):
    settings = train_segment.Settings(to_step=5, **TRAINING)
    with pytest.raises(UserError, match="train_state does not exist"):
        train_segment.train_segment(
            settings, segments / "3.json", run / "cache/manifest.json", run / "again/5.json"
        )


def test_a_segment_must_go_forward(run, segments):
    settings = train_segment.Settings(to_step=6, **TRAINING)
    with pytest.raises(UserError, match="not before 6"):
        train_segment.train_segment(
            settings, segments / "9.json", run / "cache/manifest.json", run / "back/6.json"
        )


def test_lora_trains_its_factors_on_base_weights_and_freezes_the_rest(run):
    """Checkpoint 0 takes the weights that were trained before; only what openpi would train moves, and it resumes bit for bit."""
    base = train(run, [3], "base") / "3"
    description = read_manifest(run / "checkpoints/0.json")["settings"]
    settings = init_checkpoint.Settings(
        **description
        | {
            "variant": "pi05_tiny_lora",
            "weights": str(base),
            "tokenizer": str(base / "assets/maniskill/PushCube-v1/tokenizer.model"),
        }
        | {
            "model_overrides": description["model_overrides"]
            | {"vocab_size": read_policy_metadata(base).config.vocab_size}
        }
    )
    start = run / "lora"
    init_checkpoint.init_checkpoint(
        settings, run / "norm_stats/manifest.json", start / "checkpoints/0.json"
    )
    (start / "cache").symlink_to(run / "cache")
    whole, segments = (
        train(start, steps, f"to{len(steps)}", ema_decay=None) for steps in ([6], [3, 6])
    )
    assert read_manifest(whole / "6.json")["digest"] == read_manifest(segments / "6.json")["digest"]
    before, after = (flatten(load_params(path)) for path in (base / "params", whole / "6/params"))
    factors = after.keys() - before.keys()
    assert factors
    assert all("lora" in name for name in factors)
    for name, value in before.items():
        if "/llm/" in name:
            np.testing.assert_array_equal(
                after[name], value.astype(after[name].dtype), err_msg=name
            )
            assert after[name].dtype == "bfloat16"
    assert not np.array_equal(after["action_in_proj/kernel"], before["action_in_proj/kernel"])
    first = flatten(load_params(whole / "0/params"))
    assert all(not np.array_equal(after[name], first[name]) for name in factors)


def test_shifted_pictures_and_several_noises_train(run):
    folder = train(run, [2], "shifted", augment=False, random_shift=3, num_noise_samples=2)
    weights = load_params(folder / "2/params")
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(weights))
    assert tree_digest(weights) != tree_digest(load_params(folder / "0/params"))


def test_action_errors_of_trained_and_held_out_looks(run):
    folder = train(run, [1, 120], "num_val_demos", num_val_demos=1, augment=False, state_noise=0.0)
    tables = {}
    for step in (1, 120):
        output = folder / f"action_errors/{step}.json"
        settings = action_error.Settings(num_val_demos=1, looks=20, replan_steps=4)
        action_error.action_error(
            settings, folder / f"{step}.json", run / "cache/manifest.json", output
        )
        with open(output.with_suffix(".csv"), newline="") as file:
            tables[step] = list(csv.DictReader(file))
        assert read_manifest(output)["facts"]["step"] == step
    assert [(row["set"], row["dimension"]) for row in tables[1]] == [
        (name, str(dimension)) for name in ("training", "num_val_demos") for dimension in range(8)
    ]
    training, num_val_demos = (
        {
            step: np.mean(
                [float(row["mean_abs_error"]) for row in tables[step] if row["set"] == name]
            )
            for step in tables
        }
        for name in ("training", "num_val_demos")
    )
    # Two demonstrations are learnt by heart in no time; the third was never seen.
    assert training[120] < 0.7 * training[1]
    assert training[120] < num_val_demos[120]


def test_action_errors_of_another_dataset_are_refused(run, segments, tmp_path):
    content = json.loads((run / "cache/manifest.json").read_text())
    content["inputs"]["dataset"][0]["digest"] = "0" * 64
    (tmp_path / "manifest.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="was not trained on the dataset of"):
        action_error.action_error(
            action_error.Settings(num_val_demos=1),
            segments / "3.json",
            tmp_path / "manifest.json",
            tmp_path / "errors/3.json",
        )
