"""Bilinear resizing to the pixel as OpenCV does it, which detectors and segmenters were trained on.

Unlike Pillow's, it takes the two nearest pixels along either axis however much it shrinks.
"""

import numpy as np

from vmamba_jax.typing import UInt8

_ONE = 2048  # weights are whole numbers of 1 / 2048


def resize_bilinear(
    image: UInt8[np.ndarray, "H W C"], height: int, width: int
) -> UInt8[np.ndarray, "h w C"]:
    """Resizes an image in OpenCV's fixed-point arithmetic (``INTER_LINEAR``).

    Args:
        image: channels last.
        height: of the result, in pixels.
        width: of the result, in pixels.
    """
    left, right, of_left, of_right = _neighbours(image.shape[1], width)
    pixels = image.astype(np.int32)
    rows = pixels[:, left] * of_left[:, None] + pixels[:, right] * of_right[:, None]
    top, bottom, of_top, of_bottom = _neighbours(image.shape[0], height)
    rows >>= 4
    upper = rows[top] * of_top[:, None, None] >> 16
    lower = rows[bottom] * of_bottom[:, None, None] >> 16
    return (upper + lower + 2 >> 2).astype(np.uint8)


def _neighbours(old: int, new: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the two pixels around each new pixel's centre, and their weights."""
    at = ((np.arange(new) + 0.5) * (old / new) - 0.5).astype(np.float32)
    low = np.floor(at)
    share = at - low
    first, second = (np.clip(low + i, 0, old - 1).astype(np.int64) for i in (0, 1))
    of_first, of_second = (
        np.rint(weight * np.float32(_ONE)).astype(np.int32) for weight in (1 - share, share)
    )
    return first, second, of_first, of_second
