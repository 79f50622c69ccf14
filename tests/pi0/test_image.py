"""Images keep their proportions. openpi's pixels are in test_openpi_parity.py."""

import numpy as np

from demo2eval.pi0.image import resize_with_pad


def test_what_is_left_over_is_black_and_an_odd_row_is_at_the_bottom():
    white = np.full((40, 100, 3), 255, np.uint8)
    resized = resize_with_pad(white, 51, 50)
    assert resized.shape == (51, 50, 3)
    filled = np.flatnonzero(resized[:, :, 0].all(axis=1))
    assert (filled[0], filled[-1], len(filled)) == (15, 34, 20)
    assert not np.delete(resized, filled, axis=0).any()


def test_an_image_of_the_size_asked_for_is_the_same():
    image = np.zeros((3, 4, 3), np.uint8)
    assert resize_with_pad(image, 3, 4) is image
