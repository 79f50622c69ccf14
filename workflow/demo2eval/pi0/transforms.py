"""What happens to pictures, states and actions between the dataset and the model, and back."""

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from demo2eval.pi0.normalization import normalize, unnormalize

__all__ = ["absolute_actions", "augment", "delta_actions", "normalize", "pad", "resize_with_pad", "unnormalize"]

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
    resized = Image.fromarray(picture).resize((new_width, new_height), resample=Image.Resampling.BILINEAR)
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
    """Augment training pictures as openpi does.

    Pictures of cameras without "wrist" in the name are cropped to 95 % at a random place, resized back and rotated by up to 5 degrees,
    in one bilinear resampling with black outside. Then the colours of half of all pictures are jittered: brightness, contrast, hue.

    Args:
        key: a JAX random key.
        images: camera -> float32 [b, h, w, 3] in [-1, 1].

    Returns:
        the same shapes and range.
    """
    result = {}
    for index, (camera, pictures) in enumerate(sorted(images.items())):
        keys = jax.random.split(jax.random.fold_in(key, index), pictures.shape[0])
        moves = "wrist" not in camera
        result[camera] = (
            jax.vmap(lambda one, picture, moves=moves: _augment_one(one, picture, moves))(keys, pictures / 2 + 0.5) * 2 - 1
        )
    return result


def _augment_one(key: jax.Array, picture: jax.Array, moves: bool) -> jax.Array:
    place_key, angle_key, chance_key, color_key = jax.random.split(key, 4)
    if moves:
        picture = _crop_and_rotate(picture, place_key, angle_key)
    jittered = _jitter(picture, color_key)
    return jnp.where(jax.random.bernoulli(chance_key, JITTER_PROBABILITY), jittered, picture)


def _crop_and_rotate(picture: jax.Array, place_key: jax.Array, angle_key: jax.Array) -> jax.Array:
    height, width = picture.shape[:2]
    size = jnp.array([int(height * CROP), int(width * CROP)], jnp.float32)
    space = jnp.array([height, width], jnp.float32) - size
    corner = jnp.round(jax.random.uniform(place_key, (2,)) * space)
    angle = jnp.deg2rad(jax.random.uniform(angle_key, (), minval=-ROTATION_DEGREES, maxval=ROTATION_DEGREES))
    rows, columns = jnp.meshgrid(jnp.arange(height) + 0.5, jnp.arange(width) + 0.5, indexing="ij")
    y, x = rows - height / 2, columns - width / 2
    turned_y = jnp.cos(angle) * y - jnp.sin(angle) * x
    turned_x = jnp.sin(angle) * y + jnp.cos(angle) * x
    source_y = corner[0] + size[0] / 2 + turned_y * size[0] / height - 0.5
    source_x = corner[1] + size[1] / 2 + turned_x * size[1] / width - 0.5

    def sample(channel):
        return jax.scipy.ndimage.map_coordinates(channel, [source_y, source_x], order=1, mode="constant", cval=0.0)

    return jnp.stack([sample(picture[..., channel]) for channel in range(3)], axis=-1)


def _jitter(picture: jax.Array, key: jax.Array) -> jax.Array:
    brightness, contrast, hue = jax.random.uniform(key, (3,), minval=-1.0, maxval=1.0)
    picture = picture * (1 + BRIGHTNESS * brightness)
    mean = picture.mean()
    picture = (picture - mean) * (1 + CONTRAST * contrast) + mean
    return jnp.clip(_turn_hue(jnp.clip(picture, 0, 1), HUE * hue), 0, 1)


def _turn_hue(picture: jax.Array, turn: jax.Array) -> jax.Array:
    """Turn the hue of an RGB picture in [0, 1] by `turn` of a full circle, through HSV (Smith, 1978)."""
    red, green, blue = picture[..., 0], picture[..., 1], picture[..., 2]
    value = picture.max(-1)
    chroma = value - picture.min(-1)
    safe = jnp.where(chroma == 0, 1, chroma)
    sector = jnp.where(
        value == red, (green - blue) / safe % 6, jnp.where(value == green, (blue - red) / safe + 2, (red - green) / safe + 4)
    )
    sector = (jnp.where(chroma == 0, 0, sector) + 6 * turn) % 6
    # Each channel falls off linearly with the hue's distance from its own colour.
    offsets = jnp.array([5.0, 3.0, 1.0])
    position = (offsets + sector[..., None]) % 6
    return value[..., None] - chroma[..., None] * jnp.clip(jnp.minimum(position, 4 - position), 0, 1)
