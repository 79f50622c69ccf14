"""One step is the same in one piece or many, on one device or eight, with the average anywhere."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
SCRIPT = Path(__file__).with_name("step_script.py")


def run_steps(*arguments: str, devices: int = 1) -> list[float]:
    """Run a process with so many simulated devices; return loss, gradient norm and weights."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    done = subprocess.run(
        [sys.executable, SCRIPT, *arguments],
        env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return [float(word) for word in done.stdout.split()]


@pytest.fixture(scope="module")
def whole_batch() -> list[float]:
    return run_steps("8", "1")


def test_micro_batches_give_the_whole_batchs_update(whole_batch):
    assert run_steps("2", "1") == pytest.approx(whole_batch, rel=2e-5)


@pytest.mark.parametrize("fsdp_devices", ["1", "4"])
def test_eight_devices_give_one_devices_update(whole_batch, fsdp_devices):
    values = run_steps("1", fsdp_devices, devices=8)
    assert values == pytest.approx(whole_batch, rel=2e-5)


def test_weights_that_are_cast_once_give_nearly_the_same_update(whole_batch):
    """In bfloat16 the gradient of a cast weight must reach the float32 weight."""
    assert run_steps("4", "1", "bfloat16") == pytest.approx(whole_batch, rel=3e-2)
