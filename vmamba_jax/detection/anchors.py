"""Anchors: the boxes of fixed shapes, at each position of a map, that the proposals start from."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np

from vmamba_jax.typing import Array, Float, Int


def base_anchors(
    stride: int, scale: float, ratios: Sequence[float]
) -> Float[np.ndarray, "anchors 4"]:
    """The anchors of the position at the origin, centred there: one a ratio.

    Args:
        stride: pixels from one position of the map to the next.
        scale: side of a square anchor, in strides.
        ratios: height over width of each anchor; the area is the square one's.

    Returns:
        float32 corners ``(x1, y1, x2, y2)``, in pixels.
    """
    root = np.sqrt(np.asarray(ratios, np.float32))
    height, width = scale * stride * root, scale * stride / root
    corners = np.stack([-width, -height, width, height], axis=-1) / 2
    return corners.astype(np.float32)


def anchors_at(
    indices: Int[Array, "n"], width: int, stride: int, base: Float[np.ndarray, "anchors 4"]
) -> Float[Array, "n 4"]:
    """Anchors of a map by their numbers: counted row by row, position by position, ratio by ratio.

    Args:
        indices: the numbers, int32.
        width: of the map, in positions.
        stride: pixels from one position to the next; the first one's centre is the origin.
        base: see `base_anchors`.

    Returns:
        float32 corners, in pixels.
    """
    position, anchor = indices // len(base), indices % len(base)
    x, y = position % width * stride, position // width * stride
    return jnp.asarray(base)[anchor] + jnp.stack([x, y, x, y], axis=-1).astype(jnp.float32)
