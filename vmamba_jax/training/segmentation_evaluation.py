"""The evaluation of one batch of photographs and label maps, as a pure function to be jitted.

It gives what `segmentation.inference.segment` gives, for many images at once on any mesh.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Float, UInt8

from vmamba_jax.data.decode import IGNORED
from vmamba_jax.segmentation import UPerNet
from vmamba_jax.segmentation.inference import windows
from vmamba_jax.segmentation.upernet import resize
from vmamba_jax.training.mean_iou import confusion_matrix
from vmamba_jax.training.segmentation_config import SegmentationData
from vmamba_jax.training.sharding import replicated
from vmamba_jax.training.step import Batch

_BAND = 32
"""Rows that are classified at a time: all logits at once could be gigabytes an image."""


def make_segmentation_step(
    model: UPerNet, data: SegmentationData, mesh: Mesh
) -> Callable[[Any, Batch], dict[str, jax.Array]]:
    """The evaluation of a batch: images of one size, label maps of another.

    Args:
        model: the segmenter.
        data: `eval_mode`, and the windows' `crop_size` and `eval_stride`.
        mesh: from `make_mesh`.

    Returns:
        ``(variables, batch) -> results``: `prediction` (B, H, W) uint8 of the labels' size; over
        the images whose `mask` is set `confusion`, (classes, classes) int32, and their `count`.
    """

    def logits_of(variables: Any, images: Array) -> Array:
        outputs: Any = model.apply(variables, images)
        return resize(outputs.decode, images.shape[1:3])

    def step(variables: Any, batch: Batch) -> dict[str, jax.Array]:
        variables = jax.lax.with_sharding_constraint(variables, replicated(mesh))
        images, labels, seen = batch["image"], batch["label"], batch["mask"]
        if data.eval_mode == "slide":
            logits = _slide(lambda part: logits_of(variables, part), images, data)
        else:
            logits = logits_of(variables, images)
        predictions = argmax_resized(logits, labels.shape[1:])
        counted = jnp.where(seen[:, None, None], labels, jnp.uint8(IGNORED))
        results = {
            "confusion": confusion_matrix(counted, predictions, model.config.num_classes),
            "count": jnp.sum(seen, dtype=jnp.int32),
            "prediction": predictions,
        }
        return jax.lax.with_sharding_constraint(results, replicated(mesh))

    return jax.jit(step)


def _slide(logits_of: Callable[[Array], Array], images: Array, data: SegmentationData) -> Array:
    """The mean logits of all windows that hold a pixel; the windows run in a loop."""
    size = images.shape[1:3]
    crop, stride = (data.crop_size, data.crop_size), (data.stride, data.stride)
    places = list(windows(size, crop, stride))
    corners = np.array([[rows.start, columns.start] for rows, columns in places], np.int32)
    side = tuple(min(c, s) for c, s in zip(crop, size, strict=True))
    shown = np.zeros((*size, 1), np.float32)
    for rows, columns in places:
        shown[rows, columns] += 1

    def window(corner: Array) -> Array:
        part = jax.lax.dynamic_slice_in_dim(images, corner[0], side[0], axis=1)
        return logits_of(jax.lax.dynamic_slice_in_dim(part, corner[1], side[1], axis=2))

    def add(total: Array, corner: Array) -> tuple[Array, None]:
        zero = jnp.zeros_like(corner[0])
        start = zero, corner[0], corner[1], zero
        part = window(corner)
        before = jax.lax.dynamic_slice(total, start, part.shape)
        return jax.lax.dynamic_update_slice(total, before + part, start), None

    classes = jax.eval_shape(window, corners[0]).shape[-1]
    zeros = jnp.zeros((*images.shape[:3], classes), jnp.float32)
    total, _ = jax.lax.scan(add, zeros, jnp.asarray(corners))
    return total / jnp.broadcast_to(jnp.asarray(shown), total.shape)


def argmax_resized(
    logits: Float[Array, "B h w classes"], size: tuple[int, ...]
) -> UInt8[Array, "B H W"]:
    """The likeliest class of each pixel after bilinear resizing, a band of rows at a time.

    Args:
        logits: at most 256 classes.
        size: height and width of the result.
    """
    height, width = size
    rows = np.arange(-(-height // _BAND) * _BAND).reshape(-1, _BAND)
    columns = np.arange(width)

    def band(rows: Array) -> Array:
        part = _interpolate(logits, rows, height, axis=1)
        part = _interpolate(part, jnp.asarray(columns), width, axis=2)
        return jnp.argmax(part, axis=-1).astype(jnp.uint8)

    bands = jax.lax.map(band, jnp.asarray(rows))
    return jnp.moveaxis(bands, 0, 1).reshape(len(logits), -1, width)[:, :height]


def _interpolate(x: Array, index: Array, new: int, *, axis: int) -> Array:
    """Places `index` of an axis that is resized to `new`: half-pixel centres, edges repeated."""
    old = x.shape[axis]
    if old == new:
        return jnp.take(x, jnp.minimum(index, new - 1), axis=axis)
    at = jnp.clip((index.astype(jnp.float32) + 0.5) * (old / new) - 0.5, 0, old - 1)
    first = jnp.floor(at).astype(jnp.int32)
    shape = [1] * x.ndim
    shape[axis] = -1
    weight = (at - first.astype(jnp.float32)).reshape(shape)
    lower = jnp.take(x, first, axis=axis)
    upper = jnp.take(x, jnp.minimum(first + 1, old - 1), axis=axis)
    return lower + (upper - lower) * jnp.broadcast_to(weight, lower.shape)
