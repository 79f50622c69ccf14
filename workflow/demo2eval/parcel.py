"""Parcels: finished work carried from one machine to another, and adopted there as if it had been made there.

    python -m demo2eval.parcel pack --output outbox results/demos       # in the checkout that has the work
    python -m demo2eval.parcel unpack outbox                            # in the checkout that wants it

A piece of work is an output that Snakemake made: a manifest with its payload, or a table. With it travel its log and Snakemake's own
record of the job (inputs, parameters, checksums), so that the other side judges it by what really made it. Pictures, datasets, caches
and weights stay where they are unless `--payload` names them: their manifests come alone, as after pruning.

Each parcel is a file of limited size that can be read without the others; larger files are cut. What is adopted is complete, checked by
its hash, and published with its manifest last. Work that is there already is left alone; work that contradicts it is refused.
"""

import contextlib
import fcntl
import io
import json
import os
import shutil
import tarfile
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from graphlib import TopologicalSorter
from pathlib import Path, PurePosixPath

from demo2eval.cli import run, stage_parser
from demo2eval.errors import UserError
from demo2eval.manifest import list_files, sha256_file, write_atomic

RESULTS = Path("results")
INCOMING = RESULTS / ".incoming"
INDEX = "index.json"
OUTPUT_SUFFIXES = (".json", ".csv", ".png")
HEAVY_STAGES = ("replay", "dataset", "training_cache")
CHECKPOINT_STAGES = ("init_checkpoint", "train_segment")
MIB = 2**20
# What a file costs in a tar besides its content, at most.
MEMBER_BYTES = 2048


@dataclass(frozen=True)
class Item:
    """A file of a piece: its path from the checkout's root, its size and its SHA-256."""

    path: str
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Piece:
    """What is adopted together.

    Attributes:
        output: the path that Snakemake knows.
        sha256: of the output's own content.
        record: Snakemake's record of the job; None if the piece is payload alone, for work that is adopted as another piece.
        items: all files; the output itself is the last one, except in payload.
    """

    output: str
    sha256: str
    record: dict | None
    items: tuple[Item, ...]

    @property
    def key(self) -> tuple[str, bool]:
        """What tells pieces apart."""
        return self.output, self.record is None

    @property
    def index(self) -> dict:
        """The piece as JSON."""
        return asdict(self)

    @classmethod
    def from_index(cls, entry: dict) -> "Piece":
        """Undo `index`."""
        return cls(entry["output"], entry["sha256"], entry["record"], tuple(Item(**item) for item in entry["items"]))


@dataclass(frozen=True)
class Slice:
    """Bytes of a file that are in one parcel."""

    piece: Piece
    item: Item
    offset: int
    bytes: int

    @property
    def member(self) -> str:
        """The name in the tar."""
        return f"{self.item.path}@{self.offset}"


class Records:
    """Snakemake's records of finished jobs in the present folder, by which it tells what is stale."""

    def __init__(self):
        from snakemake.persistence.file import FilePersistence

        self._store = FilePersistence()

    def read(self, output: str) -> dict | None:
        """Return the record of an output, or None if the job did not finish."""
        record = self._store._read_record(output)
        return None if record is None or self._store._filter_incomplete_keys([output]) else record.model_dump()

    def write(self, output: str, record: dict) -> None:
        """Keep a record that another machine made."""
        from snakemake.persistence import MetadataRecord

        self._store._write_record(output, MetadataRecord.model_validate(record))
        self._store._unmark_incomplete(output)

    def locked(self) -> bool:
        """Whether Snakemake works here, or was killed while it did."""
        return any(True for _ in self._store._read_locks())


# Packing


def item_of(path: Path) -> Item:
    """Return a file as an item."""
    return Item(path.as_posix(), path.stat().st_size, sha256_file(path))


