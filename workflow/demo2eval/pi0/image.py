"""Images on their way to the model: resized, with their proportions kept."""

import numpy as np
from jaxtyping import UInt8
from PIL import Image


def resize_with_pad(
    image: UInt8[np.ndarray, "h w 3"], height: int, width: int
) -> UInt8[np.ndarray, "{height} {width} 3"]:
    """Resize an image with its proportions kept; what is left over is black.

    The resized image is centered; an odd remainder of the border is at the bottom or the right.
    An image of the size asked for is returned as it is. openpi's `image_tools.resize_with_pad` does
    the same.
    """
    old_height, old_width = image.shape[:2]
    if (old_height, old_width) == (height, width):
        return image
    ratio = max(old_width / width, old_height / height)
    new_height, new_width = int(old_height / ratio), int(old_width / ratio)
    resized = Image.fromarray(image).resize(
        (new_width, new_height), resample=Image.Resampling.BILINEAR
    )
    padded = np.zeros((height, width, 3), np.uint8)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    padded[top : top + new_height, left : left + new_width] = np.asarray(resized)
    return padded
