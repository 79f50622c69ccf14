"""Downloads the demos that ManiSkill has published for a task.

In:  nothing but the task; ManiSkill's archive is downloaded from where its own downloader has it.
Out: trajectory.h5 and trajectory.json beside the manifest, with all demos of the motion planner, as
     they were published. `demo2eval.data.import_demos` validates them.
"""

import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from demo2eval.cli import run
from demo2eval.errors import UserError
from demo2eval.provenance import run_stage

BLOCK = 1 << 20


def download_demos(output: Path, *, task: str) -> None:
    """Download the demos that ManiSkill has published.

    Args:
        output: manifest to write.
        task: ManiSkill's environment id, such as PushCube-v1.

    Raises:
        UserError: if there are none for the task, or the download fails.
    """
    settings = {"task": task}
    with run_stage(output, stage="download_demos", module=__spec__.name, settings=settings) as job:
        if job.reused:
            return
        url = find_archive(task)
        download(url, job.partial / "archive.zip")
        path = unpack(job.partial / "archive.zip", job.partial / "unpacked")
        for suffix in (".h5", ".json"):
            path.with_suffix(suffix).rename(job.partial / f"trajectory{suffix}")
        job.finish(job.publish("trajectory.h5", "trajectory.json"), source=url)


def find_archive(task: str) -> str:
    """Return the URL of ManiSkill's archive of a task.

    Raises:
        UserError: if ManiSkill has published none.
    """
    from mani_skill.utils.download_demo import DATASET_SOURCES

    if task not in DATASET_SOURCES:
        raise UserError(f"ManiSkill has published no demos of {task}; set demos.source to plan.")
    return DATASET_SOURCES[task].raw_dataset_url


def download(url: str, file: Path) -> None:
    """Download `url` to `file`, with a progress bar.

    Raises:
        UserError: if the network or the server fails.
    """
    from tqdm import tqdm

    try:
        with urllib.request.urlopen(url, timeout=60) as response, open(file, "wb") as archive:
            total = int(response.headers.get("Content-Length") or 0) or None
            with tqdm(total=total, unit="B", unit_scale=True, desc="downloading") as bar:
                while block := response.read(BLOCK):
                    archive.write(block)
                    bar.update(len(block))
    except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
        raise UserError(
            f"{url} cannot be downloaded ({error}); check the network, or set demos.source to plan."
        ) from error


def unpack(archive: Path, folder: Path) -> Path:
    """Unpack the motion planner's trajectory file from ManiSkill's archive and return its path.

    Raises:
        UserError: if the archive is damaged or holds no such file.
    """
    try:
        with zipfile.ZipFile(archive) as content:
            names = sorted(name for name in content.namelist() if "motionplanning/" in name)
            pairs = [
                (name, f"{name[:-3]}.json")
                for name in names
                if name.endswith(".h5") and f"{name[:-3]}.json" in names
            ]
            if not pairs:
                raise UserError(
                    f"{archive} holds no trajectory of the motion planner; download it again."
                )
            for name in pairs[0]:
                content.extract(name, folder)
    except zipfile.BadZipFile:
        raise UserError(f"{archive} is damaged; run the rule again.") from None
    return folder / pairs[0][0]


if __name__ == "__main__":
    run(download_demos)
