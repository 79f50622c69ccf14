"""What happens to pictures, states and actions between the dataset and the model, and back."""

import math
from collections.abc import Mapping, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from demo2eval.pi0.normalize import normalize, unnormalize

__all__ = [
    "absolute_actions",
    "augment",
    "delta_actions",
    "normalize",
    "pad",
    "resize_with_pad",
    "unnormalize",
]

CROP = 0.95
ROTATION_DEGREES = 5.0
JITTER_PROBABILITY = 0.5
BRIGHTNESS, CONTRAST, HUE = 0.3, 0.4, 0.1


def resize_with_pad(picture: np.ndarray, height: int, width: int) -> np.ndarray:
    """Resize a picture, uint8 [h, w, 3], into uint8 [height, width, 3] with its proportions kept and black borders.

    The picture is centred; an odd remainder of the border is at the bottom or the right.
    """
    old_height, old_width = picture.shape[:2]
    if (old_height, old_width) == (height, width):
        return picture
    ratio = max(old_width / width, old_height / height)
    new_height, new_width = int(old_height / ratio), int(old_width / ratio)
    resized = Image.fromarray(picture).resize(
        (new_width, new_height), resample=Image.Resampling.BILINEAR
    )
    result = np.zeros((height, width, 3), np.uint8)
    top, left = (height - new_height) // 2, (width - new_width) // 2
    result[top : top + new_height, left : left + new_width] = np.asarray(resized)
    return result


def pad(values: np.ndarray, width: int) -> np.ndarray:
    """Pad the last axis with zeros to `width`; what is as wide already is returned as it is."""
    missing = width - values.shape[-1]
    return np.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)]) if missing > 0 else values


def _masked_state(state: np.ndarray, mask: Sequence[bool]) -> np.ndarray:
    kept = np.asarray(mask, bool)
    return np.where(kept, state[..., : len(kept)], 0)[..., None, :]


def delta_actions(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool]) -> np.ndarray:
    """Subtract the state at the look from every action of the chunk, in the masked dimensions (openpi's DeltaActions).

    Args:
        actions: [..., horizon, A].
        state: [..., S], S at least len(mask).
        mask: for each of the first dimensions whether to subtract.
    """
    result = np.array(actions, copy=True)
    result[..., : len(mask)] -= _masked_state(state, mask).astype(result.dtype)
    return result


def absolute_actions(actions: np.ndarray, state: np.ndarray, mask: Sequence[bool]) -> np.ndarray:
    """Undo `delta_actions`."""
    result = np.array(actions, copy=True)
    result[..., : len(mask)] += _masked_state(state, mask).astype(result.dtype)
    return result


