"""Manifests: a small JSON file beside the outputs of each job, written last: what made them.

    settings = {"dataset": dataset}
    with run_stage(output, stage="dataset", module=__spec__.name, settings=settings,
                   inputs={"replays": replays}) as job:
        if job.reused:
            return
        ...write job.partial / "lerobot"...
        job.finish(job.publish("lerobot"), episodes=50)

`run_stage` holds a lock. A duplicate of a job that still runs waits, and then reuses what that job
made. So does a job whose manifest was lost: Snakemake deletes the outputs of a job before it starts
it again. Other work stays until `publish` replaces it. The manifest of other work is gone before
the first file is moved, and the files are on the disk before the new one is written: neither a kill
nor a power cut leaves a manifest beside something else than it describes.

What a manifest lists is compared with it before another stage reads it.
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import UTC, datetime
from importlib import metadata
from itertools import chain
from pathlib import Path
from typing import Any

from demo2eval.config import Section
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
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
MARGIN = 2**20
"""Bytes that must be left on the disk beside the arrays of a demo."""


def to_json(value: Any) -> str:
    """Return canonical JSON: sorted keys; of a section what changes results; paths as text."""

    def default(item: Any) -> Any:
        if isinstance(item, Section):
            return item.result_settings()
        return str(item) if isinstance(item, Path) else item.item()

    return json.dumps(value, sort_keys=True, indent=1, default=default)


def sha256_text(text: str) -> str:
    """Return the SHA-256 of a text, hexadecimal."""
    return hashlib.sha256(text.encode()).hexdigest()


def sha256_file(path: Path) -> str:
    """Return the SHA-256 of a file's content, hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sha256_folder(path: Path) -> str:
    """Return the SHA-256 of the names and contents of all files below a folder."""
    files = _list_files([path])
    with ThreadPoolExecutor(8) as pool:
        hashes = pool.map(sha256_file, files)
        names = [str(file.relative_to(path)) for file in files]
        return sha256_text(to_json(dict(zip(names, hashes, strict=True))))


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write a file so that it exists wholly or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(content.encode() if isinstance(content, str) else content)
    _sync(temporary)
    os.replace(temporary, path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def read_manifest(path: Path) -> dict[str, Any]:
    """Return a manifest as a dictionary.

    Raises:
        UserError: if the file is missing or is not a manifest.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(
            f"{path} does not exist; run the rule that makes it, or let Snakemake run the chain."
        ) from None
    except (ValueError, RecursionError) as error:
        raise UserError(
            f"{path} is not a manifest ({error}); delete it, and its rule will run again."
        ) from None
    if not isinstance(content, dict) or "digest" not in content:
        raise UserError(f"{path} is a JSON file but not a manifest: it has no digest.")
    return content


def verify_outputs(manifest: Path) -> None:
    """Compare the files that a manifest lists with its hashes.

    Folders that may be removed are left to who reads them.

    Raises:
        UserError: if a file is missing or differs, or `manifest` is none.
    """
    if changed := _find_changed(Path(manifest).parent, read_manifest(manifest)):
        raise UserError(
            f"{changed} is not what {manifest} describes: it was changed, damaged or lost. Put the "
            "right file back, or delete the manifest, and it is made again."
        )


def _find_changed(folder: Path, content: dict[str, Any]) -> Path | None:
    """Return a file below a manifest's folder that is not as its content says, or None."""
    entries = {folder / name: entry for name, entry in content["outputs"].items()}
    with ThreadPoolExecutor(8) as pool:
        found = zip(entries, pool.map(_is_as_listed, entries, entries.values()), strict=True)
        return next((path for path, is_as_listed in found if not is_as_listed), None)


def _is_as_listed(path: Path, entry: dict[str, Any]) -> bool:
    return (
        path.is_file()
        and path.stat().st_size == entry["bytes"]
        and sha256_file(path) == entry["sha256"]
    )


def input_digest(path: Path) -> str:
    """Return the digest of an input: a manifest's own, or the SHA-256 of any other file."""
    return read_manifest(path)["digest"] if _is_manifest(path) else sha256_file(path)


def _is_manifest(path: Path) -> bool:
    if path.suffix != ".json":
        return False
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        return False
    return isinstance(content, dict) and {"digest", "stage", "outputs"} <= content.keys()


def package_versions() -> dict[str, str]:
    """Return the versions of Python and of the installed packages that can change a result."""
    versions = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def _list_files(paths: Iterable[Path]) -> list[Path]:
    """Return the files among `paths`, and sorted all files below the folders among them."""
    files = []
    for path in paths:
        below = (
            sorted(item for item in path.rglob("*") if item.is_file()) if path.is_dir() else [path]
        )
        files.extend(below)
    return files


class StageJob:
    """A stage's work on one output: where to write, whether it was reused, and how to finish it.

    Attributes:
        output: the manifest to write.
        folder: the folder of the manifest, for the outputs.
        reused: whether equal work was finished before, so that nothing is left to do.
        fingerprint: hash of stage, settings, code and inputs; equal work has an equal one.
    """

    def __init__(
        self,
        output: Path,
        stage: str,
        settings: Mapping[str, Any],
        inputs: Mapping[str, list[Path]],
        code: str,
    ):
        self.output, self.folder, self.stage, self.code = output, output.parent, stage, code
        self.settings: dict[str, Any] = json.loads(to_json(dict(settings)))
        self.inputs = {
            name: [{"path": str(path), "digest": input_digest(path)} for path in paths]
            for name, paths in inputs.items()
        }
        digests = {name: [item["digest"] for item in items] for name, items in self.inputs.items()}
        self.fingerprint = sha256_text(to_json([stage, self.settings, code, digests]))
        self.reused = False
        self._done: dict[str, Any] = {}
        # Snakemake deletes the outputs of a job that it starts again; these it does not know.
        self._record = self.folder / f".{output.stem}.done.json"
        self._kept = self.folder / f".{output.stem}.done"
        self._started = time.monotonic()

    @property
    def partial(self) -> Path:
        """A folder for unfinished files, which the same work finds again after a kill."""
        path = self.folder / f".{self.output.stem}.partial-{self.fingerprint[:12]}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def reuse(self) -> bool:
        """Publish finished work of the same fingerprint again, if all its outputs are there."""
        try:
            done = json.loads(self._record.read_text(encoding="utf-8"))
        except (FileNotFoundError, ValueError):
            return False
        if done["fingerprint"] != self.fingerprint:
            return False
        self._done = done
        for name, entry in done["outputs"].items():
            path, kept = self.folder / name, self._kept / name
            if kept.exists() and not _is_as_listed(path, entry):
                _copy(kept, path)
        folders = {self.folder / name: value for name, value in done.get("folders", {}).items()}
        if _find_changed(self.folder, done) or any(
            path.is_dir() and sha256_folder(path) != value for path, value in folders.items()
        ):
            return False
        write_atomic(self.output, to_json(done))
        self.reused = True
        return True

    def publish(self, *names: str) -> list[Path]:
        """Move finished files and folders from `partial` to `folder`, in place of other work's.

        Args:
            names: of files and folders in `partial`.

        Returns:
            where they are now.
        """
        for name in names:
            path = self.partial / name
            for item in [*path.rglob("*"), path]:
                if not item.is_symlink():
                    _sync(item)
        self._remove_other_work()
        targets = [self.folder / name for name in names]
        for name, target in zip(names, targets, strict=True):
            if target.is_dir():
                shutil.rmtree(target)
            (self.partial / name).replace(target)
        _sync(self.folder)
        return targets

    def _remove_other_work(self) -> None:
        """Remove the manifest before its outputs are replaced, and what killed jobs left."""
        self.output.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)
        shutil.rmtree(self._kept, ignore_errors=True)
        for path in self.folder.glob(f".{self.output.stem}.partial-*"):
            if path != self.partial:
                shutil.rmtree(path, ignore_errors=True)
        for name in (self.output.name, self._record.name):
            for path in self.folder.glob(f".{name}.*.tmp"):
                path.unlink(missing_ok=True)
        _sync(self.folder)

    def finish(
        self,
        outputs: Iterable[Path],
        *,
        kept: Iterable[Path] = (),
        removable: Iterable[Path] = (),
        digest: str | None = None,
        **facts: Any,
    ) -> None:
        """Write the manifest.

        Args:
            outputs: files or folders below `folder`; each file's size and SHA-256 is recorded.
            kept: small ones among them that are copied: where they are deleted, as Snakemake does,
                or damaged, they come back without the work.
            removable: folders that may be removed when nobody needs them any more; the hash of
                each is recorded.
            digest: identifies the content where equal contents differ in their bytes. By default
                the hash of all file hashes.
            facts: what else a reader wants to know, such as counts and seeds; the manifest's
                `metadata`.
        """
        paths = _list_files(outputs)
        with ThreadPoolExecutor(8) as pool:
            hashes = list(pool.map(sha256_file, paths))
        listing = {
            str(path.relative_to(self.folder)): {"bytes": path.stat().st_size, "sha256": value}
            for path, value in zip(paths, hashes, strict=True)
        }
        for path in _list_files(kept):
            _copy(path, self._kept / path.relative_to(self.folder))
        if digest is None:
            digest = sha256_text(to_json({name: item["sha256"] for name, item in listing.items()}))
        content = {
            "stage": self.stage,
            "digest": digest,
            "fingerprint": self.fingerprint,
            "settings": self.settings,
            "code": self.code,
            "inputs": self.inputs,
            "metadata": facts,
            "outputs": listing,
            "folders": {
                str(path.relative_to(self.folder)): sha256_folder(path) for path in removable
            },
            "versions": package_versions(),
            "wall_time_s": round(time.monotonic() - self._started, 3),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        if all(self._done.get(key) == content[key] for key in ("digest", "outputs", "folders")):
            # What was damaged is as it was: the same manifest makes nothing stale.
            content = self._done
        text = to_json(content)
        write_atomic(self._record, text)
        write_atomic(self.output, text)
        shutil.rmtree(self.partial, ignore_errors=True)


def _copy(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    shutil.copy2(source, target)


@contextmanager
def run_stage(
    output: Path,
    *,
    stage: str,
    module: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path | Iterable[Path]] | None = None,
    manifests_only: Iterable[str] = (),
) -> Iterator[StageJob]:
    """Lock an output and yield the `StageJob` on it; see the module's docstring.

    Args:
        output: the manifest to write, `results/.../<name>.json`; the outputs lie beside it.
        stage: the stage's name, as the rule's.
        module: dotted name of the stage's module. Pass `__spec__.name`, since `__name__` is
            "__main__" on the command line.
        settings: everything besides the inputs that changes the result.
        inputs: manifests or files that the result depends on, by name; hashed by content. What a
            manifest lists is compared with it.
        manifests_only: names of inputs of which nothing but the manifest is read.

    Raises:
        UserError: if an input is missing or is not what its manifest says, or the disk is full.
    """
    with report_full_disk(Path(output).parent):
        yield from _run_stage(
            Path(output), stage, module, settings, inputs or {}, set(manifests_only)
        )


def _run_stage(
    output: Path,
    stage: str,
    module: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path | Iterable[Path]],
    manifests_only: set[str],
) -> Iterator[StageJob]:
    output.parent.mkdir(parents=True, exist_ok=True)
    paths = {
        name: [Path(item)] if isinstance(item, str | Path) else [Path(path) for path in item]
        for name, item in inputs.items()
    }
    for path in chain.from_iterable(paths.values()):
        if not path.is_file():
            raise UserError(f"{path} does not exist; give the stage {stage} an existing file.")
    with open(output.parent / f".{output.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = StageJob(output, stage, settings, paths, code_fingerprint(module))
        if job.reuse():
            print(f"{output}: the same settings, code and inputs were finished before; reused.")
        else:
            read = chain.from_iterable(paths[name] for name in paths.keys() - manifests_only)
            for path in filter(_is_manifest, read):
                verify_outputs(path)
        yield job


@contextmanager
def report_full_disk(folder: Path) -> Iterator[None]:
    """Turn what any library raises on a full disk into a UserError.

    Args:
        folder: that is written.
    """
    try:
        yield
    except Exception as error:
        if not _says_disk_full(error):
            raise
        raise UserError(
            f"{folder} cannot be written, the disk is full ({_first_line(error)}); make room and "
            "run the same command again, which keeps what is finished."
        ) from error


def require_room(folder: Path, size: int) -> None:
    """Raise OSError unless the disk has room for so many bytes, and some that go with them.

    HDF5 crashes where it cannot write: ask before.
    """
    with tempfile.TemporaryFile(dir=folder) as file:
        os.posix_fallocate(file.fileno(), 0, size + MARGIN)


def _says_disk_full(error: BaseException | None) -> bool:
    if error is None:
        return False
    known = isinstance(error, OSError) and error.errno in DISK_FULL
    # numpy counts what it could not write: "1648 requested and 992 written".
    sentences = [*map(os.strerror, DISK_FULL), " requested and "]
    said = any(sentence in str(error) for sentence in sentences)
    return known or said or _says_disk_full(error.__cause__ or error.__context__)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
