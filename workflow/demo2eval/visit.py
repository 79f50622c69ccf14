"""A visit: runs the workflow on a machine that is yours for minutes, within a time, and packs what is finished as it appears.

    python -m demo2eval.visit --input inbox --output outbox --minutes 30 results/stackcube/success.csv -- --cores 16

In:  parcels of work that was made elsewhere (`python -m demo2eval.parcel pack`), if any.
Out: parcels of all work that was made here, complete and readable at any instant, and snakemake.log.

What stands after `--` goes to Snakemake. Before the time is up no new job is started, at its end those that run are stopped, and the next
visit to the same machine goes on there. With `--keep-running` they are left alone, and the next visit finds them further on. A visit that
is killed leaves its parcels; Snakemake then stops when its jobs have ended, and the next visit waits for that, packing.
"""

import contextlib
import ctypes
import fcntl
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from demo2eval import parcel
from demo2eval.cli import run, stage_parser
from demo2eval.errors import UserError
from demo2eval.manifest import write_atomic

STATE = parcel.RESULTS / ".visit.json"
LOCK = parcel.RESULTS / ".visit.lock"
LOG = parcel.RESULTS / ".visit.log"
SNAKEMAKE = (sys.executable, "-m", "snakemake")
STOP_SECONDS = 15.0
"""Seconds that jobs are given to end by themselves when the time is up."""
PARENT_DEATH_SIGNAL = 1
TIME_IS_UP = 3


def say(text: str) -> None:
    """Print one line with the time of day."""
    print(f"{time.strftime('%H:%M:%S')} visit: {text}", flush=True)


def take(lock) -> bool:
    """Take the lock that a visit's Snakemake holds while it runs, if it is free."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True


def brought() -> set[str]:
    """Return the outputs that came from elsewhere, in this visit or an earlier one."""
    return set(json.loads(STATE.read_text())["brought"]) if STATE.exists() else set()


def bring(folder: Path) -> None:
    """Adopt the parcels in a folder, and remember what they held."""
    held = {piece.output for file in sorted(folder.glob("parcel-*.tar.gz")) for piece in parcel.receive(file)}
    write_atomic(STATE, json.dumps({"brought": sorted(brought() | held)}))
    adopted, incomplete = parcel.unpack(folder)
    say(f"{len(adopted)} pieces of work adopted from {folder}, {len(incomplete)} incomplete")


def finished_here() -> dict[Path, int]:
    """Return the outputs that were made here, with the time stamps by which a new one is told from an old one."""
    elsewhere = brought()
    made = [path for path in parcel.finished([parcel.RESULTS]) if path.as_posix() not in elsewhere]
    return {path: path.stat().st_mtime_ns for path in made}


class Outbox:
    """The folder of parcels that grows with the finished work."""

    def __init__(self, folder: Path, *, parcel_bytes: int, parcels: int, pack_every: float):
        """Take the limits of `parcel.pack`, and how many seconds apart to look for finished work."""
        self._folder, self._parcel_bytes, self._parcels, self._pack_every = folder, parcel_bytes, parcels, pack_every
        self._packed: dict[Path, int] = {}
        self._next = time.monotonic()

    def update(self, now: bool = False) -> None:
        """Pack again if anything was finished since the last time; unless `now`, not more often than it should."""
        if not now and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + self._pack_every
        with contextlib.suppress(FileNotFoundError):
            found = finished_here()
            if found == self._packed or not found:
                return
            number = parcel.pack(self._folder, list(found), parcel_bytes=self._parcel_bytes, parcels=self._parcels)
            new = [path.as_posix() for path, stamp in found.items() if self._packed.get(path) != stamp]
            self._packed = found
            shutil.copyfile(LOG, self._folder / "snakemake.log")
            left = f"; {number - self._parcels} parcels do not fit" if number > self._parcels else ""
            say(f"packed {len(found)} pieces of work, new: {', '.join(new[:5])}{' ...' if len(new) > 5 else ''}{left}")


def end_with_parent() -> None:
    """Let Snakemake finish its jobs and stop when the visit is killed (Linux)."""
    ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGTERM)


def unlock(targets: list[str], options: list[str]) -> None:
    """Remove the lock of a Snakemake that was killed; to be called while no other visit is at work."""
    if parcel.Records().locked():
        subprocess.run([*SNAKEMAKE, *targets, "--unlock", *options], check=True, capture_output=True)


def start(targets: list[str], options: list[str], lock: int, keep_running: bool) -> subprocess.Popen:
    """Start Snakemake in a session of its own, so that it can be stopped with its jobs or left; it inherits the visit's lock."""
    with open(LOG, "a") as file:
        return subprocess.Popen(
            [*SNAKEMAKE, *targets, *options],
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
            pass_fds=[lock],
            preexec_fn=None if keep_running else end_with_parent,
        )


