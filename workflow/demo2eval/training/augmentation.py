"""Augmentation of training images: openpi's, and random shifts, which openpi has not."""

import math
from collections.abc import Iterable, Mapping
from functools import partial

import jax
import jax.numpy as jnp

CROP = 0.95
ROTATION_DEGREES = 5.0
JITTER_PROBABILITY = 0.5
BRIGHTNESS, CONTRAST, HUE = 0.3, 0.4, 0.1


def augment(keys: jax.Array, images: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """Augment training images as openpi does.

    With `jax.random.split(key, batch size)` of a key they are the same images as there.

    Images of cameras without "wrist" in the name are cropped to 95 % at a random position, resized
    back and rotated by up to 5 degrees, in one bilinear resampling with black outside. Then the
    colors of half of all images are jittered: brightness, contrast, hue. The images of a sample's
    cameras share its random numbers.

    Args:
        keys: a JAX random key of each sample.
        images: camera -> float32 [b, h, w, 3] in [-1, 1].

    Returns:
        the same shapes and range.
    """
    augmented = {}
    for camera, batch in images.items():
        augment_image = _augment_wrist_image if "wrist" in camera else _augment_image
        augmented[camera] = jax.vmap(augment_image)(keys, batch / 2 + 0.5) * 2 - 1
    return augmented


def _augment_wrist_image(key: jax.Array, image: jax.Array) -> jax.Array:
    # openpi splits a key for a chain of transforms and again within it, even if the chain has one
    # link.
    (chain_key,) = jax.random.split(key, 1)
    (jitter_key,) = jax.random.split(chain_key, 1)
    return jitter_colors(jitter_key, image)


def _augment_image(key: jax.Array, image: jax.Array) -> jax.Array:
    crop_key, chain_key = jax.random.split(key)
    (jitter_key,) = jax.random.split(chain_key, 1)
    return jitter_colors(jitter_key, crop_and_rotate(crop_key, image))


def crop_and_rotate(key: jax.Array, image: jax.Array) -> jax.Array:
    """Crop an image [h, w, 3], resize it back and rotate it.

    The crop's center need not be at a whole pixel.
    """
    crop_key, _, angle_key = jax.random.split(key, 3)
    size = jnp.array(image.shape[:2], jnp.float32)
    cropped = jnp.array([int(side * CROP) for side in image.shape[:2]], jnp.float32)
    center = jax.random.uniform(
        crop_key, (2,), minval=(cropped - size) / 2, maxval=(size - cropped) / 2
    )
    limit = math.radians(ROTATION_DEGREES)
    angle = jax.random.uniform(angle_key, minval=-limit, maxval=limit)
    sine, cosine = jnp.sin(angle), jnp.cos(angle)
    y, x = jnp.mgrid[: image.shape[0], : image.shape[1]] - ((size - 1) / 2)[:, None, None]
    rotated = jnp.stack([cosine * y + sine * x, cosine * x - sine * y])
    source = rotated * (cropped / size)[:, None, None] + (center + (size - 1) / 2)[:, None, None]
    sample = partial(
        jax.scipy.ndimage.map_coordinates,
        coordinates=list(source),
        order=1,
        mode="constant",
        cval=0.0,
    )
    return jax.vmap(sample, in_axes=-1, out_axes=-1)(image)


def jitter_colors(key: jax.Array, image: jax.Array) -> jax.Array:
    """Jitter the colors of an image [h, w, 3] in [0, 1] with probability 0.5.

    The hue is jittered, and in HSV's value brightness and contrast.
    """
    keys = jax.random.split(key, 5)
    brightness, contrast, hue = (
        jax.random.uniform(amount_key, minval=-limit, maxval=limit)
        for amount_key, limit in zip(keys[:3], (BRIGHTNESS, CONTRAST, HUE), strict=True)
    )
    value = image.max(-1)
    chroma = value - image.min(-1)
    saturation = jnp.where(value == 0, 0.0, chroma / jnp.where(value == 0, 1.0, value))
    adjusted = _adjust_contrast(_adjust_brightness(value, brightness), contrast)
    # Each channel falls off linearly with the hue's distance from its own color (Smith, 1978).
    position = (jnp.array([5.0, 3.0, 1.0]) + (_hue(image, chroma) + 6 * hue)[..., None]) % 6
    falls = jnp.clip(jnp.minimum(position, 4 - position), 0, 1)
    jittered = adjusted[..., None] * (1 - saturation[..., None] * falls)
    return jnp.where(jax.random.bernoulli(key, JITTER_PROBABILITY), jittered, image)


def _hue(image: jax.Array, chroma: jax.Array) -> jax.Array:
    """Return the hue of an image [h, w, 3] in sixths of the circle, 0 where it is gray, [h, w]."""
    red, green, blue = image[..., 0], image[..., 1], image[..., 2]
    differences = jnp.stack([green - blue, blue - red, red - green], axis=-1)
    strongest = jnp.argmax(image, axis=-1)
    difference = jnp.take_along_axis(differences, strongest[..., None], axis=-1)[..., 0]
    return jnp.where(
        chroma == 0, 0.0, 2 * strongest + difference / jnp.where(chroma == 0, 1.0, chroma)
    )


def _adjust_brightness(value: jax.Array, amount: jax.Array) -> jax.Array:
    """Move values in [0, 1] towards 0 (amount < 0) or 1, by that share of the way."""
    return jnp.where(amount < 0, value * (1 + amount), value * (1 - amount) + amount)


def _adjust_contrast(value: jax.Array, amount: jax.Array) -> jax.Array:
    """Bend values in [0, 1] about 0.5.

    The slope is tan(45 degrees * (1 + amount)) in the middle, and its inverse near 0 and 1.
    """
    slope = jnp.tan((amount + 1) * (jnp.pi / 4))
    knee = slope / (2 * (1 + slope))
    outer = value / slope + jnp.where(value > 0.5, 1 - 1 / slope, 0.0)
    return jnp.where((value < knee) | (value > 1 - knee), outer, slope * (value - 0.5) + 0.5)


def draw_shifts(key: jax.Array, cameras: Iterable[str], batch_size: int, max_pixels: int) -> dict:
    """Draw for each image of each camera how far `shift` moves it, int32 [b, 2] in pixels."""
    names = sorted(cameras)
    keys = jax.random.split(key, len(names))
    return {
        camera: jax.random.randint(camera_key, (batch_size, 2), 0, 2 * max_pixels + 1)
        for camera_key, camera in zip(keys, names, strict=True)
    }


def shift(batch: jax.Array, corners: jax.Array, max_pixels: int) -> jax.Array:
    """Shift images [b, h, w, 3] by up to `max_pixels` either way, their edges repeated.

    Yarats et al., 2021.

    Args:
        corners: from `draw_shifts`; `max_pixels` leaves an image where it was.
    """
    border = (max_pixels, max_pixels)
    padded = jnp.pad(batch, ((0, 0), border, border, (0, 0)), mode="edge")

    def crop(image, corner):
        return jax.lax.dynamic_slice(image, (*corner, 0), batch.shape[1:])

    return jax.vmap(crop)(padded, corners)
