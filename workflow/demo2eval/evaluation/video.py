"""A video of some episodes of one checkpoint, side by side; a border turns green at success.

In:  the manifest of a checkpoint; that of its rollouts, if the video is to show episodes that
     failed there.
Out: <output without .json>.mp4 (h264, which browsers play), a frame per control step: on the left
     ManiSkill's human render camera, on the right the images that the policy was given last. Under
     the settings of the rollouts these are the same episodes. And .html, a page with the video in
     it, for Snakemake's report, which shows pages but no videos.
"""

import base64
import csv
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from demo2eval.checkpoints.policy_metadata import read_policy_metadata
from demo2eval.checkpoints.verify import verify_checkpoint
from demo2eval.cli import run
from demo2eval.config import Evaluation, Milestones
from demo2eval.errors import UserError
from demo2eval.evaluation.rollout import find_task_facts, list_seeds, policy_loader
from demo2eval.evaluation.workers import (
    FRAME_SIZE,
    EpisodeResult,
    Infer,
    PolicyCall,
    make_episode_settings,
    run_episodes,
)
from demo2eval.maniskill.env import CONTROL_FREQUENCY
from demo2eval.provenance import read_manifest, run_stage

COLUMNS = 3
BORDER = 4
CAPTION_HEIGHT = 20
FONT_SIZE = 14
CAMERA_SIZE = FRAME_SIZE // 2
"""Side of the policy's images in a video, pixels."""
TILE_HEIGHT = FRAME_SIZE + 2 * BORDER + CAPTION_HEIGHT
TILE_WIDTH = FRAME_SIZE + CAMERA_SIZE + 2 * BORDER
LARGEST_PAGE = 1_450_000
"""Bytes of a page. Chromium shows no page above 2 MiB inside a report, which adds a third."""
CRF, COARSER = 23, (29, 35, 41, 47, 51)
"""h264's quality, of the video, and of the video in a page if that would be too large."""
GREEN, GRAY = (0, 158, 115), (90, 90, 90)


def record_videos(
    checkpoint: Path,
    output: Path,
    *,
    task: str | None = None,
    object: str | None = None,
    milestones: Milestones | None = None,
    evaluation: Evaluation = Evaluation(),
    rollouts: Path | None = None,
) -> None:
    """Record `evaluation.num_videos` episodes of a checkpoint.

    Args:
        checkpoint: manifest of the checkpoint.
        output: manifest to write, <run>/videos/<step>.json.
        task: ManiSkill's environment id; null: the checkpoint's.
        object: env attribute, the object that is manipulated; null: as config.yaml says.
        milestones: sub-goals of the task; null: as config.yaml says.
        evaluation: settings of the rollouts.
        rollouts: manifest of the checkpoint's rollouts; only episodes that failed there are
            recorded.

    Raises:
        UserError: if the checkpoint does not fit the task, or no episode failed.
    """
    from tqdm import tqdm

    # The settings of as many rollouts as are recorded: more rollouts leave the video as it is.
    evaluation = evaluation.model_copy(update={"num_episodes": evaluation.num_videos})
    task, object, milestones = find_task_facts(checkpoint, task, object, milestones)
    settings = {
        "task": task,
        "object": object,
        "milestones": milestones,
        "evaluation": evaluation,
    }
    inputs = {"checkpoint": checkpoint} | ({"rollouts": rollouts} if rollouts else {})
    with run_stage(
        output, stage="video", module=__spec__.name, settings=settings, inputs=inputs
    ) as job:
        if job.reused:
            return
        seeds = list_seeds(evaluation)
        if rollouts:
            seeds = failed_seeds(rollouts, checkpoint)[: evaluation.num_videos]
        folder = verify_checkpoint(checkpoint, "params")
        episode_settings = make_episode_settings(
            read_policy_metadata(folder), task, object, milestones, evaluation, record_frames=True
        )
        load = policy_loader(folder, evaluation)
        seen: Seen = {}
        episodes = run_episodes(
            episode_settings, seeds, evaluation.num_workers, recording(load, seen)
        )
        results = list(tqdm(episodes, total=len(seeds), unit="episode", desc="recording"))
        results.sort(key=lambda result: result.seed)

        def frames() -> Iterator[np.ndarray]:
            return make_frames(results, seen, evaluation.replan_steps)

        video = job.partial / f"{output.stem}.mp4"
        write_video(video, frames())
        page = make_page(f"{task}, checkpoint {checkpoint.stem}", video, frames)
        (job.partial / f"{output.stem}.html").write_text(page)
        videos = job.publish(f"{output.stem}.mp4", f"{output.stem}.html")
        job.finish(
            videos,
            kept=videos,
            seeds=list(seeds),
            frames=results[0].steps + 1,
            successes=sum(result.success_once for result in results),
        )


