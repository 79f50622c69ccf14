"""Is anything lost? Kills planning, replay and conversion at random instants and compares.

    python benchmarks/kill.py --folder /tmp/kill --instants 20

Copies of this checkout run the chain from demonstrations to dataset as a user would
(`snakemake --until dataset`), with the real planner and simulator at a small size. The first copy
is left alone. In every other one Snakemake and all its jobs are killed once in each stage (SIGKILL
to the process group), at an instant drawn from the time that the stage took undisturbed. After each
kill follow `snakemake --unlock` and the same command. In every second copy Snakemake alone is
killed, and its jobs live on.

At the end a copy must hold the same files as the first: HDF5, parquet, mp4 and metadata byte for
byte, the decoded images, and all that manifests say but times. What was finished when the kill came
must be untouched, nothing may be left over, and the command, given once more, must find nothing to
do. The exit status is 1 otherwise.
"""

import argparse
import contextlib
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"plan": "demos", "replay": "replays", "dataset": "datasets"}
"""Rule of each stage, and where its work lies under results/."""
CONFIGURATION = "kill.yaml"
TARGET = "results/killed/success.csv"
TIMES = ("created", "wall_time_s")


@dataclass
class Kill:
    """One kill.

    Attributes:
        copy: name of the copy.
        rule: in whose stage.
        planned: seconds after the rule's first job began.
        alone: whether Snakemake is killed without its jobs.
        seconds: when it was killed; None if the command had ended.
        finished: what was finished then, and how to tell that it was not touched.
        kept: whether it was not touched.
    """

    copy: str
    rule: str
    planned: float
    alone: bool = False
    seconds: float | None = None
    finished: dict[Path, tuple] = field(default_factory=dict)
    kept: bool | None = None

    @property
    def counts(self) -> str:
        """Finished shards of each stage."""
        return ", ".join(
            f"{sum(path.parts[1] == stage for path in self.finished)} {stage}"
            for stage in STAGES.values()
        )


def make_copy(folder: Path, shards: int, demonstrations: int) -> None:
    """Copy the checkout, with a configuration of so many shards of so many demonstrations."""
    for name in ("workflow", "config", "profiles"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "Snakefile", folder)
    (folder / "envs/planning").mkdir(parents=True)
    (folder / "envs/planning/.venv").symlink_to(ROOT / "envs/planning/.venv")
    run = {
        "task": "PushCube-v1",
        "demos": {"num_demos": shards * demonstrations, "shard_size": demonstrations},
        "replay": {"image_size": 64, "image_stride": 12},
        "dataset": {"image_storage": "video"},
        "model": {"variant": "pi05_tiny", "weights": None, "tokenizer": None},
    }
    (folder / CONFIGURATION).write_text(yaml.safe_dump({"runs": {"killed": run}}))


def snakemake(folder: Path, *words: str) -> subprocess.CompletedProcess[str]:
    """Run Snakemake in a copy to its end."""
    command = [sys.executable, "-m", "snakemake", *words]
    return subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)


def environment() -> dict[str, str]:
    """Return a user's environment, which does not lead to this checkout's package."""
    return {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}


