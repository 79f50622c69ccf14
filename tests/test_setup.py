"""Set-up: what it finds, what it leaves alone, and its package source for Debian 12."""

import ast
import importlib.util
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from demo2eval.maniskill import env as env_module

SCRIPT = Path(__file__).resolve().parent.parent / "envs/setup.py"

DEB822 = """Types: deb deb-src
URIs: http://mirror.example.org/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg

Types: deb
URIs: http://mirror.example.org/debian-security
Suites: bookworm-security
Components: main
"""
OTHER_DISTRIBUTOR = """Types: deb
URIs: https://packages.example.com
Suites: bookworm
Components: main
"""


@pytest.fixture(scope="module")
def setup_script():
    """The script as a module."""
    specification = importlib.util.spec_from_file_location("setup_script", SCRIPT)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture
def project(setup_script, tmp_path, monkeypatch):
    """A project without dependencies whose environment uv has made."""
    (tmp_path / "pyproject.toml").write_text(
        '[project]\nname = "empty"\nversion = "1"\nrequires-python = "==3.12.*"\n'
    )
    uv = setup_script.find_uv()
    subprocess.run(
        [uv, "lock", "--quiet", "--offline", "--project", tmp_path, "--python", sys.executable],
        check=True,
    )
    monkeypatch.setattr(setup_script, "ROOT", tmp_path)
    setup_script.sync(uv, tmp_path)
    return tmp_path


def test_the_script_is_python_3_9_and_needs_no_package():
    tree = ast.parse(SCRIPT.read_text(), feature_version=(3, 9))
    imported = {
        alias.name for node in tree.body if isinstance(node, ast.Import) for alias in node.names
    }
    imported |= {node.module for node in tree.body if isinstance(node, ast.ImportFrom)}
    assert {name.split(".")[0] for name in imported} <= sys.stdlib_module_names


@pytest.mark.parametrize(
    ("version", "expected"),
    [
        ("uv 0.13.9 (x86_64-unknown-linux-gnu)\n", True),
        ("uv 0.7.0", True),
        ("uv 1.0.0", True),
        ("uv 0.5.31", False),
        (None, False),
        ("pyenv: uv: command not found", False),
    ],
)
def test_an_old_uv_is_not_used(setup_script, version, expected):
    assert setup_script.is_recent(version) is expected


def test_a_python_that_does_not_run_is_passed_over(setup_script, tmp_path, monkeypatch):
    shim, good = tmp_path / "shims", tmp_path / "bin"
    for folder in (shim, good):
        folder.mkdir()
    (shim / "python3.12").write_text(
        "#!/bin/sh\necho 'python3.12: command not found' >&2\nexit 127\n"
    )
    (shim / "python3.12").chmod(0o755)
    (good / "python3.12").symlink_to(sys.executable)
    monkeypatch.setenv("PATH", f"{shim}{os.pathsep}{good}")
    found = setup_script.find_python()
    assert found != str(shim / "python3.12")
    assert (
        subprocess.run(
            [found, "-c", "import sys; sys.exit(sys.version_info[:2] != (3, 12))"]
        ).returncode
        == 0
    )


def test_a_made_environment_is_left_alone(setup_script, project):
    before = [(path, path.stat().st_mtime_ns) for path in sorted((project / ".venv").rglob("*"))]
    setup_script.sync(setup_script.find_uv(), project)
    assert [
        (path, path.stat().st_mtime_ns) for path in sorted((project / ".venv").rglob("*"))
    ] == before


def test_what_a_user_adds_to_an_environment_stays(setup_script, project):
    added = project / ".venv/lib/python3.12/site-packages/added-1.0.dist-info"
    added.mkdir()
    (added / "METADATA").write_text("Metadata-Version: 2.1\nName: added\nVersion: 1.0\n")
    (added / "RECORD").write_text("added-1.0.dist-info/METADATA,,\nadded-1.0.dist-info/RECORD,,\n")
    setup_script.sync(setup_script.find_uv(), project)
    assert added.exists()


@pytest.mark.parametrize("removed", [".venv", ".venv/bin"])
def test_a_removed_environment_is_made_again(setup_script, project, removed):
    shutil.rmtree(project / removed)
    setup_script.sync(setup_script.find_uv(), project)
    assert subprocess.run([project / ".venv/bin/python", "-c", ""]).returncode == 0


def test_no_environment_needs_a_display():
    """OpenCV with windows needs libGL, which bare servers lack, and overwrites the one without."""
    for folder in (SCRIPT.parent.parent, SCRIPT.parent / "planning"):
        locked = {
            package["name"]
            for package in tomllib.loads((folder / "uv.lock").read_text())["package"]
        }
        assert "opencv-python-headless" in locked
        assert "opencv-python" not in locked


def test_an_environment_that_uv_refuses_is_a_sentence_and_not_taken_for_made(setup_script, project):
    file = project / "pyproject.toml"
    original = file.read_text()
    file.write_text(original.replace('"1"', '"2"'))
    uv = setup_script.find_uv()
    for _ in range(2):
        with pytest.raises(setup_script.SetupError, match="uv could not make"):
            setup_script.sync(uv, project)
    file.write_text(original)
    assert not (project / ".venv" / ".demo2eval-stamp").exists()


