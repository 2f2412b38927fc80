"""Boxes as corners ``(x1, y1, x2, y2)`` in pixels: overlap, and the coder of their corrections.

A correction is ``(dx, dy, dw, dh)`` as in R-CNN (https://arxiv.org/abs/1311.2524, appendix C): the
centre moves by a share of the box's size, and the size is scaled by an exponential.
"""

import math
from collections.abc import Sequence

import jax.numpy as jnp

from vmamba_jax.typing import Array, Float, Int

_LARGEST = abs(math.log(16 / 1000))  # no box grows or shrinks by more than 1000 / 16


def decode_boxes(
    boxes: Float[Array, "*n 4"],
    deltas: Float[Array, "*n 4"],
    stds: Sequence[float],
    size: Int[Array, "2"],
) -> Float[Array, "*n 4"]:
    """Boxes corrected by what a head predicts, cut to the picture.

    Args:
        boxes: anchors or proposals, in pixels.
        deltas: the head's output, a correction of each in units of `stds`.
        stds: of the four corrections, by which the head's targets were divided.
        size: height and width of the picture, in pixels.

    Returns:
        Corners between 0 and the picture's width and height, of the dtype of `boxes`.
    """
    dx, dy, dw, dh = (
        delta * std for delta, std in zip(jnp.unstack(deltas, axis=-1), stds, strict=True)
    )
    x1, y1, x2, y2 = jnp.unstack(boxes, axis=-1)
    width, height = x2 - x1, y2 - y1
    x, y = (x1 + x2) / 2 + width * dx, (y1 + y2) / 2 + height * dy
    width = width * jnp.exp(jnp.clip(dw, -_LARGEST, _LARGEST))
    height = height * jnp.exp(jnp.clip(dh, -_LARGEST, _LARGEST))
    bottom, right = size.astype(boxes.dtype)
    corners = (
        jnp.clip(x - width / 2, 0, right),
        jnp.clip(y - height / 2, 0, bottom),
        jnp.clip(x + width / 2, 0, right),
        jnp.clip(y + height / 2, 0, bottom),
    )
    return jnp.stack(corners, axis=-1)


def box_area(boxes: Float[Array, "*n 4"]) -> Float[Array, "*n"]:
    """Width times height, in square pixels."""
    x1, y1, x2, y2 = jnp.unstack(boxes, axis=-1)
    return (x2 - x1) * (y2 - y1)


def box_iou(boxes: Float[Array, "n 4"], others: Float[Array, "m 4"]) -> Float[Array, "n m"]:
    """Intersection over union of each box with each other one; 0 where both are empty."""
    first, second = boxes[:, None], others[None]
    low = jnp.maximum(first[..., :2], second[..., :2])
    high = jnp.minimum(first[..., 2:], second[..., 2:])
    intersection = jnp.maximum(high - low, 0).prod(axis=-1)
    union = box_area(first) + box_area(second) - intersection
    return jnp.where(union > 0, intersection / jnp.where(union > 0, union, 1), 0)
