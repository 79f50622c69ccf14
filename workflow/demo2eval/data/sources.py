"""The trajectory files that `demos.source` names: which they are, and whether they fit a run.

All of this is known before any job: from the names of the files, the .json beside each, and a hash
of their content. The hash names the work, so that files which were moved make nothing again.
"""

import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from glob import glob, has_magic
from itertools import chain
from pathlib import Path

from demo2eval.config import Run
from demo2eval.data.trajectory import UNREADABLE, read_metadata, read_seed
from demo2eval.data.validate import Issue, validate_metadata
from demo2eval.provenance import sha256_file, sha256_text, to_json, write_atomic

HASHES = Path("results/.source_hashes.json")
PLANNED_MODE = "pd_joint_pos"
PROBLEMS_SHOWN = 1
LARGE = 2**30


def list_files(source: str | Sequence[str]) -> list[Path]:
    """Return the trajectory files of `demos.source`, those of a folder or a glob by name.

    A path that leads to nothing is among them, for `find_problems` to name.
    """
    files: list[Path] = []
    for item in [source] if isinstance(source, str) else source:
        path = Path(item).expanduser()
        if path.is_dir():
            files += sorted(path.glob("*.h5")) or [path]
        elif not path.exists() and has_magic(item):
            files += sorted(map(Path, glob(str(path), recursive=True))) or [path]
        else:
            files.append(path)
    return list(dict.fromkeys(files))


def count_demos(file: Path) -> int:
    """Return how many trajectories the .json beside a file lists; 0 if it cannot be read."""
    return len(_read_episodes(str(file)))


@cache
def _read_episodes(file: str) -> list[dict]:
    try:
        return read_metadata(Path(file))["episodes"]
    except UNREADABLE:
        return []


def select_shard(files: Iterable[Path], first: int, number: int) -> tuple[list[Path], int]:
    """Return the files that hold a range of all trajectories, and where it begins in them."""
    selected, begin = [], 0
    for file in files:
        end = begin + count_demos(file)
        if begin < first + number and end > first:
            if not selected:
                offset = first - begin
            selected.append(file)
        begin = end
    return (selected, offset) if selected else ([], 0)


# What identifies the files.


def content_id(files: Iterable[Path]) -> str:
    """Return a hash of what the files and their .json hold, wherever they lie.

    A file is read once, and again when its path, size or time of change is another. One that does
    not exist is identified by its path.
    """
    return _content_id(tuple(files))


@cache
def _content_id(files: tuple[Path, ...]) -> str:
    try:
        known = json.loads(HASHES.read_text())
    except (OSError, ValueError):
        known = {}
    before, hashes = dict(known), []
    for path in chain.from_iterable((file, file.with_suffix(".json")) for file in files):
        if not path.is_file():
            hashes.append(str(path))
            continue
        name, status = str(path.resolve()), path.stat()
        stamp = [status.st_size, status.st_mtime_ns]
        if known.get(name, [])[:2] != stamp:
            if status.st_size > LARGE:
                print(f"reading {path}, which is new or was changed", file=sys.stderr)
            known[name] = [*stamp, sha256_file(path)]
        hashes.append(known[name][2])
    if known != before:
        HASHES.parent.mkdir(exist_ok=True)
        write_atomic(HASHES, to_json(known))
    return sha256_text(to_json(hashes))


# Whether they fit.


def find_problems(run: Run) -> str | None:
    """Return in a few sentences why the files of a run cannot be used for it, else None.

    What is wrong with their trajectories is said when they are imported.
    """
    files = list_files(run.demos.source)
    # The first of each file: those of another task are often of another robot, too.
    issues = [str(issue) for file in files for issue in _find_issues(file, run)[:1]]
    if not issues:
        issues = [*_control_mode_problems(files, run), *_seed_problems(files, run)]
    if not issues:
        return None
    hidden = len(issues) - PROBLEMS_SHOWN
    more = [f"and {hidden} more"] if hidden > 0 else []
    return f"run {run.name!r}, demos.source: " + "; ".join(issues[:PROBLEMS_SHOWN] + more) + "."


def _find_issues(file: Path, run: Run) -> list[Issue]:
    if file.is_dir():
        return [Issue(file, "", f"holds no .h5; {file}/**/*.h5 looks in the folders below it")]
    if not file.is_file():
        reason = "does not exist; give ManiSkill trajectory files, .h5 with the .json beside each"
        return [Issue(file, "", reason)]
    if file.suffix != ".h5":
        return [Issue(file, "", "is no trajectory file; give the .h5, with the .json beside it")]
    issues = validate_metadata(file, run.task, run.robot)[1]
    if not issues and not count_demos(file):
        issues.append(Issue(file.with_suffix(".json"), "", "lists no trajectories"))
    return issues


def _control_mode_problems(files: Sequence[Path], run: Run) -> Iterator[str]:
    modes: dict[str, Path] = {}
    for file in files:
        for episode in _read_episodes(str(file)):
            modes.setdefault(str(episode.get("control_mode")), file)
    target, (first, *others) = run.replay.control_mode, modes
    if others:
        yield (
            f"{modes[first]} has demonstrations in {first} and {modes[others[0]]} in {others[0]}; "
            "give each control mode a run of its own"
        )
    elif first not in (target, PLANNED_MODE):
        delta = ", and actions.delta to false" if run.actions.delta else ""
        yield (
            f"{modes[first]} was recorded in {first}, which cannot be converted to {target}; set "
            f"runs.{run.name}.replay.control_mode to {first}{delta}"
        )


def _seed_problems(files: Sequence[Path], run: Run) -> Iterator[str]:
    seeds: dict[int, Path] = {}
    for file in files:
        for episode in _read_episodes(str(file)):
            try:
                seeds.setdefault(read_seed(episode), file)
            except UNREADABLE:  # said when it is imported
                continue
    if shared := sorted(seeds.keys() & set(run.evaluation_seeds)):
        yield (
            f"{len(shared)} of the evaluation seeds, {shared[0]} among them, are those of "
            f"demonstrations in {seeds[shared[0]]}, and the policy would be tested on what it was "
            f"shown; set runs.{run.name}.evaluation.first_seed to {max(seeds) + 1}"
        )
