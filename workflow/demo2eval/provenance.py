"""Manifests: a small JSON file beside each payload, written last, that says what made it.

A stage works like this:

    with making(output, stage="dataset", module=__name__, settings=settings, inputs={"replay": replays}) as work:
        if work.finished:
            return
        ...write the payload under work.folder, unfinished files under work.partial...
        work.finish(files=[...], episodes=50)

`making` holds a lock, so a duplicate of a running job waits and then adopts the finished work; work of the same fingerprint that
was finished, but whose manifest was lost (a kill at the last instant, a Snakemake restart), is adopted as well. The manifest of other
work is gone before the body begins, so whatever payload a kill leaves never lies beside a manifest of something else.
"""

import dataclasses
import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from demo2eval.errors import UserError
from demo2eval.fingerprint import code_fingerprint

PACKAGES = (
    "numpy",
    "h5py",
    "mani_skill",
    "mplib",
    "sapien",
    "lerobot",
    "av",
    "jax",
    "flax",
    "optax",
    "orbax-checkpoint",
    "pandas",
)
SCARCE_BYTES = 1 << 20


def to_json(value) -> str:
    """Return canonical JSON: sorted keys, dataclasses as objects, paths as text."""

    def default(item):
        if dataclasses.is_dataclass(item):
            return dataclasses.asdict(item)
        if isinstance(item, Path):
            return str(item)
        if hasattr(item, "item"):
            return item.item()
        raise TypeError(f"cannot write {type(item).__name__} into a manifest")

    return json.dumps(value, sort_keys=True, indent=1, default=default)


def sha256_text(text: str) -> str:
    """Return the SHA-256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that it exists either wholly or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def read_manifest(path: Path) -> dict:
    """Return a manifest as a dictionary.

    Raises:
        UserError: if the file is missing or is not a manifest.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; run the rule that makes it, or let Snakemake run the whole chain."
        ) from None
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not a manifest ({error}); delete it, and its rule will run again."
        ) from None
    if "digest" not in content:
        raise UserError(f"{path} is a JSON file but not a manifest: it has no digest.")
    return content


def input_digest(path: Path) -> str:
    """Return the content digest of an input: a manifest's own digest, or the SHA-256 of any other file."""
    path = Path(path)
    if path.suffix == ".json":
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            if isinstance(content, dict) and "digest" in content and "stage" in content:
                return content["digest"]
        except (json.JSONDecodeError, UnicodeDecodeError):
            pass
    return sha256_file(path)


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that can change a result, as far as they are installed."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def list_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files among `paths` and, sorted, all files below the directories among them."""
    files = []
    for path in paths:
        if path.is_dir():
            files.extend(sorted(item for item in path.rglob("*") if item.is_file()))
        else:
            files.append(path)
    return files