def stop(process: subprocess.Popen) -> None:
    """Stop Snakemake and its jobs, kindly at first."""
    for sent in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
            return


def watch(process: subprocess.Popen, outbox: Outbox, end: float, last_start: float, keep_running: bool) -> bool:
    """Pack while Snakemake works; return whether it ended by itself before the time was up.

    Args:
        end: when jobs are stopped, and `last_start`: after which none is started, seconds of the monotonic clock.
        keep_running: start jobs until the end, and leave them.
    """
    starting = True
    while process.poll() is None:
        now = time.monotonic()
        if now >= end:
            say("the time is up; " + ("what runs is left alone" if keep_running else "stopping what runs"))
            return False
        if starting and now >= last_start and not keep_running:
            say("the time is nearly up; no new job is started")
            starting = False
            process.terminate()
        outbox.update()
        time.sleep(0.2)
    return starting


def follow(lock, outbox: Outbox, end: float) -> bool:
    """Pack what the Snakemake of an earlier visit makes, until it has ended and its lock is ours or the time is up; return which."""
    if take(lock):
        return True
    say("the Snakemake of an earlier visit is at work here; packing what it makes")
    while time.monotonic() < end:
        outbox.update()
        time.sleep(0.2)
        if take(lock):
            return True
    return False


def make(
    targets: list[str], options: list[str], lock, outbox: Outbox, end: float, last_start: float, keep_running: bool
) -> int | None:
    """Run Snakemake and pack; return its exit status, or None if the time was up before it ended."""
    process = start(targets, options, lock.fileno(), keep_running)
    ended = False
    try:
        ended = watch(process, outbox, end, last_start, keep_running)
    finally:
        # Also when this process is told to stop.
        if not keep_running:
            stop(process)
        outbox.update(now=True)
    return process.returncode if ended else None


def visit(
    targets: list[str],
    options: list[str],
    inbox: Path | None,
    outbox: Outbox,
    *,
    minutes: float,
    last_start: float = 0.5,
    keep_running: bool = False,
) -> int:
    """Make the targets as far as the time allows; return the exit status.

    Args:
        options: Snakemake's.
        minutes: in which all is to be over; jobs are stopped a little earlier.
        last_start: minutes before the end after which no job is started.
        keep_running: start jobs until the end, and leave them to the next visit.
    """
    end = time.monotonic() + 60 * minutes - STOP_SECONDS
    parcel.RESULTS.mkdir(exist_ok=True)
    with open(LOCK, "w") as lock:
        status = None
        if follow(lock, outbox, end):
            unlock(targets, options)
            if inbox is not None:
                bring(inbox)
            status = make(targets, options, lock, outbox, end, end - 60 * last_start, keep_running)
    outbox.update(now=True)
    if status == 0:
        say("all targets are made")
        return 0
    tail = LOG.read_text(errors="replace").splitlines()[-40:]
    print("\n".join(line.rpartition("\r")[2] for line in tail), flush=True)
    say("there is more to make; visit again" if status is None else f"Snakemake ended with status {status}")
    return TIME_IS_UP if status is None else status


def main() -> None:
    """Run from the command line."""
    parser = stage_parser(__doc__)
    parser.add_argument(
        "targets", nargs="+", help="what to make, such as results/stackcube/success.csv; then -- and Snakemake's options"
    )
    parser.add_argument("--input", type=Path, help="folder of parcels to adopt first")
    parser.add_argument("--output", type=Path, required=True, help="folder for the parcels of what is made here")
    parser.add_argument("--minutes", type=float, required=True, help="in which all is to be over")
    parser.add_argument(
        "--last-start", type=float, default=0.5, help="minutes before the end to start no more jobs (default: 0.5)"
    )
    parser.add_argument("--keep-running", action="store_true", help="leave running jobs to the next visit to this machine")
    parser.add_argument("--parcel-mib", type=float, default=16, help="largest parcel, MiB (default: 16)")
    parser.add_argument("--parcels", type=int, default=7, help="at most so many (default: 7)")
    parser.add_argument("--pack-every", type=float, default=15, help="seconds between looks for finished work (default: 15)")
    words = sys.argv[1:]
    split = words.index("--") if "--" in words else len(words)
    arguments = parser.parse_args(words[:split])
    if arguments.input is not None and not arguments.input.is_dir():
        raise UserError(f"{arguments.input} does not exist; give the folder of the parcels, or leave --input out.")
    limits = {"parcel_bytes": int(arguments.parcel_mib * parcel.MIB), "parcels": arguments.parcels}
    arguments.output.mkdir(parents=True, exist_ok=True)
    status = visit(
        arguments.targets,
        words[split + 1 :],
        arguments.input,
        Outbox(arguments.output, **limits, pack_every=arguments.pack_every),
        minutes=arguments.minutes,
        last_start=arguments.last_start,
        keep_running=arguments.keep_running,
    )
    sys.exit(status)


if __name__ == "__main__":
    run(main)
