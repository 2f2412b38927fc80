"""Resizing as OpenCV does it, which detectors and segmenters were trained on.

Unlike Pillow's, it takes the two nearest pixels along either axis however much it shrinks. Of the
result a part can be asked for, and only that is computed.
"""

import numpy as np

from vmamba_jax.typing import UInt8

_ONE = 2048  # weights are whole numbers of 1 / 2048
_ALL = slice(None)


def resize_bilinear(
    image: UInt8[np.ndarray, "H W C"],
    height: int,
    width: int,
    rows: slice = _ALL,
    columns: slice = _ALL,
) -> UInt8[np.ndarray, "h w C"]:
    """Resizes an image to the pixel as OpenCV's fixed-point arithmetic does (``INTER_LINEAR``).

    Args:
        image: channels last.
        height: of the result, in pixels.
        width: of the result, in pixels.
        rows: of the result, to compute; all by default.
        columns: of the result, to compute.
    """
    if image.shape[:2] == (height, width):
        return image[rows, columns]
    channels = image.shape[2]
    left, right, of_left, of_right = _neighbours(image.shape[1], width, columns)
    top, bottom, of_top, of_bottom = _neighbours(image.shape[0], height, rows)
    first, last = top.min(), bottom.max() + 1
    # Rows as long vectors: numpy takes and multiplies those at several times the speed.
    pixels = image[first:last].reshape(last - first, -1)

    def along_the_row(pixel: np.ndarray, weight: np.ndarray) -> np.ndarray:
        at = (pixel[:, None] * channels + np.arange(channels)).ravel()
        taken = np.take(pixels, at, axis=1).astype(np.int32)
        taken *= np.repeat(weight, channels)
        return taken

    across = along_the_row(left, of_left)
    across += along_the_row(right, of_right)
    across >>= 4

    def along_the_column(row: np.ndarray, weight: np.ndarray) -> np.ndarray:
        taken = np.take(across, row - first, axis=0)
        taken *= weight[:, None]
        taken >>= 16
        return taken

    result = along_the_column(top, of_top)
    result += along_the_column(bottom, of_bottom)
    result += 2
    result >>= 2
    return result.astype(np.uint8).reshape(len(top), -1, channels)


def resize_nearest(
    labels: UInt8[np.ndarray, "H W"],
    height: int,
    width: int,
    rows: slice = _ALL,
    columns: slice = _ALL,
) -> UInt8[np.ndarray, "h w"]:
    """Resizes a label map: each pixel takes the label at its centre. Arguments as above."""
    below = _centres(labels.shape[0], height, rows)
    across = _centres(labels.shape[1], width, columns)
    return labels[np.floor(below + 0.5).astype(int)][:, np.floor(across + 0.5).astype(int)]


def fitted_size(height: int, width: int, scale: tuple[int, int]) -> tuple[int, int]:
    """Height and width of an image resized, its shape kept, to fit a box of either orientation.

    Of a very long image at least one pixel is left across.
    """
    factor = min(max(scale) / max(height, width), min(scale) / min(height, width))
    return max(int(height * factor + 0.5), 1), max(int(width * factor + 0.5), 1)


def _centres(old: int, new: int, part: slice) -> np.ndarray:
    """Where the centres of a resized axis' pixels lie, in pixels of the old axis."""
    return (np.arange(new)[part] + 0.5) * (old / new) - 0.5


def _neighbours(
    old: int, new: int, part: slice
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Indices of the two pixels around each new pixel's centre, and their weights."""
    at = _centres(old, new, part).astype(np.float32)
    low = np.floor(at)
    share = at - low
    first, second = (np.clip(low + i, 0, old - 1).astype(np.int64) for i in (0, 1))
    of_first, of_second = (
        np.rint(weight * np.float32(_ONE)).astype(np.int32) for weight in (1 - share, share)
    )
    return first, second, of_first, of_second