def augment(key: jax.Array, images: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Augment training pictures as openpi does; the same key gives the same pictures as there.

    Pictures of cameras without "wrist" in the name are cropped to 95 % at a random place, resized back and rotated by up to 5 degrees,
    in one bilinear resampling with black outside. Then the colours of half of all pictures are jittered: brightness, contrast, hue.
    A look's pictures of several cameras share its random numbers.

    Args:
        key: a JAX random key.
        images: camera -> float32 [b, h, w, 3] in [-1, 1].

    Returns:
        the same shapes and range.
    """
    result = {}
    for camera, pictures in images.items():
        one = _augment_fixed if "wrist" in camera else _augment_moving
        result[camera] = (
            jax.vmap(one)(jax.random.split(key, pictures.shape[0]), pictures / 2 + 0.5) * 2 - 1
        )
    return result


def _augment_fixed(key: jax.Array, picture: jax.Array) -> jax.Array:
    # openpi splits a key for a chain of transforms and again within it, even if the chain has one link.
    (chain_key,) = jax.random.split(key, 1)
    return _jitter(*jax.random.split(chain_key, 1), picture)


def _augment_moving(key: jax.Array, picture: jax.Array) -> jax.Array:
    move_key, color_key = jax.random.split(key)
    return _jitter(*jax.random.split(color_key, 1), _crop_and_rotate(move_key, picture))


def _crop_and_rotate(key: jax.Array, picture: jax.Array) -> jax.Array:
    """Crop, resize back and rotate a picture [h, w, 3]; the crop's centre need not be at a whole pixel."""
    crop_key, _, angle_key = jax.random.split(key, 3)
    size = jnp.array(picture.shape[:2], jnp.float32)
    cropped = jnp.array([int(side * CROP) for side in picture.shape[:2]], jnp.float32)
    center = jax.random.uniform(
        crop_key, (2,), minval=(cropped - size) / 2, maxval=(size - cropped) / 2
    )
    limit = math.radians(ROTATION_DEGREES)
    angle = jax.random.uniform(angle_key, minval=-limit, maxval=limit)
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    y, x = jnp.mgrid[: picture.shape[0], : picture.shape[1]] - ((size - 1) / 2)[:, None, None]
    turned = jnp.stack([cosine * y + sine * x, cosine * x - sine * y])
    source = turned * (cropped / size)[:, None, None] + (center + (size - 1) / 2)[:, None, None]
    sample = partial(
        jax.scipy.ndimage.map_coordinates, coordinates=source, order=1, mode="constant", cval=0.0
    )
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(picture)


def _jitter(key: jax.Array, picture: jax.Array) -> jax.Array:
    """Jitter the colours of a picture [h, w, 3] in [0, 1] with probability 0.5: hue, and in HSV's value brightness and contrast."""
    keys = jax.random.split(key, 5)
    brightness, contrast, hue = (
        jax.random.uniform(one, minval=-limit, maxval=limit)
        for one, limit in zip(keys[:3], (BRIGHTNESS, CONTRAST, HUE), strict=True)
    )
    value = picture.max(-1)
    chroma = value - picture.min(-1)
    saturation = jnp.where(value == 0, 0.0, chroma / jnp.where(value == 0, 1.0, value))
    changed = _adjust_contrast(_adjust_brightness(value, brightness), contrast)
    # Each channel falls off linearly with the hue's distance from its own colour (Smith, 1978).
    position = (jnp.array([5.0, 3.0, 1.0]) + (_hue(picture, chroma) + 6 * hue)[..., None]) % 6
    falls = jnp.clip(jnp.minimum(position, 4 - position), 0, 1)
    jittered = changed[..., None] * (1 - saturation[..., None] * falls)
    return jnp.where(jax.random.bernoulli(key, JITTER_PROBABILITY), jittered, picture)


def _hue(picture: jax.Array, chroma: jax.Array) -> jax.Array:
    """Return the hue of a picture [h, w, 3] in sixths of the circle, 0 where it is grey, [h, w]."""
    red, green, blue = picture[..., 0], picture[..., 1], picture[..., 2]
    differences = jnp.stack([green - blue, blue - red, red - green], axis=-1)
    strongest = jnp.argmax(picture, axis=-1)
    difference = jnp.take_along_axis(differences, strongest[..., None], axis=-1)[..., 0]
    return jnp.where(
        chroma == 0, 0.0, 2 * strongest + difference / jnp.where(chroma == 0, 1.0, chroma)
    )


def _adjust_brightness(value: jax.Array, amount: jax.Array) -> jax.Array:
    """Move values in [0, 1] towards 0 (amount < 0) or 1, by that share of the way."""
    return jnp.where(amount < 0, value * (1 + amount), value * (1 - amount) + amount)


def _adjust_contrast(value: jax.Array, amount: jax.Array) -> jax.Array:
    """Bend values in [0, 1] about 0.5: slope tan(45 degrees * (1 + amount)) in the middle, its inverse near 0 and 1."""
    slope = jnp.tan((amount + 1) * (jnp.pi / 4))
    knee = slope / (2 * (1 + slope))
    outer = value / slope + jnp.where(value > 0.5, 1 - 1 / slope, 0.0)
    return jnp.where((value < knee) | (value > 1 - knee), outer, slope * (value - 0.5) + 0.5)
