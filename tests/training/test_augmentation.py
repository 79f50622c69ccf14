"""Augmentation of training images. openpi's own pixels are in test_openpi_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from demo2eval.training.augmentation import augment, draw_shifts, shift


def test_every_image_is_shifted_by_itself_and_keeps_its_type():
    # A pixel tells where it was: 10 times its row, plus its column.
    image = np.arange(16, dtype=np.uint8)[:, None] * 10 + np.arange(16, dtype=np.uint8)[None]
    images = np.tile(image[None, :, :, None], (20, 1, 1, 3))
    corners = draw_shifts(jax.random.key(0), ["b", "a"], 20, 3)
    result = {camera: shift(jnp.asarray(images), corners[camera], 3) for camera in corners}
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


@pytest.mark.slow
def test_openpis_augmentation_keeps_shape_and_range_and_never_moves_a_wrist():
    batch = jax.random.uniform(jax.random.key(0), (4, 32, 32, 3)) * 2 - 1
    images = {"base_0_rgb": batch, "left_wrist_0_rgb": batch}
    keys = jax.random.split(jax.random.key(1), 4)
    augmented = augment(keys, images)
    again = augment(keys, images)
    for camera in images:
        assert augmented[camera].shape == batch.shape
        assert float(jnp.abs(augmented[camera]).max()) <= 1 + 1e-5
        np.testing.assert_array_equal(augmented[camera], again[camera])
    # Half of the wrist's images are not jittered, and then they are the same.
    unchanged = jnp.abs(augmented["left_wrist_0_rgb"] - batch).max(axis=(1, 2, 3)) < 1e-5
    assert 0 < int(unchanged.sum()) < 4
    assert not bool((jnp.abs(augmented["base_0_rgb"] - batch).max(axis=(1, 2, 3)) < 1e-3).any())
