"""Checks trajectory files and writes nothing: what `import_demos`, `replay` and `dataset` would refuse, all of it.

In:  trajectory files (.h5 with .json beside it), or manifests of demonstrations, replays or datasets.
Out: a line for each thing that is wrong; status 1 if there is any.

Pictures are checked too, where a file has some. Files that are given together are also searched for demonstrations that are repeated
from one to another. docs/checks.md lists the messages.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from demo2eval.cli import run, stage_parser
from demo2eval.data.replayed import SENSORS, picture_findings, replayed_faults
from demo2eval.data.trajectory import Finding, examine
from demo2eval.errors import UserError
from demo2eval.provenance import read_manifest, sha256_file


def trajectory_files(path: Path) -> tuple[list[Path], list[Finding]]:
    """Return the trajectory files that a path stands for, itself or those of a manifest, and those that were changed since.

    Raises:
        UserError: if it is a manifest of something else.
    """
    if path.suffix != ".json":
        return [path], []
    manifest = read_manifest(path)
    if "replays" in manifest["inputs"]:
        found = [trajectory_files(Path(replay["path"])) for replay in manifest["inputs"]["replays"]]
        return [file for files, _ in found for file in files], [
            finding for _, findings in found for finding in findings
        ]
    if "trajectory.h5" not in manifest["outputs"]:
        raise UserError(
            f"{path} is the manifest of {manifest['stage']}, which holds no trajectories; give demonstrations or replays."
        )
    written = {path.parent / name: facts["sha256"] for name, facts in manifest["outputs"].items()}
    changed = [
        file for file, digest in written.items() if file.is_file() and sha256_file(file) != digest
    ]
    reason = f"is not what {path.name} beside it says was written: it was changed or damaged; make it again"
    return [path.parent / "trajectory.h5"], [Finding(file, "", reason) for file in changed]


def observed(group, length: int) -> Iterator[str]:
    """Yield what is wrong with the observations of a trajectory, if it has any."""
    return replayed_faults(group, length, list(group.get(SENSORS, ())))


def check_demos(paths: list[Path]) -> tuple[list[Finding], int, int]:
    """Check everything that some files or manifests hold.

    Returns:
        (everything that is wrong, number of files, number of demonstrations that nothing is wrong with).
    """
    import h5py
    from tqdm import tqdm

    found = [trajectory_files(path) for path in paths]
    recordings = examine([file for files, _ in found for file in files], more=observed)
    for recording in tqdm(recordings, unit="file", mininterval=2, desc="checking pictures"):
        if recording.demonstrations:
            with h5py.File(recording.file, "r") as file:
                cameras = {
                    one.name: list(file[one.name].get(SENSORS, ()))
                    for one in recording.demonstrations
                }
            for name, there in cameras.items():
                recording.reject(picture_findings(recording.file, [name], there))
    findings = [finding for _, changed in found for finding in changed]
    findings += [finding for recording in recordings for finding in recording.findings]
    return findings, len(recordings), sum(len(recording.demonstrations) for recording in recordings)


def main() -> None:
    """Run the check from the command line."""
    parser = stage_parser(__doc__)
    parser.add_argument(
        "paths",
        type=Path,
        nargs="+",
        metavar="FILE_OR_MANIFEST",
        help="trajectory.h5, or manifest.json",
    )
    findings, files, sound = check_demos(parser.parse_args().paths)
    for finding in findings:
        print(finding)
    print(
        f"{len(findings)} findings; nothing is wrong with {sound} demonstrations of {files} files",
        file=sys.stderr,
    )
    sys.exit(1 if findings else 0)


if __name__ == "__main__":
    run(main)