class Work:
    """One stage's work on one output: where to write, whether it is done already, and how to finish it."""

    def __init__(
        self, output: Path, stage: str, settings, inputs: Mapping[str, list[Path]], code: str
    ):
        self.output = output
        self.folder = output.parent
        self.stage = stage
        self.settings = (
            dataclasses.asdict(settings) if dataclasses.is_dataclass(settings) else dict(settings)
        )
        self.code = code
        self.inputs = {
            name: [{"path": str(path), "digest": input_digest(path)} for path in paths]
            for name, paths in inputs.items()
        }
        digests = {name: [item["digest"] for item in items] for name, items in self.inputs.items()}
        self.fingerprint = sha256_text(to_json([stage, self.settings, code, digests]))
        self.done_file = self.folder / f".{output.stem}.done"
        self.started = time.monotonic()
        self.finished = False

    @property
    def partial(self) -> Path:
        """A folder for unfinished files; it outlives a killed process and is found again by the same work."""
        path = self.folder / f".{self.output.stem}.partial-{self.fingerprint[:12]}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def remove_stale_partials(self) -> None:
        """Remove what a killed process left: work with another fingerprint, and manifests that were being written."""
        for path in self.folder.glob(f".{self.output.name}.*.tmp"):
            path.unlink(missing_ok=True)
        for path in self.folder.glob(f".{self.done_file.name}.*.tmp"):
            path.unlink(missing_ok=True)
        for path in self.folder.glob(f".{self.output.stem}.partial-*"):
            if not path.name.endswith(self.fingerprint[:12]):
                shutil.rmtree(path, ignore_errors=True)

    def adopt(self) -> bool:
        """Publish finished work of the same fingerprint again, if all its files are there with their sizes."""
        try:
            done = json.loads(self.done_file.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        if done["fingerprint"] != self.fingerprint:
            return False
        for name, facts in done["files"].items():
            path = self.folder / name
            if not path.is_file() or path.stat().st_size != facts["bytes"]:
                return False
        write_atomic(self.output, to_json(done))
        self.finished = True
        return True

    @contextmanager
    def withdrawing_other_work(self) -> Iterator[None]:
        """Take away the manifest of other work while the body replaces its payload.

        It comes back as it was if the body raises before it has touched that payload.
        """
        withdrawn = {
            path: (path.read_bytes(), path.stat())
            for path in (self.output, self.done_file)
            if path.is_file()
        }
        before = self._state_of([content for content, _ in withdrawn.values()])
        for path in withdrawn:
            path.unlink()
        try:
            yield
        except BaseException:
            if (
                before
                and not self.finished
                and before == self._state_of([content for content, _ in withdrawn.values()])
            ):
                for path, (content, status) in withdrawn.items():
                    write_atomic(path, content.decode())
                    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
            raise

    def _state_of(self, manifests: Iterable[bytes]) -> dict[str, tuple | None]:
        """Return {name: what changes when the file is touched, None where there is none} of all files that manifests list."""
        states = {}
        for manifest in manifests:
            try:
                names = json.loads(manifest)["files"]
            except (ValueError, KeyError, TypeError):
                continue
            for name in names:
                path = self.folder / name
                status = path.stat() if path.exists() else None
                states[name] = status and (status.st_ino, status.st_size, status.st_mtime_ns)
        return states

    def finish(self, files: Iterable[Path], digest: str | None = None, **facts) -> None:
        """Write the manifest.

        Args:
            files: payload files or directories below `folder`; each file's size and SHA-256 is recorded.
            digest: what identifies the content, for payloads whose bytes differ between equal contents; by default the hash of
                all file hashes.
            facts: what else a reader wants to know, such as counts and seeds.
        """
        paths = list_files(files)
        with ThreadPoolExecutor(8) as pool:
            hashes = list(pool.map(sha256_file, paths)) if digest is None else [None] * len(paths)
        listing = {
            str(path.relative_to(self.folder)): {"bytes": path.stat().st_size}
            | ({"sha256": value} if value else {})
            for path, value in zip(paths, hashes, strict=True)
        }
        content = {
            "stage": self.stage,
            "digest": digest
            or sha256_text(to_json({name: entry["sha256"] for name, entry in listing.items()})),
            "fingerprint": self.fingerprint,
            "settings": self.settings,
            "code": self.code,
            "inputs": self.inputs,
            "facts": facts,
            "files": listing,
            "versions": package_versions(),
            "wall_time_s": round(time.monotonic() - self.started, 3),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        text = to_json(content)
        write_atomic(self.done_file, text)
        write_atomic(self.output, text)
        shutil.rmtree(
            self.folder / f".{self.output.stem}.partial-{self.fingerprint[:12]}", ignore_errors=True
        )
        self.finished = True


@contextmanager
def telling_of_a_full_disk(folder: Path) -> Iterator[None]:
    """Turn the error of a full disk, of a quota or of a limit on the size of files into a UserError."""
    try:
        yield
    except OSError as error:
        # Not every library passes on the system's number.
        unnumbered = error.errno is None and shutil.disk_usage(folder).free < SCARCE_BYTES
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) and not unnumbered:
            raise
        raise UserError(
            f"{folder} cannot be written, the disk is full ({error}); make room and run the same command again, "
            f"which keeps what is finished."
        ) from error


@contextmanager
def making(
    output: Path,
    *,
    stage: str,
    module: str,
    settings,
    inputs: Mapping[str, Path | Iterable[Path]] | None = None,
) -> Iterator[Work]:
    """Lock an output and yield the `Work` on it; `work.finished` is already True if equal work was found and adopted.

    Args:
        output: the manifest to write, `results/.../<name>.json`; the payload lies beside it.
        stage: the stage's name, as in the rule.
        module: dotted name of the stage's module; pass `__spec__.name`, since `__name__` is "__main__" on the command line.
        settings: the dataclass or mapping of everything that changes the result besides the inputs.
        inputs: manifests or files that the result depends on, by name; hashed by content.

    Raises:
        UserError: if an input is missing, or the disk is full.
    """
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    paths = {
        name: [Path(item)] if isinstance(item, str | Path) else [Path(one) for one in item]
        for name, item in (inputs or {}).items()
    }
    for path in (path for group in paths.values() for path in group):
        if not path.is_file():
            raise UserError(f"{path} does not exist; give the {stage} stage an existing file.")
    with open(output.parent / f".{output.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        work = Work(output, stage, settings, paths, code_fingerprint(module))
        work.remove_stale_partials()
        if work.adopt():
            print(
                f"{output}: finished work with the same settings, code and inputs is there; adopted."
            )
            yield work
            return
        with work.withdrawing_other_work(), telling_of_a_full_disk(work.folder):
            yield work
