"""Random shifts of training pictures."""

import jax
import numpy as np

from demo2eval.training.augmentation import random_shift


def test_every_picture_is_shifted_by_itself_and_keeps_its_type():
    rows = np.arange(16, dtype=np.uint8)[:, None] * 10 + np.arange(16, dtype=np.uint8)[None]
    pictures = np.tile(rows[None, :, :, None], (20, 1, 1, 3))
    shifted = random_shift(jax.random.key(0), {"a": pictures, "b": pictures}, 3)
    seen = set()
    for camera in ("a", "b"):
        result = np.asarray(shifted[camera])
        assert result.shape == pictures.shape
        assert result.dtype == np.uint8
        for picture in result:
            down, right = (int(picture[8, 8, 0]) - 88) // 10, (int(picture[8, 8, 0]) - 88) % 10
            right -= 10 if right > 5 else 0
            down += 1 if right < 0 else 0
            places = [np.clip(np.arange(16) + offset, 0, 15) for offset in (down, right)]
            np.testing.assert_array_equal(picture[..., 0], rows[np.ix_(*places)])
            assert max(abs(down), abs(right)) <= 3
            seen.add((down, right))
    assert len(seen) > 15