def read_json(path: Path) -> dict:
    """Return a manifest, or an empty dictionary if the file is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else {}
    except json.JSONDecodeError:
        return {}
    return content if isinstance(content, dict) and "stage" in content else {}


def is_heavy(stage: str, path: Path) -> bool:
    """Whether a file stays behind unless it is asked for."""
    return stage in HEAVY_STAGES or (stage in CHECKPOINT_STAGES and "params" in path.parts)


def outputs_below(paths: Iterable[Path]) -> Iterator[Path]:
    """Yield the files that may be outputs of rules at or below `paths`; files and folders with a dot before the name never are."""
    for path in paths:
        for candidate in [path] if path.is_file() else sorted(path.rglob("*")):
            if candidate.suffix in OUTPUT_SUFFIXES and not any(part.startswith(".") for part in candidate.parts):
                yield candidate


def finished(paths: Iterable[Path]) -> dict[Path, dict]:
    """Return the outputs at or below `paths` whose jobs have finished, with Snakemake's records of them."""
    records = Records()
    found = {path: records.read(path.as_posix()) for path in outputs_below(paths)}
    return {path: record for path, record in found.items() if record}


def work_piece(output: Path, record: dict) -> Piece:
    """Return an output with its light payload and its log."""
    manifest = read_json(output)
    listed = [output.parent / name for name in manifest.get("files", {})]
    light = [path for path in listed if not is_heavy(manifest["stage"], path)]
    logs = [Path(log) for log in record.get("log") or [] if Path(log).is_file()]
    items = [item_of(path) for path in [*light, *logs, output]]
    return Piece(output.as_posix(), items[-1].sha256, record, tuple(items))


def payload_piece(output: Path, train_state: bool) -> Piece | None:
    """Return what `work_piece` leaves behind of an output, or None if that is nothing."""
    manifest = read_json(output)
    stage = manifest.get("stage", "")
    heavy = [output.parent / name for name in manifest.get("files", {})]
    if stage in CHECKPOINT_STAGES:
        # Linked base weights and the weights from scratch of checkpoint 0 are not in its manifest.
        folders = [output.with_suffix("") / name for name in ("params", "train_state")[: 2 if train_state else 1]]
        heavy += list_files(folder for folder in folders if folder.is_dir() and not folder.is_symlink())
    items = [item_of(path) for path in sorted(set(heavy)) if is_heavy(stage, path) or "train_state" in path.parts]
    return Piece(output.as_posix(), sha256_file(output), None, tuple(items)) if items else None


def collect(paths: Sequence[Path], payload: Sequence[Path], train_state: bool) -> list[Piece]:
    """Return the finished work at or below `paths`, what depends on other work after it; payload comes last.

    Raises:
        UserError: if a path is not under results/.
    """
    for path in [*paths, *payload]:
        if path.is_absolute() or path.parts[:1] != RESULTS.parts or ".." in path.parts:
            raise UserError(f"{path} is not under {RESULTS}/ of this folder; name what is, from the root of the checkout.")
    found = {}
    for output, record in finished(paths).items():
        # A job may be made again at this moment; then its work is of a later parcel.
        with contextlib.suppress(FileNotFoundError):
            found[output.as_posix()] = work_piece(output, record)
    heavy = [payload_piece(output, train_state) for output in finished(payload)]
    return in_order([*found.values(), *(piece for piece in heavy if piece)])


def in_order(pieces: Sequence[Piece]) -> list[Piece]:
    """Return pieces with what depends on other work after it, and payload alone last."""
    work = {piece.output: piece for piece in pieces if piece.record is not None}
    order = TopologicalSorter({name: set(piece.record["input"] or ()) & work.keys() for name, piece in work.items()})
    return [*(work[name] for name in order.static_order()), *(piece for piece in pieces if piece.record is None)]


def allot(pieces: Sequence[Piece], parcel_bytes: int) -> list[list[Slice]]:
    """Cut pieces into parcels of at most `parcel_bytes` each, indexes included, in order."""
    parcels: list[list[Slice]] = [[]]
    left = parcel_bytes
    for piece in pieces:
        index = len(json.dumps(piece.index)) + MEMBER_BYTES
        left -= index
        for item in piece.items:
            offset = 0
            while offset < item.bytes or not offset:
                if left < 2 * MEMBER_BYTES and parcels[-1]:
                    parcels.append([])
                    left = parcel_bytes - index
                size = min(item.bytes - offset, max(left - MEMBER_BYTES, MEMBER_BYTES))
                parcels[-1].append(Slice(piece, item, offset, size))
                left -= size + MEMBER_BYTES
                offset += size
                if not item.bytes:
                    break
    return [parcel for parcel in parcels if parcel]