class Command:
    """The user's command, running in a copy; it notes when the first job of each rule began."""

    def __init__(self, folder: Path, cores: int):
        if (folder / ".snakemake/locks").is_dir():
            # After a kill, Snakemake's own way out.
            snakemake(folder, "--unlock", "--configfile", CONFIGURATION, "--", TARGET)
        words = [
            "snakemake",
            "--cores",
            str(cores),
            "--configfile",
            CONFIGURATION,
            "--until",
            "dataset",
        ]
        self.process = subprocess.Popen(
            [sys.executable, "-m", *words, "--", TARGET],
            cwd=folder,
            env=environment(),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.began: dict[str, float] = {}
        self.said = ""
        self._reader = threading.Thread(target=self._read)
        self._reader.start()

    def _read(self) -> None:
        for line in self.process.stdout:
            self.said += line
            if started := re.match(r"[\d:]{8} (\w+) results/", line):
                self.began.setdefault(started[1], time.time())

    def wait(self) -> str:
        """Wait until it has ended well, and return what it said."""
        status = self.process.wait()
        self._reader.join()
        if status != 0:
            raise RuntimeError(f"the command ended with status {status}:\n{self.said[-6000:]}")
        return self.said

    def kill(self, rule: str, delay: float, *, alone: bool) -> float | None:
        """Kill Snakemake `delay` seconds after the first job of `rule` began.

        Args:
            alone: kill it without its jobs.

        Returns:
            the seconds, or None if it had ended before.
        """
        while self.process.poll() is None and (
            rule not in self.began or time.time() < self.began[rule] + delay
        ):
            time.sleep(0.002)
        if self.process.poll() is not None:
            self.wait()
            return None
        (os.kill if alone else os.killpg)(self.process.pid, signal.SIGKILL)
        seconds = time.time() - self.began[rule]
        self.process.wait()
        return seconds

    def stop(self) -> None:
        """Kill the command, if it lives, and the jobs that it left."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


def finished(folder: Path) -> dict[Path, tuple]:
    """Return {manifest: what changes when a file that it lists is written again}."""
    states = {}
    for manifest in (folder / "results").glob("*/**/manifest.json"):
        files = [manifest.parent / name for name in json.loads(manifest.read_text())["outputs"]]
        states[manifest.relative_to(folder)] = tuple(
            (file.stat().st_ino, file.stat().st_mtime_ns) for file in files
        )
    return states


def durations(folder: Path, command: Command) -> dict[str, float]:
    """Return the seconds from the first job of each rule to its last manifest."""
    last = {
        rule: max(
            manifest.stat().st_mtime
            for manifest in (folder / "results" / stage).glob("**/manifest.json")
        )
        for rule, stage in STAGES.items()
    }
    return {rule: last[rule] - command.began[rule] for rule in STAGES}


def content(path: Path) -> object:
    """Return what is compared of a file: of a manifest all but the times, else its bytes."""
    if path.name in ("manifest.json", ".manifest.done.json"):
        return {
            key: value for key, value in json.loads(path.read_text()).items() if key not in TIMES
        }
    return path.read_bytes()


def frames(path: Path) -> np.ndarray:
    """Return the decoded frames of a video, uint8 [n, h, w, 3]."""
    import av

    with av.open(str(path)) as container:
        return np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])


def differences(expected: Path, folder: Path) -> list[str]:
    """Return what differs between two copies, a line each; logs and benchmarks are left out."""
    listed = [
        {
            path.relative_to(copy)
            for stage in STAGES.values()
            for path in (copy / "results" / stage).rglob("*")
            if path.is_file()
        }
        for copy in (expected, folder)
    ]
    first, second = (
        {path for path in paths if path.suffix not in (".log", ".tsv")} for paths in listed
    )
    found = [f"missing: {path}" for path in sorted(first - second)] + [
        f"left over: {path}" for path in sorted(second - first)
    ]
    for path in sorted(first & second):
        if content(expected / path) != content(folder / path):
            found.append(f"differs: {path}")
        if path.suffix == ".mp4" and not np.array_equal(
            frames(expected / path), frames(folder / path)
        ):
            found.append(f"frames differ: {path}")
    return found


def disturb(folder: Path, undisturbed: Path, kills: list[Kill], cores: int) -> list[str]:
    """Kill as planned, repeat the command after each kill, and return what was lost."""
    for kill in kills:
        kill.seconds = Command(folder, cores).kill(kill.rule, kill.planned, alone=kill.alone)
        kill.finished = finished(folder)
    Command(folder, cores).wait()
    found = differences(undisturbed, folder)
    now = finished(folder)
    for kill in kills:
        kill.kept = all(now.get(path) == state for path, state in kill.finished.items())
    once_more = Command(folder, cores)
    once_more.wait()
    if once_more.began:
        found.append(f"the same command, given once more, ran {', '.join(once_more.began)}")
    return found


def run(
    folder: Path, *, instants: int, seed: int, shards: int, demonstrations: int, cores: int
) -> tuple[list[Kill], dict]:
    """Run everything under `folder` and return (the kills, {copy: what was lost there})."""
    undisturbed = folder / "undisturbed"
    make_copy(undisturbed, shards, demonstrations)
    command = Command(undisturbed, cores)
    command.wait()
    took = durations(undisturbed, command)
    print(
        "undisturbed:",
        ", ".join(f"{rule} {seconds:.1f} s" for rule, seconds in took.items()),
        flush=True,
    )
    copies = -(-instants // len(STAGES))
    draw = random.Random(seed)
    # As many equal parts of a stage's time as there are kills in it, one kill somewhere in each.
    shares = {rule: draw.sample(range(copies), copies) for rule in STAGES}
    kills = [
        Kill(
            f"killed-{copy}",
            rule,
            took[rule] * (shares[rule][copy] + draw.random()) / copies,
            copy % 2 == 1,
        )
        for copy in range(copies)
        for rule in STAGES
    ][:instants]
    lost = {}
    for copy in range(copies):
        name = f"killed-{copy}"
        make_copy(folder / name, shards, demonstrations)
        own = [kill for kill in kills if kill.copy == name]
        lost[name] = disturb(folder / name, undisturbed, own, cores)
        for kill in own:
            when = "came too late" if kill.seconds is None else f"{kill.seconds:6.2f} s"
            alone = " (alone)" if kill.alone else ""
            kept = "kept" if kill.kept else "MADE AGAIN"
            line = f"{name:10s} {kill.rule:8s} {when}{alone}   finished then, {kept}: {kill.counts}"
            print(line, flush=True)
        print(f"{name:10s} {'; '.join(lost[name]) or 'the same as undisturbed'}", flush=True)
    return kills, lost


def main() -> None:
    """Run, print a line a kill, and end with status 1 if anything was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--folder", type=Path, required=True, help="where the copies are made; must not exist"
    )
    parser.add_argument("--instants", type=int, default=20, help="kills, over all stages")
    parser.add_argument("--seed", type=int, default=0, help="of the instants")
    parser.add_argument("--shards", type=int, default=2)
    parser.add_argument("--demonstrations", type=int, default=2, help="of each shard")
    parser.add_argument("--cores", type=int, default=2)
    arguments = vars(parser.parse_args())
    folder = arguments.pop("folder")
    folder.mkdir(parents=True)
    kills, lost = run(folder, **arguments)
    landed = sum(kill.seconds is not None for kill in kills)
    same = sum(not found for found in lost.values())
    print(f"{landed} of {len(kills)} kills landed; {same} of {len(lost)} copies are the same")
    if any(lost.values()) or not all(kill.kept for kill in kills):
        sys.exit(1)


if __name__ == "__main__":
    main()
