"""Random erasing of a whole batch, on the device, inside the training step.

Source: Zhong et al., "Random Erasing Data Augmentation", AAAI 2020.
"""

import math

import jax
import jax.numpy as jnp

from vmamba_jax.typing import Array, Images

_TRIES = 10


def random_erasing(
    key: Array,
    images: Images,
    *,
    probability: float = 0.25,
    area: tuple[float, float] = (0.02, 1 / 3),
    ratio: tuple[float, float] = (0.3, 1 / 0.3),
) -> Images:
    """Overwrites one random rectangle of some of the images by standard normal noise, per pixel.

    Done after normalisation, so the noise has the statistics of the data. The rectangle's share
    of the image is uniform in ``area``, its height to width log-uniform in ``ratio``; when ten
    draws do not fit, nothing is erased.

    Args:
      key: random key.
      images: ``(B, H, W, C)``, floating point, normalised.
      probability: of erasing an image at all.
      area: least and greatest share of an image that is erased.
      ratio: least and greatest aspect ratio of the rectangle.

    Returns:
      The images, ``(B, H, W, C)`` of the dtype given.
    """
    batch, height, width, _ = images.shape
    chance_key, area_key, ratio_key, top_key, left_key, noise_key = jax.random.split(key, 6)
    tries = (batch, _TRIES)
    target = jax.random.uniform(area_key, tries, minval=area[0], maxval=area[1]) * height * width
    log_ratio = jax.random.uniform(
        ratio_key, tries, minval=math.log(ratio[0]), maxval=math.log(ratio[1])
    )
    h = jnp.round(jnp.sqrt(target * jnp.exp(log_ratio))).astype(jnp.int32)
    w = jnp.round(jnp.sqrt(target / jnp.exp(log_ratio))).astype(jnp.int32)
    fits = (h < height) & (w < width)
    first = jnp.argmax(fits, axis=1, keepdims=True)
    h, w = (jnp.take_along_axis(side, first, axis=1)[:, 0] for side in (h, w))
    chosen = jax.random.uniform(chance_key, (batch,)) < probability
    inside = (chosen & fits.any(axis=1))[:, None, None]
    for axis, (place_key, side, size) in enumerate(((top_key, h, height), (left_key, w, width))):
        start = jax.random.randint(place_key, (batch,), 0, jnp.maximum(size - side, 0) + 1)
        at = jnp.arange(size)[None]
        along = (at >= start[:, None]) & (at < (start + side)[:, None])
        inside &= jnp.expand_dims(along, 2 - axis)
    noise = jax.random.normal(noise_key, images.shape, images.dtype)
    return jnp.where(inside[..., None], noise, images)
