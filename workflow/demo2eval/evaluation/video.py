"""A video of some episodes of one checkpoint, side by side; a border turns green at success.

In:  the manifest of a checkpoint; that of its rollouts, if the video is to show episodes that
     failed there.
Out: <output without .json>.mp4 (h264, which browsers play), a frame per control step, of
     ManiSkill's human render camera. Under the settings of the rollouts these are the same
     episodes.
"""

import csv
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from demo2eval.checkpoints.policy_metadata import read_policy_metadata
from demo2eval.checkpoints.verify import verify_checkpoint
from demo2eval.cli import run
from demo2eval.config import Evaluation, Milestones
from demo2eval.errors import UserError
from demo2eval.evaluation.rollout import list_seeds, make_episode_settings, policy_loader
from demo2eval.evaluation.workers import FRAME_SIZE, EpisodeResult, run_episodes
from demo2eval.maniskill.env import CONTROL_FREQUENCY
from demo2eval.provenance import read_manifest, run_stage

COLUMNS = 3
BORDER = 4
CAPTION_HEIGHT = 20
FONT_SIZE = 14
TILE_HEIGHT, TILE_WIDTH = FRAME_SIZE + 2 * BORDER + CAPTION_HEIGHT, FRAME_SIZE + 2 * BORDER
GREEN, GRAY = (0, 158, 115), (90, 90, 90)


def record_videos(
    checkpoint: Path,
    output: Path,
    *,
    task: str,
    object: str,
    milestones: Milestones,
    evaluation: Evaluation = Evaluation(),
    rollouts: Path | None = None,
) -> None:
    """Record `evaluation.num_videos` episodes of a checkpoint.

    Args:
        checkpoint: manifest of the checkpoint.
        output: manifest to write, <run>/videos/<step>.json.
        task: ManiSkill's environment id.
        object: env attribute, the object that is manipulated.
        milestones: sub-goals of the task.
        evaluation: settings of the rollouts.
        rollouts: manifest of the checkpoint's rollouts; only episodes that failed there are
            recorded.

    Raises:
        UserError: if the checkpoint does not fit the task, or no episode failed.
    """
    from tqdm import tqdm

    # The settings of as many rollouts as are recorded: more rollouts leave the video as it is.
    evaluation = evaluation.model_copy(update={"num_episodes": evaluation.num_videos})
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
        episodes = run_episodes(episode_settings, seeds, evaluation.num_workers, load)
        results = list(tqdm(episodes, total=len(seeds), unit="episode", desc="recording"))
        results.sort(key=lambda result: result.seed)
        write_video(job.partial / f"{output.stem}.mp4", make_frames(results))
        videos = job.publish(f"{output.stem}.mp4")
        job.finish(
            videos,
            kept=videos,
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


def make_frames(results: Sequence[EpisodeResult]) -> Iterator[np.ndarray]:
    """Yield the frames of the video, uint8 [h, w, 3], with `COLUMNS` episodes in a row.

    Args:
        results: episodes of equal length, with frames.
    """
    columns = min(COLUMNS, len(results))
    blanks = [np.zeros((TILE_HEIGHT, TILE_WIDTH, 3), np.uint8)] * (-len(results) % columns)
    for step in range(results[0].steps + 1):
        tiles = [make_tile(result, step) for result in results] + blanks
        rows = [tiles[start : start + columns] for start in range(0, len(tiles), columns)]
        yield np.concatenate([np.concatenate(row, axis=1) for row in rows])


def make_tile(result: EpisodeResult, step: int) -> np.ndarray:
    """Return an episode's share of a frame, uint8 [TILE_HEIGHT, TILE_WIDTH, 3].

    The caption gives the seed and, of an episode that fails, the furthest milestone.
    """
    from PIL import Image, ImageDraw, ImageFont

    assert result.frames is not None
    assert result.success_so_far is not None
    success = bool(result.success_so_far[step])
    outcome = "success" if success else "" if result.success_once else result.milestone
    tile = Image.new("RGB", (TILE_WIDTH, TILE_HEIGHT), GREEN if success else GRAY)
    tile.paste(Image.fromarray(result.frames[step]), (BORDER, BORDER + CAPTION_HEIGHT))
    ImageDraw.Draw(tile).text(
        (BORDER + 2, 3),
        f"seed {result.seed}  {outcome}",
        fill="white",
        font=ImageFont.load_default(FONT_SIZE),
    )
    return np.asarray(tile)


def write_video(path: Path, frames: Iterable[np.ndarray]) -> None:
    """Encode frames, uint8 [h, w, 3] with even sides, at the control frequency."""
    # imageio would need an ffmpeg of its own; LeRobot brings PyAV.
    import av

    with av.open(str(path), "w", options={"movflags": "+faststart"}) as container:
        stream = container.add_stream("libx264", rate=CONTROL_FREQUENCY, options={"crf": "23"})
        stream.pix_fmt = "yuv420p"
        stream.codec_context.thread_count = 1
        for frame in frames:
            stream.height, stream.width = frame.shape[:2]
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())


if __name__ == "__main__":
    run(record_videos)
