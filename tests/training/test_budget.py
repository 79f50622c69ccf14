"""What training needs is told beforehand, from the model's sizes."""

import dataclasses
from pathlib import Path

import jax
import pytest
import yaml

from demo2eval import config as settings
from demo2eval.config import Training
from demo2eval.errors import UserError
from demo2eval.pi0.config import make_config
from demo2eval.pi0.params import flatten, init_params, round_params
from demo2eval.training import budget
from demo2eval.training.budget import (
    GIB,
    Sizes,
    disk_bytes,
    list_shortages,
    model_config,
    plan_step,
)

ROOT = Path(__file__).resolve().parents[2]
H100 = int(79 * GIB * budget.JAX_SHARE)


def load_run(**training):
    """Return the shipped StackCube run, with other settings of training."""
    content = yaml.safe_load((ROOT / "config/config.yaml").read_text())
    content["runs"]["stackcube"].setdefault("training", {}).update(training)
    return settings.load(content)["stackcube"]


def plan(run, **options):
    """Plan a step of a run with two cameras."""
    return plan_step(model_config(run), run.training, 2, **options)


def test_the_shipped_run_fits_on_one_gpu_of_80_gb_with_its_average_beside_it():
    step_plan = plan(load_run(), memory=H100)
    assert step_plan.ema_on_host
    assert step_plan.device_bytes < H100
    assert 256 % step_plan.micro_batch_size == 0


def test_two_gpus_that_share_the_state_hold_the_average_too():
    run = load_run(fsdp_devices=2)
    step_plan = plan(run, memory=H100, devices=2)
    assert not step_plan.ema_on_host
    assert 128 % step_plan.micro_batch_size == 0


def test_more_memory_is_never_used_for_a_slower_step():
    sizes = [plan(load_run(), memory=gib * GIB).micro_batch_size for gib in (72, 77, 90, 140)]
    assert sizes == sorted(sizes)
    assert sizes[0] < sizes[-1]


def test_what_is_given_is_kept():
    step_plan = plan(load_run(micro_batch_size=2, remat="all"), memory=H100)
    assert (step_plan.micro_batch_size, step_plan.remat) == (2, "all")


def test_a_small_model_is_computed_in_one_piece():
    config = make_config("pi05_tiny")
    assert plan_step(config, Training(batch_size=32), 2, memory=H100).micro_batch_size == 32


@pytest.mark.parametrize(
    ("changes", "options", "sentence"),
    [
        ({}, {"memory": 40 * GIB}, "per device, with .*; there are 40. Use a LoRA variant"),
        ({}, {"devices": 3}, "batch_size 256 and .* do not go with 3 devices"),
        ({"fsdp_devices": 4}, {"devices": 2}, "fsdp_devices 4 do not go with 2 devices"),
        ({"micro_batch_size": 48}, {}, "micro_batch_size 48 does not divide the 256 samples"),
    ],
)
def test_what_does_not_go_is_a_sentence(changes, options, sentence):
    with pytest.raises(UserError, match=sentence):
        plan(load_run(**changes), **options)


def test_sizes_are_those_of_the_arrays():
    config = dataclasses.replace(make_config("pi05_tiny"), dtype="bfloat16")
    shapes = jax.eval_shape(lambda key: init_params(config, key), jax.random.key(0))
    sizes = Sizes.of(config)
    leaves = flatten(shapes)
    rounded = jax.eval_shape(round_params, leaves)
    assert sizes.trained == sum(leaf.size for leaf in leaves.values())
    stored = sum(leaf.size * leaf.dtype.itemsize for leaf in rounded.values())
    assert sizes.weights_bytes("bfloat16") == stored


def test_disk_is_what_is_kept():
    whole, sparse = disk_bytes(load_run(), 30), disk_bytes(load_run(keep_period=10_000), 30)
    sizes = Sizes.of(load_run().pi0_config())
    assert whole - sparse == (30 - 6) * sizes.weights_bytes()
    rounded = disk_bytes(load_run(params_dtype="bfloat16"), 30)
    # Less for each checkpoint, but the training state must hold the average.
    assert whole - rounded == 30 * 2 * sizes.cast - 2 * sizes.ema_bytes()


def test_a_machine_that_is_too_small_is_told_both_of_memory_and_disk(monkeypatch, tmp_path):
    monkeypatch.setattr(budget, "read_ram", lambda: 24 * GIB)
    usage = budget.shutil.disk_usage(tmp_path)._replace(free=60 * GIB)
    monkeypatch.setattr(budget.shutil, "disk_usage", lambda folder: usage)
    memory, disk = list_shortages(load_run(), 30, tmp_path, [])
    assert "this machine has no GPU and 24 GiB of memory" in memory
    assert "has 60 GiB free" in disk
    (disk,) = list_shortages(load_run(), 30, tmp_path, [("NVIDIA H100 80GB HBM3", 79.6)])
    assert "training.keep_period" in disk
