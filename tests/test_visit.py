"""A visit to a bare machine, killed in the middle, and its results taken home; here both machines are folders."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from demo2eval import parcel, visit

ROOT = Path(__file__).resolve().parent.parent
TARGET = "results/visited/checkpoints/0.json"
CONFIGURATION = ["--configfile", "tests/config/visited.yaml"]


def environment(folder: Path) -> dict[str, str]:
    """The variables of a machine where the packages lie on PYTHONPATH, in another place than at home."""
    packages = next(path for path in sys.path if path.endswith("site-packages"))
    own = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "VIRTUAL_ENV", "JAX"))}
    return own | {"PYTHONPATH": f"{folder / 'workflow'}:{packages}"}


def python(folder: Path, *arguments) -> subprocess.CompletedProcess:
    """Run Python in a checkout, and say what went wrong if something did."""
    command = [sys.executable, *map(str, arguments)]
    result = subprocess.run(command, cwd=folder, env=environment(folder), capture_output=True, text=True)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    return result


def snakemake(folder: Path, *arguments) -> str:
    """Run Snakemake in a checkout and return what it said."""
    result = python(folder, "-m", "snakemake", TARGET, "--cores", 2, *arguments)
    return result.stdout + result.stderr


@pytest.fixture
def checkouts(tmp_path) -> tuple[Path, Path]:
    """Two copies of the repository: home, and there."""
    for folder in (tmp_path / "home", tmp_path / "there"):
        for name in ("workflow", "config", "profiles", "tests/config", "tests/fixtures"):
            shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "Snakefile", folder)
    return tmp_path / "home", tmp_path / "there"


def start_visit(there: Path, inbox: Path, outbox: Path) -> subprocess.Popen:
    command = ["-m", "demo2eval.visit", "--input", inbox, "--output", outbox, "--minutes", 9, "--pack-every", 0.2, TARGET]
    command = [sys.executable, *map(str, command), "--", "--cores", "2", *CONFIGURATION]
    return subprocess.Popen(
        command, cwd=there, env=environment(there), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def test_a_visit_is_killed_goes_on_and_is_adopted(checkouts, tmp_path):
    home, there = checkouts
    inbox, first, second = (tmp_path / name for name in ("inbox", "first", "second"))
    snakemake(home, "--until", "import_demos", *CONFIGURATION)
    python(home, "-m", "demo2eval.parcel", "pack", "--output", inbox, "results/demos")

    killed = start_visit(there, inbox, first)
    deadline = time.monotonic() + 300
    while not list(first.glob("parcel-*")) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    killed.send_signal(signal.SIGKILL)
    said = killed.communicate()[0]
    assert "packed" in said, said
    again = start_visit(there, inbox, second)
    said = again.communicate()[0]
    assert again.returncode == 0, said

    # What the killed visit packed, then all of it.
    for outbox in (first, second):
        python(home, "-m", "demo2eval.parcel", "unpack", outbox)
    assert "Nothing to be done" in snakemake(home, "--dry-run", *CONFIGURATION)
    assert (home / TARGET).read_bytes() == (there / TARGET).read_bytes()
    assert not list(home.glob("results/replays/*/*/trajectory.h5"))
    (home / "changed.yaml").write_text(yaml.safe_dump({"runs": {"visited": {"actions": {"scale_floor": 0.5}}}}))
    said = snakemake(home, "--dry-run", *CONFIGURATION, "changed.yaml")
    assert "norm_stats" in said.split("Job stats:")[1]
    assert "replay" not in said.split("Job stats:")[1].split("total")[0]


class Nothing:
    """An outbox into which nothing is packed."""

    def update(self, now: bool = False) -> None:
        pass


def test_when_the_time_is_up_jobs_are_told_and_then_stopped(monkeypatch, capsys):
    monkeypatch.setattr(visit, "STOP_SECONDS", 0.5)
    # A shell that, as Snakemake does, only notes that it shall start nothing new, with a job.
    process = subprocess.Popen(["sh", "-c", "trap 'echo told' TERM; sleep 60 & wait; wait"], start_new_session=True)
    time.sleep(0.3)
    begun = time.monotonic()
    assert not visit.watch(process, Nothing(), end=begun + 0.6, last_start=begun + 0.1, keep_running=False)
    assert process.poll() is None
    visit.stop(process)
    assert process.poll() is not None
    assert time.monotonic() - begun < 10
    assert "no new job" in capsys.readouterr().out


def test_what_is_left_running_is_found_by_the_next_visit(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(visit, "STOP_SECONDS", 0)
    # In place of Snakemake, something that takes 2 s.
    monkeypatch.setattr(visit, "SNAKEMAKE", ["sh", "-c", "test -e results/made || { sleep 2; echo made >> results/made; }", "sh"])
    options = {"keep_running": True, "last_start": 0}
    assert visit.visit(["target"], [], None, Nothing(), minutes=0.5 / 60, **options) == visit.TIME_IS_UP
    assert not Path("results/made").exists()
    assert visit.visit(["target"], [], None, Nothing(), minutes=0.2, **options) == 0
    assert Path("results/made").read_text() == "made\n"
    assert "of an earlier visit is at work" in capsys.readouterr().out


def test_work_that_was_brought_is_not_taken_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    record = {"rule": "success_table", "input": [], "log": [], "params": [], "record_format_version": 6}
    Path("results/run").mkdir(parents=True)
    for name in ("success.csv", "success.png"):
        Path("results/run", name).write_text(name)
        parcel.Records().write(f"results/run/{name}", record)
    parcel.pack(Path("box"), [Path("results/run/success.csv")])
    visit.bring(Path("box"))
    assert list(visit.finished_here()) == [Path("results/run/success.png")]
