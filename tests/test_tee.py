"""What a job says: a clean log, a bar on a terminal."""

import os
import pty
import subprocess
import sys
from pathlib import Path

BAR = """
import sys, time
from tqdm import tqdm
for _ in tqdm(range(4), desc="digging", mininterval=0):
    time.sleep(0.1)
print("a result", flush=True)
sys.exit("demo2eval: error: it hurts.")
"""


def run(log: Path, **options) -> int:
    """Run the job above with its output into the log, as a rule does; return its status."""
    command = '"$0" -c "$1" 2>&1 | "$0" -m demo2eval.tee "$2"'
    words = ["bash", "-o", "pipefail", "-c", command, sys.executable, BAR, str(log)]
    return subprocess.run(words, **options).returncode


def test_a_log_has_whole_lines_and_the_bars_end(tmp_path):
    log = tmp_path / "job.log"
    with open(tmp_path / "screen", "w") as screen:
        assert run(log, stdout=screen, stderr=screen) == 1
    lines = log.read_text().splitlines()
    assert "\r" not in log.read_text()
    assert [line.split(":")[0] for line in lines] == ["digging", "a result", "demo2eval"]
    assert "4/4" in lines[0]
    assert (tmp_path / "screen").read_text() == ""


def test_a_terminal_shows_the_bar_and_keeps_nothing(tmp_path):
    master, terminal = pty.openpty()
    assert run(tmp_path / "job.log", stdout=terminal, stderr=terminal) == 1
    os.close(terminal)
    shown = os.read(master, 100_000).decode()
    assert "job: digging:  50%" in shown
    assert "a result" not in shown
    assert shown.endswith("\r\x1b[K")


def test_verbose_shows_the_lines_too(tmp_path):
    with open(tmp_path / "screen", "w") as screen:
        environment = os.environ | {"DEMO2EVAL_VERBOSE": "1"}
        run(tmp_path / "job.log", stdout=screen, stderr=screen, env=environment)
    assert "demo2eval: error: it hurts." in (tmp_path / "screen").read_text()
