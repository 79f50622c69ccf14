"""Set-up: what it decides from what it finds. The whole of it runs at the head of `make test`."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def setup():
    spec = importlib.util.spec_from_file_location("demo2eval_setup", ROOT / "envs/setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


DEB822 = """Types: deb
# a comment
URIs: http://deb.debian.org/debian
Suites: bookworm bookworm-updates
Components: main
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://deb.debian.org/debian-security
Suites: bookworm-security
Components: main
"""


def test_backports_come_from_the_machines_own_source(setup):
    stanza = setup.backports_source(DEB822)
    assert "Suites: bookworm-backports\n" in stanza
    assert "URIs: http://deb.debian.org/debian\n" in stanza
    assert "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg" in stanza
    assert "security" not in stanza


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (
            "deb http://mirror.example/debian bookworm main contrib",
            "deb http://mirror.example/debian bookworm-backports main contrib\n",
        ),
        (
            "deb [arch=amd64] https://m.example/debian bookworm main",
            "deb [arch=amd64] https://m.example/debian bookworm-backports main\n",
        ),
        ("deb http://mirror.example/debian trixie main", None),
        ("# deb http://mirror.example/debian bookworm main", None),
        ("deb http://mirror.example/debian bookworm-updates main", None),
    ],
)
def test_one_line_sources(setup, line, expected):
    assert setup.backports_source(f"# head\n{line}\n") == expected


@pytest.mark.parametrize(("text", "major"), [("25.0.7-2~bpo12+1", 25), ("1:24.2.8-1ubuntu1", 24), ("", None), (None, None)])
def test_the_version_of_mesa(setup, text, major):
    assert setup.lavapipe_version(text) == major


@pytest.mark.parametrize(
    ("system", "expected"),
    [
        (("debian", "12"), "bookworm-backports"),
        (("ubuntu", "24.10"), "apt-get"),
        (("fedora", "42"), "dnf"),
        (("arch", ""), "lavapipe"),
    ],
)
def test_advice_is_a_command_for_the_system(setup, system, expected):
    assert expected in setup.advice(*system)


def test_an_old_mesa_is_one_sentence(setup, monkeypatch):
    monkeypatch.setattr(setup, "has_nvidia_gpu", lambda: False)
    monkeypatch.setattr(setup, "installed_mesa", lambda: 22)
    monkeypatch.setattr(setup, "system", lambda: ("fedora", "38"))
    with pytest.raises(setup.SetupError, match=r"Mesa 25 or later, and there is Mesa 22; run: sudo dnf"):
        setup.set_up_vulkan()


def test_a_shim_that_does_not_run_is_not_taken_for_python(setup, tmp_path, monkeypatch):
    shim = tmp_path / "python3.12"
    shim.write_text("#!/bin/sh\necho 'pyenv: python3.12: command not found' >&2\nexit 127\n")
    shim.chmod(0o755)
    good = tmp_path / "good/python3.12"
    good.parent.mkdir()
    good.symlink_to(sys.executable)
    monkeypatch.setattr(setup, "python_candidates", lambda: iter([str(shim), str(good)]))
    assert setup.find_python() is not None
    monkeypatch.setattr(setup, "python_candidates", lambda: iter([str(shim)]))
    assert setup.find_python() is None


def test_a_second_setup_does_nothing():
    result = subprocess.run([sys.executable, str(ROOT / "envs/setup.py")], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ""
