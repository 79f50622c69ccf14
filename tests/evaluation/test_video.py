"""The video of episodes: what its frames show, and that players can read it."""

import numpy as np

from demo2eval.evaluation.video import (
    BORDER,
    CAPTION,
    OPEN,
    SUCCESS,
    TILE_SHAPE,
    frames_of,
    write_video,
)
from demo2eval.evaluation.workers import FILM_SIZE, EpisodeResult
from demo2eval.maniskill.env import CONTROL_FREQUENCY

LENGTH = 6


def filmed(seed: int, first_success_step: int | None) -> EpisodeResult:
    """An episode whose pictures are of one grey each, brighter from step to step."""
    greys = np.linspace(40, 200, LENGTH).astype(np.uint8)
    never = first_success_step is None
    return EpisodeResult(
        seed=seed,
        success_once=not never,
        success_at_end=not never,
        first_success_step=first_success_step,
        steps=LENGTH - 1,
        looks=1,
        stage="reach" if never else "place",
        nearest=0.01,
        film=np.broadcast_to(greys[:, None, None, None], (LENGTH, FILM_SIZE, FILM_SIZE, 3)),
        successes=np.arange(LENGTH) >= (LENGTH if never else first_success_step),
    )


def test_borders_turn_green_at_the_first_success():
    frames = list(frames_of([filmed(0, 2), filmed(1, None), filmed(2, 4), filmed(3, 0)]))
    height, width, _ = TILE_SHAPE
    assert len(frames) == LENGTH
    assert frames[0].shape == (2 * height, 3 * width, 3)
    # The lower left corner of each episode's tile, where no text is.
    corners = [
        (row * height + height - 1, column * width)
        for row, column in ((0, 0), (0, 1), (0, 2), (1, 0))
    ]
    green = [[tuple(frame[corner]) == SUCCESS for corner in corners] for frame in frames]
    assert green == [[step >= 2, False, step >= 4, True] for step in range(LENGTH)]
    assert tuple(frames[0][corners[1]]) == OPEN
    assert not frames[0][height:, width:].any()
    middle = frames[3][CAPTION + BORDER + FILM_SIZE // 2, BORDER + FILM_SIZE // 2]
    assert middle.tolist() == [136] * 3


def test_the_file_is_h264_that_browsers_play(tmp_path):
    import av

    frames = list(frames_of([filmed(0, 2), filmed(1, None)]))
    file = tmp_path / "video.mp4"
    assert write_video(file, iter(frames)) == LENGTH
    with av.open(str(file)) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == CONTROL_FREQUENCY
        decoded = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len(decoded) == LENGTH
    assert np.abs(decoded[-1].astype(float) - frames[-1]).mean() < 4
    # The index is at the front, so that playing starts before all is loaded.
    content = file.read_bytes()
    assert content.index(b"moov") < content.index(b"mdat")
