"""Training on the real chain's data: resumed equals uninterrupted, and the loss falls."""

import csv
import gc
import os
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import psutil
import pytest

from demo2eval.checkpoints.openpi import load_params, save_params
from demo2eval.config import Actions, Training
from demo2eval.data.loader import BatchLoader
from demo2eval.errors import UserError
from demo2eval.pi0.params import flatten, round_params
from demo2eval.provenance import read_manifest
from demo2eval.training import budget
from demo2eval.training.optimizer import make_optimizer, make_schedule
from demo2eval.training.state import StateSaver, TrainState, load_train_state, tree_digest
from demo2eval.training.train import prune_checkpoints, train

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


def train_step_9(checkpoints: Path, run: Path, **changes) -> Path:
    """Train from step 6 to 9; return the checkpoint's folder."""
    train(
        checkpoints / "6.json",
        run / "cache_64/manifest.json",
        checkpoints / "9.json",
        step=9,
        training=TRAINING.model_copy(update=changes),
        actions=ACTIONS,
    )
    return checkpoints / "9"


def assert_same_checkpoint(
    folder: Path, expected: Path, *, metrics: bool = True, with_state: bool = True
) -> None:
    """Compare weights and, if they are to be compared, metrics and training state bit for bit."""
    if metrics:
        assert (folder / "metrics.csv").read_bytes() == (expected / "metrics.csv").read_bytes()
    optimizer = make_optimizer(make_schedule(1, 1e-3, 10, 1e-4))
    loads = [lambda path: load_params(path / "params")]
    if with_state:
        loads.append(lambda path: load_train_state(path / "train_state", optimizer))
    for load in loads:
        jax.tree.map(np.testing.assert_array_equal, load(folder), load(expected))


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


def test_only_the_newest_training_state_is_kept(checkpoints):
    kept = [step for step in (3, 6, 9) if (checkpoints / f"{step}/train_state").is_dir()]
    assert kept == [9]


def test_the_loss_falls_and_is_logged(pushcube_run, tmp_path):
    folder = train_steps(pushcube_run, [60], tmp_path / "longer", augment=False)
    with open(folder / "60/metrics.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["step", "loss", "grad_norm", "learning_rate"]
    assert [int(row["step"]) for row in rows] == list(range(1, 61))
    losses = [float(row["loss"]) for row in rows]
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:10])


@pytest.fixture
def at_step_6(pushcube_run, tmp_path) -> Path:
    """A folder of checkpoints whose newest is 6."""
    return train_steps(pushcube_run, [3, 6], tmp_path / "checkpoints")


def test_weights_in_bfloat16_change_nothing_that_is_trained(pushcube_run, at_step_6, tmp_path):
    rounded = train_steps(pushcube_run, [3, 6], tmp_path / "rounded", params_dtype="bfloat16") / "6"
    optimizer = make_optimizer(make_schedule(1, 1e-3, 10, 1e-4))
    expected = load_train_state(at_step_6 / "6/train_state", optimizer)
    params, opt_state, ema = load_train_state(rounded / "train_state", optimizer)
    jax.tree.map(np.testing.assert_array_equal, (params, opt_state), expected[:2])
    average = flatten(load_params(at_step_6 / "6/params"))
    jax.tree.map(np.testing.assert_array_equal, ema, average)
    weights = flatten(load_params(rounded / "params"))
    jax.tree.map(np.testing.assert_array_equal, weights, round_params(average))
    assert {str(array.dtype) for array in weights.values()} == {"bfloat16", "float32"}


@pytest.mark.parametrize("how", ["crash", "told to stop"])
@pytest.mark.parametrize("on_host", [False, True], ids=["", "average on the host"])
def test_what_was_cut_short_goes_on_from_its_last_save(
    pushcube_run, at_step_6, checkpoints, monkeypatch, how, on_host
):
    """Every step is saved; the end comes while the batch of the last step is loaded."""
    if on_host:  # as on a GPU that is too small for the average
        monkeypatch.setattr(
            budget, "plan_step", lambda *_, **__: budget.StepPlan(4, "none", True, 0)
        )
    load_batch, loaded = BatchLoader.load_batch, []

    def end_at_last_step(self, step, *arguments):
        loaded.append(step)
        if step == 8 and how == "crash":
            raise OSError("killed")
        if step == 8:
            os.kill(os.getpid(), signal.SIGTERM)
        return load_batch(self, step, *arguments)

    monkeypatch.setattr(BatchLoader, "load_batch", end_at_last_step)
    every_step = {} if how == "told to stop" else {"save_minutes": 0.0}
    with pytest.raises(OSError if how == "crash" else SystemExit):
        train_step_9(at_step_6, pushcube_run, **every_step)
    assert not (at_step_6 / "9.json").exists()
    monkeypatch.setattr(BatchLoader, "load_batch", load_batch)
    folder = train_step_9(at_step_6, pushcube_run)
    if on_host:
        # The host adds up the average with other roundings than the device.
        trees = (load_params(path / "params") for path in (folder, checkpoints / "9"))
        jax.tree.map(lambda *pair: np.testing.assert_allclose(*pair, atol=1e-6), *trees)
    else:
        assert_same_checkpoint(folder, checkpoints / "9")
    assert not list(at_step_6.glob(".9.partial*"))


