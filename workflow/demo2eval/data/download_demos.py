"""Takes demonstrations that ManiSkill has published for a task.

In:  nothing but the task; ManiSkill's archive is downloaded from where its own downloader has it.
Out: trajectory.h5 and trajectory.json beside the manifest, with the first `count` demonstrations of the motion planner.
"""

import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from demo2eval.cli import run, settings_from, stage_parser
from demo2eval.data.import_demos import Settings, copy_demonstrations
from demo2eval.errors import UserError
from demo2eval.maniskill.tasks import find_task
from demo2eval.provenance import run_stage


def archive_address(task: str) -> str:
    """Return the address of ManiSkill's archive of a task.

    Raises:
        UserError: if ManiSkill has published none.
    """
    from mani_skill.utils.download_demo import DATASET_SOURCES

    find_task(task)
    if task not in DATASET_SOURCES:
        raise UserError(
            f"ManiSkill has published no demonstrations of {task}; set demos.source to plan."
        )
    return DATASET_SOURCES[task].raw_dataset_url


def download(address: str, file: Path) -> None:
    """Download `address` to `file`, with a progress bar.

    Raises:
        UserError: if the network or the server fails.
    """
    from tqdm import tqdm

    try:
        with urllib.request.urlopen(address, timeout=60) as response, open(file, "wb") as archive:
            total = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(
                total=total, unit="B", unit_scale=True, mininterval=2, desc="downloading"
            ) as bar:
                while block := response.read(1 << 20):
                    archive.write(block)
                    bar.update(len(block))
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise UserError(
            f"{address} cannot be downloaded ({error}); check the network, or set demos.source to plan."
        ) from error


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack the motion planner's trajectory file from ManiSkill's archive and return its path.

    Raises:
        UserError: if the archive is damaged or holds no such file.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            names = [
                name
                for name in content.namelist()
                if "motionplanning/" in name and name.endswith((".h5", ".json"))
            ]
            trajectories = sorted(
                name for name in names if name.endswith(".h5") and name[:-3] + ".json" in names
            )
            if not trajectories:
                raise UserError(
                    f"{archive} holds no trajectory of the motion planner; download it again."
                )
            for name in (trajectories[0], trajectories[0][:-3] + ".json"):
                content.extract(name, folder)
    except zipfile.BadZipFile:
        raise UserError(f"{archive} is damaged; run the rule again.") from None
    return folder / trajectories[0]


def download_demos(settings: Settings, output: Path) -> None:
    """Download, check and take demonstrations, and write the manifest `output`."""
    with run_stage(output, stage="download_demos", module=__spec__.name, settings=settings) as job:
        if job.reused:
            return
        address = archive_address(settings.task)
        download(address, job.partial / "archive.zip")
        source = unpack(job.partial / "archive.zip", job.partial / "unpacked")
        facts = copy_demonstrations(source, settings, job.partial)
        for name in ("trajectory.h5", "trajectory.json"):
            (job.partial / name).replace(job.folder / name)
        job.finish(
            [job.folder / "trajectory.h5", job.folder / "trajectory.json"],
            source=address,
            **facts,
        )


def main() -> None:
    """Run the stage from the command line."""
    parser = stage_parser(__doc__, Settings)
    parser.add_argument(
        "--output", type=Path, required=True, help="manifest to write, .../shard-000/manifest.json"
    )
    arguments = parser.parse_args()
    download_demos(settings_from(arguments, Settings), arguments.output)


if __name__ == "__main__":
    run(main)
