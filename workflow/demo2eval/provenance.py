"""Manifests: a small JSON file beside the outputs of each job, written last: what made them.

    settings = {"dataset": dataset}
    with run_stage(output, stage="dataset", module=__spec__.name, settings=settings,
                   inputs={"replays": replays}) as job:
        if job.reused:
            return
        ...write below job.partial, then rename into job.folder...
        job.finish([job.folder / "lerobot"], episodes=50)

`run_stage` holds a lock. A duplicate of a job that still runs waits, and then reuses what that job
made. So does a job whose manifest was lost: Snakemake deletes the outputs of a job before it starts
it again. The manifest of other work is gone before the body begins, so what a kill leaves never
lies beside a manifest that describes something else.
"""

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


def write_atomic(path: Path, text: str) -> None:
    """Write a text file so that it exists wholly or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


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
    except json.JSONDecodeError as error:
        raise UserError(
            f"{path} is not a manifest ({error}); delete it, and its rule will run again."
        ) from None
    if "digest" not in content:
        raise UserError(f"{path} is a JSON file but not a manifest: it has no digest.")
    return content


def input_digest(path: Path) -> str:
    """Return the digest of an input: a manifest's own, or the SHA-256 of any other file."""
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
        # Snakemake deletes declared outputs of a job that it starts again; these it does not know.
        self._record = self.folder / f".{output.stem}.done.json"
        self._kept = self.folder / f".{output.stem}.done"
        self._started = time.monotonic()

    @property
    def partial(self) -> Path:
        """A folder for unfinished files, which the same work finds again after a kill."""
        path = self.folder / f".{self.output.stem}.partial-{self.fingerprint[:12]}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    def remove_stale(self) -> None:
        """Remove what a killed job left: partial folders of other work, and temporary files."""
        for path in self.folder.glob(f".{self.output.stem}.partial-*"):
            if not path.name.endswith(self.fingerprint[:12]):
                shutil.rmtree(path, ignore_errors=True)
        for name in (self.output.name, self._record.name):
            for path in self.folder.glob(f".{name}.*.tmp"):
                path.unlink(missing_ok=True)

    def reuse(self) -> bool:
        """Publish finished work of the same fingerprint again, if all its outputs are there."""
        try:
            done = json.loads(self._record.read_text(encoding="utf-8"))
        except (FileNotFoundError, json.JSONDecodeError):
            return False
        if done["fingerprint"] != self.fingerprint:
            return False
        for name, entry in done["outputs"].items():
            path, kept = self.folder / name, self._kept / name
            if not path.exists() and kept.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                _link(kept, path)
            if not path.is_file() or path.stat().st_size != entry["bytes"]:
                return False
        write_atomic(self.output, to_json(done))
        self.reused = True
        return True

    def withdraw(self) -> None:
        """Remove the manifest of other work before its outputs are replaced."""
        self.output.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)
        shutil.rmtree(self._kept, ignore_errors=True)

    def finish(
        self,
        outputs: Iterable[Path],
        *,
        declared: Iterable[Path] = (),
        digest: str | None = None,
        **facts: Any,
    ) -> None:
        """Write the manifest.

        Args:
            outputs: files or folders below `folder`; each file's size and SHA-256 is recorded.
            declared: those of them that the rule declares as outputs of Snakemake's.
            digest: identifies the content where equal contents differ in their bytes; then no file
                is hashed. By default the hash of all file hashes.
            facts: what else a reader wants to know, such as counts and seeds; the manifest's
                `metadata`.
        """
        paths = _list_files(outputs)
        with ThreadPoolExecutor(8) as pool:
            hashes = list(pool.map(sha256_file, paths)) if digest is None else [None] * len(paths)
        listing = {
            str(path.relative_to(self.folder)): {"bytes": path.stat().st_size}
            | ({"sha256": value} if value else {})
            for path, value in zip(paths, hashes, strict=True)
        }
        for path in declared:
            _link(path, self._kept / path.relative_to(self.folder))
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
            "versions": package_versions(),
            "wall_time_s": round(time.monotonic() - self._started, 3),
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
        }
        text = to_json(content)
        write_atomic(self._record, text)
        write_atomic(self.output, text)
        shutil.rmtree(self.partial, ignore_errors=True)


def _link(source: Path, target: Path) -> None:
    """Give a file a second name, or a copy where the file system has no hard links."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


@contextmanager
def run_stage(
    output: Path,
    *,
    stage: str,
    module: str,
    settings: Mapping[str, Any],
    inputs: Mapping[str, Path | Iterable[Path]] | None = None,
) -> Iterator[StageJob]:
    """Lock an output and yield the `StageJob` on it; see the module's docstring.

    Args:
        output: the manifest to write, `results/.../<name>.json`; the outputs lie beside it.
        stage: the stage's name, as the rule's.
        module: dotted name of the stage's module. Pass `__spec__.name`, since `__name__` is
            "__main__" on the command line.
        settings: everything besides the inputs that changes the result.
        inputs: manifests or files that the result depends on, by name; hashed by content.

    Raises:
        UserError: if an input is missing, or the disk is full.
    """
    output = Path(output)
    output.parent.mkdir(parents=True, exist_ok=True)
    paths = {
        name: [Path(item)] if isinstance(item, str | Path) else [Path(path) for path in item]
        for name, item in (inputs or {}).items()
    }
    for path in (path for group in paths.values() for path in group):
        if not path.is_file():
            raise UserError(f"{path} does not exist; give the stage {stage} an existing file.")
    with open(output.parent / f".{output.stem}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        job = StageJob(output, stage, settings, paths, code_fingerprint(module))
        job.remove_stale()
        if job.reuse():
            print(f"{output}: the same settings, code and inputs were finished before; reused.")
            yield job
            return
        job.withdraw()
        try:
            yield job
        except OSError as error:
            if error.errno not in DISK_FULL:
                raise
            raise UserError(
                f"{job.folder} cannot be written, the disk is full ({error}); make room and run "
                "the same command again, which keeps what is finished."
            ) from error