def test_a_saved_state_with_a_changed_bit_is_not_taken(
    pushcube_run, at_step_6, checkpoints, monkeypatch, capsys
):
    """Its arrays can be read: its hash tells. Training goes on from the state before it."""
    load_batch = BatchLoader.load_batch

    def end_at_last_step(self, step, *arguments):
        if step == 8:
            raise OSError("killed")
        return load_batch(self, step, *arguments)

    monkeypatch.setattr(BatchLoader, "load_batch", end_at_last_step)
    with pytest.raises(OSError, match="killed"):
        train_step_9(at_step_6, pushcube_run, save_minutes=0.0)
    monkeypatch.setattr(BatchLoader, "load_batch", load_batch)
    newest = max(at_step_6.glob(".9.partial*/saved/*-*"))
    largest = max(newest.rglob("d/*"), key=lambda path: path.stat().st_size)
    content = bytearray(largest.read_bytes())
    content[len(content) // 2] ^= 1
    largest.write_bytes(content)
    assert_same_checkpoint(train_step_9(at_step_6, pushcube_run), checkpoints / "9")
    assert f"{newest} is damaged" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "file"), [("params", "d/*"), ("train_state", "d/*"), ("assets", "**/norm_stats.json")]
)
def test_a_checkpoint_whose_files_were_changed_is_refused(pushcube_run, at_step_6, part, file):
    path = next(path for path in (at_step_6 / "6" / part).rglob(file) if path.is_file())
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"6/{part}.* is not what .*6.json describes"):
        train_step_9(at_step_6, pushcube_run)


@pytest.mark.parametrize(
    "save",
    [
        save_params,
        lambda path, params: StateSaver().save(path, TrainState(params, {}, (), None)),
    ],
    ids=["weights", "training state"],
)
def test_what_is_not_finite_is_not_saved(pushcube_run, tmp_path, save):
    params = load_params(pushcube_run / "checkpoints/0/params")
    params["PaliGemma"]["img"]["pos_embedding"][0, 0, 0] = np.nan
    with pytest.raises(UserError, match=r"not finite \(array .*pos_embedding\), and are not saved"):
        save(tmp_path / "saved", params)
    assert not list(tmp_path.iterdir())


def test_a_loss_that_is_not_finite_names_its_step_and_episodes(pushcube_run, at_step_6):
    with pytest.raises(UserError, match=r"step \d has a loss of .*episodes 0, 1"):
        train_step_9(at_step_6, pushcube_run, peak_lr=1e30, warmup_steps=0)


def test_memory_and_files_do_not_grow_with_saves(pushcube_run, at_step_6):
    process, sizes = psutil.Process(), []
    saver = StateSaver()
    optimizer = make_optimizer(make_schedule(1, 1e-3, 10, 1e-4))
    params, opt_state, _ = load_train_state(at_step_6 / "6/train_state", optimizer)
    state = jax.device_put(TrainState(params, {}, opt_state, None))
    for number in range(50):
        saver.save(at_step_6 / f"saved-{number}", state)
        saver.wait()
        shutil.rmtree(at_step_6 / f"saved-{number}")
        gc.collect()
        sizes.append(process.memory_info().rss)
    assert max(sizes[-5:]) < 1.05 * max(sizes[:5])


def test_weights_go_once_they_are_evaluated_unless_they_are_kept(tmp_path):
    checkpoints, rollouts = tmp_path / "checkpoints", tmp_path / "rollouts"
    rollouts.mkdir()
    for step in (0, 10, 20, 30, 40):
        for part in ("params", "train_state"):
            (checkpoints / f"{step}/{part}").mkdir(parents=True)
        if step != 30:
            (rollouts / f"{step}.json").touch()
    removed = prune_checkpoints(checkpoints, 40, keep_period=20)
    states = [checkpoints / f"{step}/train_state" for step in (0, 10, 20, 30)]
    assert removed == sorted([checkpoints / "10/params", *states])
    kept = sorted((path.parent.name, path.name) for path in checkpoints.glob("*/*"))
    params = [(step, "params") for step in ("0", "20", "30", "40")]
    assert kept == sorted([*params, ("40", "train_state")])


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
