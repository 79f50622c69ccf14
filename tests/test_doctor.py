"""The doctor: what it sees on this machine, and what it says when something is missing."""

from pathlib import Path

import pytest

from demo2eval import doctor


@pytest.fixture
def driver(tmp_path, monkeypatch):
    """A function that puts a GPU driver's program on the PATH which lists the given GPUs."""

    def list_gpus(*lines: str) -> None:
        program = tmp_path / "nvidia-smi"
        program.write_text("#!/bin/sh\n" + "".join(f"echo '{line}'\n" for line in lines))
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    return list_gpus


@pytest.mark.slow
def test_this_machine_can_run_the_quickstart():
    lines = dict(zip(doctor.CHECKS, doctor.diagnose(), strict=True))
    # The disk may be too full for a quickstart and still have room for the tests.
    assert [name for name, (ok, _) in lines.items() if not ok and name != "machine"] == []
    assert "mplib" in lines["planning"][1]
    assert "on the " in lines["vulkan"][1]
    assert "cores" in lines["machine"][1]


def test_a_missing_environment_is_named(monkeypatch):
    monkeypatch.setattr(doctor, "PLANNING_PYTHON", doctor.ROOT / "envs/missing/bin/python")
    ok, found, use = doctor.check_planning()
    assert not ok
    assert found == "envs/missing/bin/python does not exist"
    assert "make setup" in use


def test_a_machine_without_a_vulkan_device_is_not_well(monkeypatch):
    monkeypatch.setenv("VK_ICD_FILENAMES", "/does/not/exist.json")
    ok, _, use = doctor.check_vulkan()
    assert not ok
    assert "make setup" in use


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("NVIDIA H100 80GB HBM3, 81559", "full-size Pi0.5 at a batch of 32"),
        ("NVIDIA GeForce RTX 4090, 24564", "small models; full-size Pi0.5 needs about 60 GiB"),
    ],
)
def test_what_a_gpu_is_good_for_follows_from_its_memory(driver, line, expected):
    driver("Small GPU, 4096", line)
    ok, found, use = doctor.check_gpu()
    assert ok
    assert found.startswith("2 x " + line.split(",")[0])
    assert use == expected


def test_a_gpu_that_jax_does_not_see_is_not_well(driver, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    driver("NVIDIA GeForce RTX 4090, 24564")
    ok, _, use = doctor.check_jax()
    assert not ok
    assert "make setup" in use


def test_a_full_disk_is_said(monkeypatch):
    monkeypatch.setattr(doctor, "QUICKSTART_DISK_GIB", 10**9)
    ok, _, use = doctor.check_machine()
    assert not ok
    assert "make room" in use


def test_it_needs_nothing_but_python():
    """Without an environment it must still say what is missing."""
    source = Path(doctor.__file__).read_text()
    assert "from demo2eval" not in source.split('RENDER = """')[0]
