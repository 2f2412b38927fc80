"""From a picture to what a detector takes: resized, normalised, padded."""

from typing import NamedTuple

import numpy as np

from vmamba_jax.data.resize import resize_bilinear
from vmamba_jax.typing import Float, UInt8

LONG_SIDE, SHORT_SIDE = 1333, 800
"""Pixels that a picture's sides are brought to at most, as the released detectors were trained."""
_MEAN = np.array([123.675, 116.28, 103.53], np.float32)
_STD = np.array([58.395, 57.12, 57.375], np.float32)


class Prepared(NamedTuple):
    """A picture for a detector.

    Attributes:
        pixels: normalised, with zeros at the bottom and the right.
        size: height and width without these zeros.
        original_size: height and width of the picture before it was resized.
    """

    pixels: Float[np.ndarray, "H W C"]
    size: tuple[int, int]
    original_size: tuple[int, int]


def prepare(
    picture: UInt8[np.ndarray, "h w C"],
    *,
    long_side: int = LONG_SIDE,
    short_side: int = SHORT_SIDE,
    size_divisor: int = 32,
) -> Prepared:
    """Resizes a picture, its shape kept, normalises and pads it.

    Args:
        picture: RGB.
        long_side: pixels of the longer side at most.
        short_side: pixels of the shorter side at most.
        size_divisor: what height and width are padded to a multiple of. A larger one makes for
            fewer sizes, each of which compiles once, and for slightly other results than the
            released detectors' 32.
    """
    height, width = picture.shape[:2]
    scale = min(long_side / max(height, width), short_side / min(height, width))
    new_height, new_width = (max(1, int(side * scale + 0.5)) for side in (height, width))
    resized = resize_bilinear(picture, new_height, new_width)
    return Prepared(pad(normalise(resized), size_divisor), (new_height, new_width), (height, width))


def normalise(picture: UInt8[np.ndarray, "H W C"]) -> Float[np.ndarray, "H W C"]:
    """RGB less ImageNet's mean, over its standard deviation; float32."""
    return (picture.astype(np.float32) - _MEAN) / _STD


def pad(picture: Float[np.ndarray, "H W C"], divisor: int) -> Float[np.ndarray, "h w C"]:
    """Zeros at the bottom and the right, until both sides are multiples of `divisor`."""
    height, width = picture.shape[:2]
    return np.pad(picture, ((0, -height % divisor), (0, -width % divisor), (0, 0)))
