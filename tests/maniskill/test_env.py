"""Where pictures are rendered: on a GPU only if its driver works, or as the user says."""

import pytest

from demo2eval.errors import UserError
from demo2eval.maniskill import env as environment
from demo2eval.maniskill.env import render_backend


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A function that makes this machine one with or without a GPU's device file, and with a driver that does what is said."""
    monkeypatch.delenv(environment.BACKEND_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    render_backend.cache_clear()

    def make(device: bool, driver: str) -> None:
        if device:
            (tmp_path / "nvidia0").touch()
        monkeypatch.setattr(environment, "GPU_DEVICES", (str(tmp_path / "nvidia[0-9]*"),))
        program = tmp_path / "nvidia-smi"
        program.write_text(f"#!/bin/sh\necho asked >> {tmp_path}/asked\n{driver}\n")
        program.chmod(0o755)

    yield make
    render_backend.cache_clear()


@pytest.mark.parametrize(
    ("driver", "expected"),
    [
        ("echo 'GPU 0: NVIDIA H100 80GB HBM3 (UUID: GPU-1)'", "gpu"),
        ("echo 'No devices found.'", "cpu"),
        (
            "echo 'NVIDIA-SMI has failed because it could not communicate with the NVIDIA driver.'; exit 9",
            "cpu",
        ),
        ("exit 127", "cpu"),
    ],
)
def test_a_driver_is_asked_once_and_has_to_answer(machine, tmp_path, driver, expected):
    machine(device=True, driver=driver)
    assert [render_backend(), render_backend()] == [expected, expected]
    assert (tmp_path / "asked").read_text() == "asked\n"


def test_without_a_device_nobody_is_asked(machine, tmp_path):
    machine(device=False, driver="echo 'GPU 0: NVIDIA H100'")
    assert render_backend() == "cpu"
    assert not (tmp_path / "asked").exists()


@pytest.mark.parametrize("wanted", ["cpu", "gpu"])
def test_the_user_decides(machine, tmp_path, monkeypatch, wanted):
    machine(device=True, driver="echo 'GPU 0: NVIDIA H100'")
    monkeypatch.setenv(environment.BACKEND_VARIABLE, wanted)
    assert render_backend() == wanted
    assert not (tmp_path / "asked").exists()


def test_what_is_no_backend_is_a_sentence(machine, monkeypatch):
    machine(device=True, driver="exit 1")
    monkeypatch.setenv(environment.BACKEND_VARIABLE, "cuda")
    with pytest.raises(UserError, match="DEMO2EVAL_RENDER_BACKEND is 'cuda'; set it to cpu or gpu"):
        render_backend()