def test_a_deb822_source_gains_backports_and_keeps_its_mirror_and_key(setup_script):
    assert setup_script.debian_source(OTHER_DISTRIBUTOR + "\n" + DEB822).splitlines() == [
        "Types: deb",
        "URIs: http://mirror.example.org/debian",
        "Suites: bookworm bookworm-backports",
        "Components: main contrib",
        "Signed-By: /usr/share/keyrings/debian-archive-keyring.gpg",
    ]


def test_a_one_line_source_gains_backports_and_keeps_its_mirror_and_key(setup_script):
    text = (
        "# deb http://deb.debian.org/debian bookworm main\n"
        "deb [arch=amd64] https://packages.example.com bookworm main\n"
        "deb-src http://deb.debian.org/debian bookworm main\n"
        "deb [signed-by=/key.gpg] http://deb.debian.org/debian bookworm main non-free\n"
    )
    assert setup_script.debian_source(text).splitlines() == [
        "deb [signed-by=/key.gpg] http://deb.debian.org/debian bookworm main non-free",
        "deb [signed-by=/key.gpg] http://deb.debian.org/debian bookworm-backports main non-free",
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        OTHER_DISTRIBUTOR,
        DEB822.replace("bookworm", "trixie"),
        DEB822.replace("Types: deb deb-src", "Types: deb-src"),
        "deb http://deb.debian.org/debian trixie main\n",
        "deb https://download.example.com/linux/debian bookworm stable\n",
    ],
)
def test_no_backports_are_made_from_another_source(setup_script, text):
    assert setup_script.debian_source(text) is None


def test_the_operating_system_is_read(setup_script):
    debian = 'VERSION_ID="12"\nVERSION="12 (bookworm)"\nID=debian\n'
    assert setup_script.parse_os_release(debian) == ("debian", "12")
    assert setup_script.parse_os_release("ID=arch\n") == ("arch", "")


def test_an_unpacked_mesa_is_found_by_set_up_and_by_a_shell(setup_script, tmp_path, monkeypatch):
    file = tmp_path / "environment"
    monkeypatch.setattr(setup_script, "ENVIRONMENT_FILE", file)
    assert setup_script.unpacked_environment() == {}
    file.write_text(
        "export LD_LIBRARY_PATH='/a folder/lib'\nexport VK_ICD_FILENAMES='/a folder/lvp.json'\n"
    )
    assert setup_script.unpacked_environment() == {
        "LD_LIBRARY_PATH": "/a folder/lib",
        "VK_ICD_FILENAMES": "/a folder/lvp.json",
    }
    output = subprocess.run(
        ["sh", "-c", f". {file}; echo $VK_ICD_FILENAMES"], capture_output=True, text=True
    ).stdout
    assert output == "/a folder/lvp.json\n"


@pytest.mark.slow
def test_rendering_is_tried_and_not_believed(setup_script, monkeypatch):
    if not setup_script.has_nvidia_gpu():
        assert setup_script.renders("cpu")
        assert not setup_script.renders("cuda")
        with pytest.raises(setup_script.SetupError, match="libvulkan1"):
            setup_script.set_up_vulkan(gpu=True)
    monkeypatch.setenv("VK_ICD_FILENAMES", "/does/not/exist.json")
    assert not setup_script.renders("cpu")


def test_set_up_and_env_take_the_same_for_a_gpu(setup_script, tmp_path, monkeypatch):
    assert setup_script.GPU_DEVICES == env_module.GPU_DEVICES
    assert setup_script.BACKEND_VARIABLE == env_module.BACKEND_VARIABLE
    for script in (setup_script, env_module):
        monkeypatch.setattr(script, "GPU_DEVICES", (str(tmp_path / "nvidia[0-9]*"),))
    monkeypatch.delenv(setup_script.BACKEND_VARIABLE, raising=False)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    program = tmp_path / "nvidia-smi"
    for device, driver in [
        (None, "echo 'GPU 0: H100'"),
        ("nvidia3", "echo 'GPU 0: H100'"),
        ("nvidia3", "echo 'No devices found.'"),
    ]:
        program.write_text(f"#!/bin/sh\n{driver}\n")
        program.chmod(0o755)
        if device:
            (tmp_path / device).touch()
        env_module.render_backend.cache_clear()
        assert setup_script.has_nvidia_gpu() == (env_module.render_backend() == "gpu")
    env_module.render_backend.cache_clear()


def test_the_user_decides_what_renders(setup_script, monkeypatch):
    monkeypatch.delenv(setup_script.BACKEND_VARIABLE, raising=False)
    assert setup_script.renders_on_gpu(True)
    assert not setup_script.renders_on_gpu(False)
    monkeypatch.setenv(setup_script.BACKEND_VARIABLE, "cpu")
    assert not setup_script.renders_on_gpu(True)
    monkeypatch.setenv(setup_script.BACKEND_VARIABLE, "vulkan")
    with pytest.raises(setup_script.SetupError, match="set it to cpu or gpu"):
        setup_script.renders_on_gpu(True)


def test_setup_needs_no_module_of_a_checkout(tmp_path):
    (tmp_path / "envs").mkdir()
    shutil.copy(SCRIPT, tmp_path / "envs")
    result = subprocess.run(
        [sys.executable, "-I", tmp_path / "envs/setup.py", "--help"], capture_output=True, text=True
    )
    assert result.returncode == 0
    assert "second run" in result.stdout
