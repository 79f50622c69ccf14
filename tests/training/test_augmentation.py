"""Augmentation of training images. openpi's own pixels are in test_openpi_parity.py."""

import jax
import jax.numpy as jnp
import numpy as np

from demo2eval.training.augmentation import augment, random_shift


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


def test_openpis_augmentation_keeps_shape_and_range_and_never_moves_a_wrist():
    batch = jax.random.uniform(jax.random.key(0), (4, 32, 32, 3)) * 2 - 1
    images = {"base_0_rgb": batch, "left_wrist_0_rgb": batch}
    augmented = augment(jax.random.key(1), images)
    again = augment(jax.random.key(1), images)
    for camera in images:
        assert augmented[camera].shape == batch.shape
        assert float(jnp.abs(augmented[camera]).max()) <= 1 + 1e-5
        np.testing.assert_array_equal(augmented[camera], again[camera])
    # Half of the wrist's images are not jittered, and then they are the same.
    unchanged = jnp.abs(augmented["left_wrist_0_rgb"] - batch).max(axis=(1, 2, 3)) < 1e-5
    assert 0 < int(unchanged.sum()) < 4
    assert not bool((jnp.abs(augmented["base_0_rgb"] - batch).max(axis=(1, 2, 3)) < 1e-3).any())
