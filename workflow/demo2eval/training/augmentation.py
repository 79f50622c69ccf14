"""Augmentation of training pictures that is ours and not openpi's; that is in `demo2eval.pi0.transforms`."""

import jax
import jax.numpy as jnp


def random_shift(key: jax.Array, images: dict[str, jax.Array], most: int) -> dict[str, jax.Array]:
    """Shift each picture by up to `most` pixels either way, its edge repeated (Yarats et al., 2021).

    Args:
        images: camera -> [b, h, w, 3]; every picture of every camera is shifted by itself.
    """
    keys = jax.random.split(key, len(images))
    return {
        camera: _shifted(one, images[camera], most)
        for one, camera in zip(keys, sorted(images), strict=True)
    }


def _shifted(key: jax.Array, pictures: jax.Array, most: int) -> jax.Array:
    corners = jax.random.randint(key, (pictures.shape[0], 2), 0, 2 * most + 1)
    padded = jnp.pad(pictures, ((0, 0), (most, most), (most, most), (0, 0)), mode="edge")
    return jax.vmap(
        lambda picture, corner: jax.lax.dynamic_slice(picture, (*corner, 0), pictures.shape[1:])
    )(padded, corners)