def write_parcel(file: Path, slices: Sequence[Slice]) -> None:
    """Write a parcel, wholly or not at all."""
    pieces = {slice_.piece.key: slice_.piece.index for slice_ in slices}
    temporary = file.with_name(f".{file.name}.tmp")
    with tarfile.open(temporary, "w:gz", compresslevel=6) as tar:
        _add(tar, INDEX, json.dumps(list(pieces.values())).encode())
        for slice_ in slices:
            with open(slice_.item.path, "rb") as source:
                source.seek(slice_.offset)
                _add(tar, slice_.member, source.read(slice_.bytes))
    os.replace(temporary, file)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    tar.addfile(member, io.BytesIO(content))


def pack(
    folder: Path,
    paths: Sequence[Path] = (RESULTS,),
    *,
    payload: Sequence[Path] = (),
    train_state: bool = False,
    parcel_bytes: int = 16 * MIB,
    parcels: int = 8,
    skip: int = 0,
) -> int:
    """Pack finished work.

    Args:
        folder: where parcel-NNN.tar.gz are written; older ones of the same number are replaced.
        paths: outputs, or folders of outputs.
        payload: outputs, or folders of outputs, whose heavy payload is packed as well.
        train_state: with a checkpoint's payload, also what is needed to train on.
        parcels: at most so many are written,
        skip: beginning with this number.

    Returns:
        the number of parcels that all of it makes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    allotted = allot(collect(paths, payload, train_state), int(parcel_bytes * 0.98))
    for number, slices in enumerate(allotted):
        if skip <= number < skip + parcels:
            # A job that starts again removes its log and its files; what it left is packed when it has finished.
            with contextlib.suppress(FileNotFoundError):
                write_parcel(folder / f"parcel-{number:03d}.tar.gz", slices)
    return len(allotted)


# Unpacking


def check_path(name: str) -> None:
    """Raise a UserError if a path in a parcel leads anywhere but below results/."""
    path = PurePosixPath(name)
    if path.is_absolute() or path.parts[:1] != RESULTS.parts or ".." in path.parts or len(path.parts) < 2:
        raise UserError(f"the parcel holds a file {name!r}, which is not below {RESULTS}/; it was not made by demo2eval.")


def receive(parcel: Path) -> list[Piece]:
    """Copy a parcel's slices into INCOMING, and return the pieces that they belong to.

    Raises:
        UserError: if the parcel is damaged or was not made by `pack`.
    """
    try:
        with tarfile.open(parcel, "r:gz") as tar:
            pieces = [Piece.from_index(entry) for entry in json.load(tar.extractfile(INDEX))]
            items = {item.path: item for piece in pieces for item in piece.items}
            for name in [*items, *(piece.output for piece in pieces)]:
                check_path(name)
            for member in tar:
                path, _, offset = member.name.rpartition("@")
                if path in items and member.isfile():
                    folder = INCOMING / items[path].sha256
                    folder.mkdir(parents=True, exist_ok=True)
                    (folder / f".{offset}").write_bytes(tar.extractfile(member).read())
                    os.replace(folder / f".{offset}", folder / str(int(offset)))
    except (tarfile.TarError, EOFError, OSError, KeyError, TypeError, ValueError) as error:
        raise UserError(f"{parcel} is damaged or no parcel ({error}); copy it again.") from error
    return pieces


def arrived(item: Item) -> Path | None:
    """Return a file that was put together from its slices, or None while some are missing.

    Raises:
        UserError: if all are there, and the content is not what was packed.
    """
    folder = INCOMING / item.sha256
    whole = folder / "whole"
    if whole.exists():
        return whole
    slices = sorted((path for path in folder.glob("[0-9]*")), key=lambda path: int(path.name))
    if not slices or sum(path.stat().st_size for path in slices) < item.bytes:
        return None
    with open(folder / ".whole", "wb") as target:
        for path in slices:
            target.seek(int(path.name))
            with open(path, "rb") as source:
                shutil.copyfileobj(source, target)
    if sha256_file(folder / ".whole") != item.sha256:
        shutil.rmtree(folder)
        raise UserError(f"{item.path} did not arrive as it was packed; copy the parcels again.")
    os.replace(folder / ".whole", whole)
    return whole


@contextlib.contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold the lock under which a stage makes this output."""
    output.parent.mkdir(parents=True, exist_ok=True)
    with open(output.parent / f".{output.stem}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"{output} is being made here at this moment; unpack again when that job has ended.") from None
        yield


def is_same(piece: Piece) -> bool:
    """Whether the output is here already: the same bytes, or work of equal content made by the same settings, code and inputs."""
    output = Path(piece.output)
    if not output.exists():
        return False
    if sha256_file(output) == piece.sha256:
        return True
    whole = arrived(piece.items[-1])
    ours, theirs = read_json(output), json.loads(whole.read_text()) if whole and output.suffix == ".json" else {}
    return bool(ours) and all(ours.get(key) == theirs.get(key) for key in ("digest", "fingerprint"))


def remove_old(output: Path) -> None:
    """Remove an output and its payload, to make room for another one."""
    for name in read_json(output).get("files", {}):
        (output.parent / name).unlink(missing_ok=True)
    output.unlink(missing_ok=True)
    if output.suffix == ".json" and output.with_suffix("").is_dir():
        shutil.rmtree(output.with_suffix(""))


def adopt(piece: Piece, records: Records) -> None:
    """Publish a piece whose files have all arrived; the output comes last, so that it is either there with all or not at all."""
    output = Path(piece.output)
    with locked(output):
        if piece.record is not None:
            if output.exists():
                remove_old(output)
            # An output without a record would be taken for one whose making is not known.
            records.write(piece.output, piece.record)
            if output.suffix == ".json":
                write_atomic(output.parent / f".{output.stem}.done", arrived(piece.items[-1]).read_text(encoding="utf-8"))
        for item in piece.items:
            target = Path(item.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            temporary = target.with_name(f".{target.name}.incoming")
            shutil.copyfile(arrived(item), temporary)
            os.replace(temporary, target)


def unpack(folder: Path, *, overwrite: bool = False) -> tuple[list[str], list[str]]:
    """Adopt what parcels hold.

    Args:
        folder: of the parcels; others may come later, and what is incomplete waits for them.
        overwrite: take the parcels' work also where other work is here under its name.

    Returns:
        (outputs that were adopted, payload first where it came alone; outputs that are incomplete).

    Raises:
        UserError: if parcels are damaged, contradict what is here, or Snakemake is at work here.
    """
    records = Records()
    if records.locked():
        raise UserError(
            "Snakemake is at work in this folder, or was killed; wait for it, or run `snakemake --unlock`, and unpack again."
        )
    parcels = sorted(folder.glob("parcel-*.tar.gz"))
    if not parcels:
        raise UserError(f"{folder} holds no parcel-*.tar.gz; give the folder that `pack` wrote or the copy of it.")
    earlier = waiting()
    pieces = {piece.key: piece for piece in earlier}
    try:
        for parcel in parcels:
            pieces |= {piece.key: piece for piece in receive(parcel)}
        complete = [piece for piece in in_order(list(pieces.values())) if all(arrived(item) for item in piece.items)]
        if not overwrite:
            refuse_contradictions(complete)
    except UserError:
        remember(earlier)
        raise
    adopted = [piece.output for piece in complete if settle(piece, records)]
    left = [piece for piece in pieces.values() if not all(arrived(item) for item in piece.items) or not has_manifest(piece)]
    remember(left)
    return adopted, [piece.output for piece in left]


def waiting() -> list[Piece]:
    """Return the pieces of which an earlier `unpack` lacked slices."""
    file = INCOMING / INDEX
    return [Piece.from_index(entry) for entry in json.loads(file.read_text())] if file.exists() else []


def remember(pieces: Sequence[Piece]) -> None:
    """Keep incomplete pieces and their slices for the next `unpack`; remove all else that arrived."""
    INCOMING.mkdir(parents=True, exist_ok=True)
    kept = {item.sha256 for piece in pieces for item in piece.items}
    for folder in INCOMING.iterdir():
        if folder.is_dir() and folder.name not in kept:
            shutil.rmtree(folder)
    write_atomic(INCOMING / INDEX, json.dumps([piece.index for piece in pieces]))
    if not pieces:
        shutil.rmtree(INCOMING)


def refuse_contradictions(pieces: Sequence[Piece]) -> None:
    """Raise a UserError if other work is here under the name of some piece."""
    other = [piece.output for piece in pieces if piece.record is not None and Path(piece.output).exists() and not is_same(piece)]
    if other:
        more = f" and {len(other) - 1} more" if len(other) > 1 else ""
        raise UserError(
            f"{other[0]}{more} was made here too, by other settings, code or inputs; nothing was unpacked. Delete what is here, or "
            "unpack with --overwrite."
        )


def has_manifest(piece: Piece) -> bool:
    """Whether the output that belongs to a piece is here, as it always is unless the piece is payload alone."""
    output = Path(piece.output)
    return piece.record is not None or (output.exists() and sha256_file(output) == piece.sha256)


def settle(piece: Piece, records: Records) -> bool:
    """Adopt a complete piece, unless it is here or its manifest is not; return whether it was adopted."""
    output = Path(piece.output)
    if piece.record is None:
        if has_manifest(piece):
            adopt(piece, records)
        return has_manifest(piece)
    if not is_same(piece):
        adopt(piece, records)
        return True
    if records.read(piece.output) is None:
        records.write(piece.output, piece.record)
    # In order, so that none of them looks older than what it was made from.
    os.utime(output)
    return False


def main() -> None:
    """Run from the command line."""
    parser = stage_parser(__doc__)
    verbs = parser.add_subparsers(dest="verb", required=True)
    packing = verbs.add_parser("pack", help="pack finished work")
    packing.add_argument(
        "paths", type=Path, nargs="*", help="outputs or folders of them (default: results, or those of --payload)"
    )
    packing.add_argument("--output", type=Path, required=True, help="folder for the parcels")
    packing.add_argument(
        "--payload", type=Path, nargs="+", default=[], help="outputs or folders whose pictures or weights travel too"
    )
    packing.add_argument(
        "--train-state", action="store_true", help="with checkpoints among them, also what is needed to train on"
    )
    packing.add_argument("--parcel-mib", type=float, default=16, help="largest parcel, MiB (default: 16)")
    packing.add_argument("--parcels", type=int, default=8, help="write at most so many (default: 8)")
    packing.add_argument("--skip", type=int, default=0, help="leave out so many, which were carried before (default: 0)")
    unpacking = verbs.add_parser("unpack", help="adopt what parcels hold")
    unpacking.add_argument("input", type=Path, help="folder of the parcels")
    unpacking.add_argument("--overwrite", action="store_true", help="take the parcels' work where other work is here")
    arguments = parser.parse_args()
    _pack(arguments) if arguments.verb == "pack" else _unpack(arguments)


def _pack(arguments) -> None:
    number = pack(
        arguments.output,
        arguments.paths or arguments.payload or [RESULTS],
        payload=arguments.payload,
        train_state=arguments.train_state,
        parcel_bytes=int(arguments.parcel_mib * MIB),
        parcels=arguments.parcels,
        skip=arguments.skip,
    )
    reached = arguments.skip + arguments.parcels
    rest = f"those from {reached} on are left, pack again with --skip {reached}" if reached < number else "all are packed"
    print(f"{number} parcels in all; {rest}")


def _unpack(arguments) -> None:
    adopted, incomplete = unpack(arguments.input, overwrite=arguments.overwrite)
    print(f"adopted {len(adopted)} pieces of work")
    for output in incomplete:
        print(f"incomplete, waits for more parcels: {output}")


if __name__ == "__main__":
    run(main)