def failed_seeds(rollouts: Path, checkpoint: Path) -> list[int]:
    """Return the seeds of the episodes without success, from the manifest of rollouts.

    Raises:
        UserError: if the rollouts are of another checkpoint, or no episode failed.
    """
    if read_manifest(rollouts)["metadata"]["checkpoint"] != read_manifest(checkpoint)["digest"]:
        raise UserError(f"{rollouts} are not rollouts of {checkpoint}; evaluate it again.")
    with open(rollouts.with_suffix(".csv"), newline="") as file:
        seeds = [int(row["seed"]) for row in csv.DictReader(file) if row["success_once"] == "0"]
    if not seeds:
        raise UserError(f"all episodes of {rollouts} succeeded; there is no failure to record.")
    return seeds


Seen = dict[int, list[dict[str, np.ndarray]]]
"""{seed of an episode: {camera: uint8 [h, w, 3]} of each policy call}."""


def recording(load_policy: Callable[[], Infer], seen: Seen) -> Callable[[], Infer]:
    """Return a function that loads the same policy, which notes in `seen` what it is given."""

    def load() -> Infer:
        infer = load_policy()

        def infer_and_note(calls: list[PolicyCall]) -> Iterable[np.ndarray]:
            for call in calls:
                images = seen.setdefault(call.seed, [])
                # An episode that is started again, after its process hung, begins at call 0.
                images[call.index :] = [call.observation["images"]]
            return infer(calls)

        return infer_and_note

    return load


def make_frames(
    results: Sequence[EpisodeResult], seen: Seen, replan_steps: int
) -> Iterator[np.ndarray]:
    """Yield the frames of the video, uint8 [h, w, 3], with `COLUMNS` episodes in a row.

    Args:
        results: episodes of equal length, with frames.
        seen: the images that the policy was given.
        replan_steps: control steps between two policy calls.
    """
    columns = min(COLUMNS, len(results))
    blanks = [np.zeros((TILE_HEIGHT, TILE_WIDTH, 3), np.uint8)] * (-len(results) % columns)
    for step in range(results[0].steps + 1):
        tiles = [
            make_tile(result, step, seen[result.seed][min(step, result.steps - 1) // replan_steps])
            for result in results
        ]
        tiles += blanks
        rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
        yield np.concatenate([np.concatenate(row, axis=1) for row in rows])


def make_tile(result: EpisodeResult, step: int, images: dict[str, np.ndarray]) -> np.ndarray:
    """Return an episode's share of a frame, uint8 [TILE_HEIGHT, TILE_WIDTH, 3].

    The caption gives the seed and, of an episode that fails, the furthest milestone.

    Args:
        images: {camera: uint8 [h, w, 3]} that the policy was given last.
    """
    from PIL import Image, ImageDraw, ImageFont

    assert result.frames is not None
    assert result.success_so_far is not None
    success = bool(result.success_so_far[step])
    outcome = "success" if success else "" if result.success_once else result.milestone
    tile = Image.new("RGB", (TILE_WIDTH, TILE_HEIGHT), GREEN if success else GRAY)
    tile.paste(Image.fromarray(result.frames[step]), (BORDER, BORDER + CAPTION_HEIGHT))
    side = (CAMERA_SIZE, CAMERA_SIZE)
    for number, image in enumerate(images.values()):
        corner = (BORDER + FRAME_SIZE, BORDER + CAPTION_HEIGHT + number * CAMERA_SIZE)
        tile.paste(Image.fromarray(image).resize(side, Image.Resampling.NEAREST), corner)
    ImageDraw.Draw(tile).text(
        (BORDER + 2, 3),
        f"seed {result.seed}  {outcome}",
        fill="white",
        font=ImageFont.load_default(FONT_SIZE),
    )
    return np.asarray(tile)


def write_video(path: Path, frames: Iterable[np.ndarray], crf: int = CRF) -> None:
    """Encode frames, uint8 [h, w, 3] with even sides, at the control frequency."""
    # imageio would need an ffmpeg of its own; LeRobot brings PyAV.
    import av

    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=CONTROL_FREQUENCY, options={"crf": str(crf)})
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


def make_page(title: str, video: Path, frames: Callable[[], Iterable[np.ndarray]]) -> str:
    """Return an HTML page with a video in it; coarser ones are tried until a report can show it.

    Args:
        video: file of the video.
        frames: returns its frames.
    """
    page = embed_video(title, video)
    for crf in COARSER:
        if len(page) <= LARGEST_PAGE:
            break
        smaller = video.with_name("smaller.mp4")
        write_video(smaller, frames(), crf)
        page = embed_video(title, smaller)
    return page


def embed_video(title: str, video: Path) -> str:
    """Return an HTML page with a video in it."""
    data = base64.b64encode(video.read_bytes()).decode()
    return (
        f'<!doctype html><meta charset="utf-8"><title>{title}</title>'
        '<body style="margin: 0; background: #fff">'
        '<video controls autoplay loop muted style="width: 100%; max-height: 100vh" '
        f'src="data:video/mp4;base64,{data}"></video>\n'
    )


if __name__ == "__main__":
    run(record_videos)
