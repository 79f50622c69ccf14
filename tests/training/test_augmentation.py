"""Random shifts of training images."""

import jax
import numpy as np

from demo2eval.training.augmentation import random_shift


def test_every_image_is_shifted_by_itself_and_keeps_its_type():
    # A pixel tells where it was: 10 times its row, plus its column.
    image = np.arange(16, dtype=np.uint8)[:, None] * 10 + np.arange(16, dtype=np.uint8)[None]
    images = np.tile(image[None, :, :, None], (20, 1, 1, 3))
    result = random_shift(jax.random.key(0), {"a": images, "b": images}, 3)
    shifts = set()
    for camera in ("a", "b"):
        shifted = np.asarray(result[camera])
        assert shifted.shape == images.shape
        assert shifted.dtype == np.uint8
        for item in shifted:
            down, right = divmod(int(item[8, 8, 0]) - 88, 10)
            if right > 5:
                down, right = down + 1, right - 10
            assert max(abs(down), abs(right)) <= 3
            rows, columns = (np.clip(np.arange(16) + shift, 0, 15) for shift in (down, right))
            np.testing.assert_array_equal(item[..., 0], image[np.ix_(rows, columns)])
            shifts.add((down, right))
    assert len(shifts) > 15
