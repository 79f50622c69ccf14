"""The video of episodes: what its frames show, and that players can read it."""

from pathlib import Path

import numpy as np
import pytest
from conftest import find_task

from demo2eval.config import Evaluation
from demo2eval.data.image_cache import decode_video
from demo2eval.errors import UserError
from demo2eval.evaluation.video import (
    BORDER,
    CAMERA_SIZE,
    CAPTION_HEIGHT,
    GRAY,
    GREEN,
    TILE_HEIGHT,
    TILE_WIDTH,
    Seen,
    make_frames,
    make_page,
    record_videos,
    write_video,
)
from demo2eval.evaluation.workers import FRAME_SIZE, EpisodeResult
from demo2eval.maniskill.env import CONTROL_FREQUENCY
from demo2eval.provenance import read_manifest, run_stage

pytestmark = pytest.mark.simulator

LENGTH = 6


def recorded(seed: int, first_success_step: int | None) -> EpisodeResult:
    """An episode whose frames are gray, brighter from step to step."""
    grays = np.linspace(40, 200, LENGTH).astype(np.uint8)
    failed = first_success_step is None
    return EpisodeResult(
        seed=seed,
        success_once=not failed,
        success_at_end=not failed,
        first_success_step=first_success_step,
        steps=LENGTH - 1,
        policy_calls=1,
        milestone="reach" if failed else "place",
        nearest=0.01,
        frames=np.broadcast_to(grays[:, None, None, None], (LENGTH, FRAME_SIZE, FRAME_SIZE, 3)),
        success_so_far=np.arange(LENGTH) >= (LENGTH if failed else first_success_step),
    )


def seen_by(results: list[EpisodeResult]) -> Seen:
    """What the policy was given in calls after every second step: ever brighter images."""
    calls = range(0, LENGTH - 1, 2)
    images = [{"base_camera": np.full((8, 8, 3), 20 * call, np.uint8)} for call in calls]
    return {result.seed: images for result in results}


def test_borders_turn_green_at_the_first_success():
    results = [recorded(0, 2), recorded(1, None), recorded(2, 4), recorded(3, 0)]
    frames = list(make_frames(results, seen_by(results), 2))
    assert len(frames) == LENGTH
    assert frames[0].shape == (2 * TILE_HEIGHT, 3 * TILE_WIDTH, 3)
    # The lower left corner of each episode's tile, where no text is.
    corners = [
        (row * TILE_HEIGHT + TILE_HEIGHT - 1, column * TILE_WIDTH)
        for row, column in ((0, 0), (0, 1), (0, 2), (1, 0))
    ]
    green = [[tuple(frame[corner]) == GREEN for corner in corners] for frame in frames]
    assert green == [[step >= 2, False, step >= 4, True] for step in range(LENGTH)]
    assert tuple(frames[0][corners[1]]) == GRAY
    assert not frames[0][TILE_HEIGHT:, TILE_WIDTH:].any()
    policy = CAPTION_HEIGHT + BORDER + 1, BORDER + FRAME_SIZE + 1
    assert [int(frame[policy][0]) for frame in frames] == [0, 0, 40, 40, 80, 80]
    middle = frames[3][CAPTION_HEIGHT + BORDER + FRAME_SIZE // 2, BORDER + FRAME_SIZE // 2]
    assert middle.tolist() == [136] * 3


def test_the_file_is_h264_that_browsers_play(tmp_path):
    import av

    results = [recorded(0, 2), recorded(1, None)]
    frames = list(make_frames(results, seen_by(results), 2))
    file = tmp_path / "video.mp4"
    write_video(file, iter(frames))
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == CONTROL_FREQUENCY
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == LENGTH
    assert decoded[-1].shape == frames[-1].shape
    assert np.abs(decoded[-1].astype(float) - frames[-1]).mean() < 4
    # The index is at the front, so that playing starts before all is loaded.
    content = file.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")


def write_rollouts(output: Path, checkpoint: str, success: list[int]) -> Path:
    """Write the rollouts of a checkpoint of this digest, with seeds 0, 1, ..."""
    with run_stage(
        output, stage="rollout", module="demo2eval.evaluation.rollout", settings={}
    ) as job:
        rows = [f"{seed},{once}\n" for seed, once in enumerate(success)]
        table = output.with_suffix(".csv")
        table.write_text("seed,success_once\n" + "".join(rows))
        job.finish([table], checkpoint=checkpoint)
    return output


def test_a_page_becomes_coarser_until_a_report_can_show_it(tmp_path, monkeypatch):
    noise = np.random.default_rng(0).integers(0, 256, (10, 64, 64, 3), np.uint8)
    file = tmp_path / "video.mp4"
    write_video(file, noise)
    page = make_page("title", file, lambda: noise)
    monkeypatch.setattr("demo2eval.evaluation.video.LARGEST_PAGE", len(page) // 2)
    assert 1000 < len(make_page("title", file, lambda: noise)) <= len(page) // 2


def test_with_rollouts_only_failures_are_recorded(pushcube_run, tmp_path):
    checkpoint, task = pushcube_run / "checkpoints/0.json", find_task("PushCube-v1")
    digest = read_manifest(checkpoint)["digest"]

    def record(name: str, rollouts: Path) -> Path:
        output = tmp_path / f"{name}.json"
        record_videos(
            checkpoint,
            output,
            task="PushCube-v1",
            object=task.object,
            milestones=task.milestones,
            evaluation=Evaluation(num_videos=2, max_episode_steps=4, replan_steps=2, num_workers=1),
            rollouts=rollouts,
        )
        return output

    for checkpoint_digest, success, sentence in (
        (digest, [1, 1], "no failure to record"),
        ("another", [0, 0], "are not rollouts of"),
    ):
        rollouts = write_rollouts(tmp_path / sentence / "0.json", checkpoint_digest, success)
        with pytest.raises(UserError, match=sentence):
            record("refused", rollouts)
    rollouts = write_rollouts(tmp_path / "some/0.json", digest, [1, 0, 1, 0, 0])
    manifest = read_manifest(record("failures", rollouts))
    assert manifest["metadata"] == {"frames": 5, "successes": 0, "seeds": [1, 3]}
    assert sorted(manifest["outputs"]) == ["failures.html", "failures.mp4"]
    frame = next(decode_video(tmp_path / "failures.mp4", np.array([0])))
    top, left = CAPTION_HEIGHT + BORDER, BORDER + FRAME_SIZE
    # The policy's only camera, and nothing below it.
    assert frame[top : top + CAMERA_SIZE, left : left + CAMERA_SIZE].std() > 10
    assert frame[top + CAMERA_SIZE + 8 : -8, left + 8 : left + CAMERA_SIZE - 8].std() < 1
