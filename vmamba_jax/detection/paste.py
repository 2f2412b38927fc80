"""Masks of a box's cells as masks of the picture's pixels, and their run lengths."""

import numpy as np

from vmamba_jax.typing import Bool, Float


def paste_mask(
    cells: Float[np.ndarray, "rows columns"],
    box: Float[np.ndarray, "4"],
    height: int,
    width: int,
) -> Float[np.ndarray, "height width"]:
    """A mask in the picture: at each pixel's centre, bilinear between the centres of the cells.

    Args:
        cells: values of the cells that the box is divided into; outside it they are 0.
        box: corners ``(x1, y1, x2, y2)``, in pixels.
        height: of the picture, in pixels.
        width: of the picture, in pixels.

    Returns:
        float32; zeros if the box has no width or height.
    """
    rows, top = _weights(box[1], box[3], cells.shape[0], height)
    columns, left = _weights(box[0], box[2], cells.shape[1], width)
    mask = np.zeros((height, width), np.float32)
    mask[top : top + len(rows), left : left + len(columns)] = rows @ cells @ columns.T
    return mask


def _weights(low: np.float32, high: np.float32, cells: int, length: int) -> tuple[np.ndarray, int]:
    """Weight of each cell at the pixels that have any along an axis, and the first such pixel."""
    if not high > low:
        return np.zeros((0, cells), np.float32), 0
    margin = (high - low) / cells / 2
    first = int(np.clip(np.floor(low - margin), 0, length))
    end = int(np.clip(np.ceil(high + margin), first, length))
    centres = np.arange(first, end, dtype=np.float32) + np.float32(0.5)
    at = (centres - low) / (high - low) * cells - np.float32(0.5)
    distance = np.abs(at[:, None] - np.arange(cells, dtype=np.float32))
    return np.maximum(1 - distance, 0).astype(np.float32), first


def run_lengths(mask: Bool[np.ndarray, "H W"]) -> list[int]:
    """COCO's uncompressed run lengths: of 0s and 1s in turn, down the columns, 0s first."""
    flat = mask.ravel(order="F")
    changes = np.flatnonzero(flat[1:] != flat[:-1]) + 1
    starts = [0, *changes.tolist(), len(flat)]
    runs = np.diff(starts).tolist()
    return [0, *runs] if len(flat) and flat[0] else runs
