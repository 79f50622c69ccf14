"""A video of some episodes of one checkpoint, side by side; a border turns green when its episode has succeeded.

In:  the manifest of a checkpoint; with --failures-of that of its rollouts, and then the first so many episodes that failed there are
     filmed.
Out: <output without .json>.mp4 (h264, plays in browsers), every control step, seen by ManiSkill's camera for people rather than by
     the policy's. Under the settings of the rollouts these are the same episodes.
"""

import csv
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

import numpy as np

from demo2eval.checkpoints.policy_metadata import read_policy_metadata
from demo2eval.cli import run, settings_from, stage_parser
from demo2eval.errors import UserError
from demo2eval.evaluation.rollout import Answerer, episode_settings
from demo2eval.evaluation.rollout import Settings as RolloutSettings
from demo2eval.evaluation.workers import FILM_SIZE, EpisodeResult, play
from demo2eval.maniskill.env import CONTROL_FREQUENCY
from demo2eval.provenance import Work, making, read_manifest

COLUMNS = 3
BORDER = 4
CAPTION = 20
FONT_SIZE = 14
TILE_SHAPE = (FILM_SIZE + 2 * BORDER + CAPTION, FILM_SIZE + 2 * BORDER, 3)
SUCCESS, OPEN = (0, 158, 115), (90, 90, 90)


@dataclass(frozen=True, kw_only=True)
class Settings(RolloutSettings):
    """What decides the video, given the checkpoint: the settings of the rollouts, `episodes` of them."""


def tile(frame: np.ndarray, seed: int, success: bool, stage: str) -> np.ndarray:
    """Return one episode's part of a frame, uint8 of `TILE_SHAPE`, with its border, its seed and, where it fails, how far it comes."""
    from PIL import Image, ImageDraw, ImageFont

    picture = Image.new("RGB", TILE_SHAPE[1::-1], SUCCESS if success else OPEN)
    picture.paste(Image.fromarray(frame), (BORDER, BORDER + CAPTION))
    text, font = (
        f"seed {seed}  {'success' if success else stage}",
        ImageFont.load_default(FONT_SIZE),
    )
    ImageDraw.Draw(picture).text((BORDER + 2, 3), text, fill="white", font=font)
    return np.asarray(picture)


def frames_of(results: Sequence[EpisodeResult]) -> Iterator[np.ndarray]:
    """Yield the frames of the whole video, uint8 [h, w, 3], a row of tiles for every `COLUMNS` episodes, all of equal length."""
    columns = min(COLUMNS, len(results))
    blanks = [np.zeros(TILE_SHAPE, np.uint8)] * (-len(results) % columns)
    for step in range(len(results[0].film)):
        tiles = [
            tile(
                result.film[step],
                result.seed,
                bool(result.successes[step]),
                "" if result.success_once else result.stage,
            )
            for result in results
        ] + blanks
        rows = [
            np.concatenate(tiles[first : first + columns], axis=1)
            for first in range(0, len(tiles), columns)
        ]
        yield np.concatenate(rows)


def write_video(file: Path, frames: Iterable[np.ndarray]) -> int:
    """Encode frames with even sides, uint8 [h, w, 3], at the control frequency; return their number."""
    import av

    count = 0
    with av.open(str(file), "w", options={"movflags": "+faststart"}) as container:
        stream = None
        for frame in frames:
            if stream is None:
                stream = container.add_stream(
                    "libx264", rate=CONTROL_FREQUENCY, options={"crf": "23"}
                )
                stream.height, stream.width = frame.shape[:2]
                stream.pix_fmt = "yuv420p"
                stream.codec_context.thread_count = 1
                stream.time_base = Fraction(1, CONTROL_FREQUENCY)
            picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
            container.mux(stream.encode(picture))
            count += 1
        container.mux(stream.encode())
    return count


def failed_seeds(rollouts: Path, checkpoint: Path) -> list[int]:
    """Return the seeds of the episodes without success, from the manifest of a checkpoint's rollouts.

    Raises:
        UserError: if the rollouts are of another checkpoint, or no episode failed.
    """
    if read_manifest(rollouts)["facts"]["checkpoint"] != read_manifest(checkpoint)["digest"]:
        raise UserError(f"{rollouts} are not rollouts of {checkpoint}; evaluate it again.")
    with open(rollouts.with_suffix("") / "episodes.csv", newline="") as file:
        seeds = [int(row["seed"]) for row in csv.DictReader(file) if row["success_once"] == "0"]
    if not seeds:
        raise UserError(f"all episodes of {rollouts} succeeded; there is no failure to film.")
    return seeds


def video(
    settings: Settings,
    checkpoint: Path,
    output: Path,
    *,
    failures_of: Path | None = None,
    workers: int = 1,
) -> None:
    """Film the checkpoint of a manifest and write the manifest `output`.

    Args:
        failures_of: manifest of the checkpoint's rollouts; only episodes that failed there are filmed.
    """
    inputs = {"checkpoint": checkpoint} | ({"rollouts": failures_of} if failures_of else {})
    with making(
        output, stage="video", module=__spec__.name, settings=settings, inputs=inputs
    ) as work:
        if not work.finished:
            seeds = (
                failed_seeds(failures_of, checkpoint)[: settings.episodes]
                if failures_of
                else settings.seeds
            )
            _make(settings, checkpoint, seeds, work, workers)


def _make(settings: Settings, checkpoint: Path, seeds: list[int], work: Work, workers: int) -> None:
    from tqdm import tqdm

    payload = checkpoint.with_suffix("")
    simulators = episode_settings(settings, read_policy_metadata(payload), film=True)
    playing = play(simulators, seeds, workers, Answerer(payload, settings))
    results = list(tqdm(playing, total=len(seeds), unit="episode", mininterval=2, desc="filming"))
    results.sort(key=lambda result: result.seed)
    count = write_video(work.partial / "video.mp4", frames_of(results))
    target = work.output.with_suffix(".mp4")
    (work.partial / "video.mp4").replace(target)
    work.finish([target], frames=count, successes=sum(result.success_once for result in results))


def main() -> None:
    """Run the stage from the command line."""
    parser = stage_parser(__doc__, Settings)
    parser.add_argument("--checkpoint", type=Path, required=True, help="manifest of the checkpoint")
    parser.add_argument(
        "--failures-of", type=Path, help="manifest of its rollouts: film episodes that failed there"
    )
    parser.add_argument(
        "--output", type=Path, required=True, help="manifest to write, <run>/videos/<step>.json"
    )
    parser.add_argument("--workers", type=int, default=1, help="simulator processes (default: 1)")
    arguments = parser.parse_args()
    settings = settings_from(arguments, Settings)
    video(
        settings,
        arguments.checkpoint,
        arguments.output,
        failures_of=arguments.failures_of,
        workers=arguments.workers,
    )


if __name__ == "__main__":
    run(main)
