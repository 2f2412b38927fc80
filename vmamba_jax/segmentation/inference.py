"""Segments photographs of any size, whole or by a window that slides over them.

No image is padded: a network sees what the published evaluation showed it. So one program is
compiled for each size of its input, which is one for all images where the window slides.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int32
from PIL import Image

from vmamba_jax.data.augment import IMAGENET_MEAN, IMAGENET_STD, normalize
from vmamba_jax.data.resize import fitted_size, resize_bilinear
from vmamba_jax.segmentation.config import Inference
from vmamba_jax.segmentation.upernet import UPerNet, resize
from vmamba_jax.typing import Array, Float, Variables

_BAND = 32  # rows of a result that are classified at a time
Labels = Int32[np.ndarray, "image_H image_W"]


def segment(
    model: UPerNet,
    variables: Variables,
    image: Image.Image,
    inference: Inference | None = None,
    on_window: Callable[[int, int], None] | None = None,
) -> Labels:
    """The class of every pixel of an RGB photograph.

    Args:
        model: the segmenter.
        variables: its weights.
        image: the photograph.
        inference: how it is shown to the network.
        on_window: called with the windows that are done and all there are, after each.

    Returns:
        int32 labels (H, W) of the photograph's own size.

    Raises:
        ValueError: for an image too small for the network.
    """
    inference = inference or Inference()
    height, width = fitted_size(image.height, image.width, inference.scale)
    pixels = Image.fromarray(resize_bilinear(np.asarray(image), height, width))
    return segment_pixels(
        *(model, variables, normalize(pixels, IMAGENET_MEAN, IMAGENET_STD)),
        *((image.height, image.width), inference, on_window),
    )


def segment_pixels(
    model: UPerNet,
    variables: Variables,
    pixels: Float[np.ndarray, "H W C"],
    size: tuple[int, int],
    inference: Inference,
    on_window: Callable[[int, int], None] | None = None,
) -> Labels:
    """The class of every pixel, from an image that is resized and normalised already.

    Args:
        model: the segmenter.
        variables: its weights.
        pixels: normalised float32.
        size: height and width of the result: the photograph's, before it was resized.
        inference: mode, windows and stride.
        on_window: see `segment`.

    Returns:
        int32 labels of `size`.
    """
    shape = pixels.shape[:2]
    if inference.mode == "whole":
        logits = _logits(model, variables, jnp.asarray(pixels)[None])[0]
        if on_window is not None:
            on_window(1, 1)
        return argmax_resized(logits, (shape, size))
    logits = slide(
        partial(window_logits, model, variables),
        *(pixels, model.config.num_classes),
        *(inference.crop_size, inference.stride, on_window),
    )
    return argmax_resized(logits, (size,))


def slide(
    window_logits: Callable[[Any], Any],
    pixels: Float[np.ndarray, "H W C"],
    num_classes: int,
    crop_size: tuple[int, int],
    stride: tuple[int, int],
    on_window: Callable[[int, int], None] | None = None,
) -> Float[np.ndarray, "H W classes"]:
    """The mean logits of all windows that hold a pixel.

    Args:
        window_logits: ``(1, h, w, C) -> (h, w, classes)``.
        pixels: the image.
        num_classes: classes of a pixel.
        crop_size: height and width of a window; an image below it is one window.
        stride: rows and columns from one window to the next; the last one ends with the image.
        on_window: called with the windows that are done and all there are, after each.

    Returns:
        float32 logits of the image's size, in host memory.
    """
    total = np.zeros((*pixels.shape[:2], num_classes), np.float32)
    count = np.zeros(pixels.shape[:2], np.float32)
    places = list(windows(pixels.shape[:2], crop_size, stride))
    for done, window in enumerate(places, 1):
        total[window] += np.asarray(window_logits(pixels[window][None]))
        count[window] += 1
        if on_window is not None:
            on_window(done, len(places))
    total /= count[..., None]
    return total


def windows(
    size: tuple[int, ...], crop_size: tuple[int, int], stride: tuple[int, int]
) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of each window of a sliding one; the last ones end with the image."""

    def starts(length: int, crop: int, step: int) -> list[int]:
        count = max(length - crop + step - 1, 0) // step + 1
        return [max(min(i * step, length - crop), 0) for i in range(count)]

    rows, columns = map(starts, size, crop_size, stride)
    for top in rows:
        for left in columns:
            yield slice(top, top + crop_size[0]), slice(left, left + crop_size[1])


@partial(jax.jit, static_argnums=0)
def _logits(model: UPerNet, variables: Variables, images: Array) -> Array:
    logits: Any = model.apply(variables, images)
    return logits.decode


@partial(jax.jit, static_argnums=0)
def window_logits(model: UPerNet, variables: Variables, images: Array) -> Array:
    """Logits of one window (1, H, W, C), of its own size: ``(H, W, classes)`` float32."""
    logits: Any = model.apply(variables, images)
    return resize(logits.decode, images.shape[1:3])[0]


def argmax_resized(logits: Float[Any, "h w classes"], sizes: tuple[tuple[int, ...], ...]) -> Labels:
    """The likeliest class of each pixel after bilinear resizing, a band of rows at a time.

    The logits of all pixels would be a gigabyte for a large photograph of 150 classes.

    Args:
        logits: an array on a device or in host memory.
        sizes: heights and widths to resize to, one after the other.

    Returns:
        int32 labels of the last size.
    """
    rows, columns = (
        resizing(logits.shape[axis], [size[axis] for size in sizes]) for axis in (0, 1)
    )
    columns = None if {size[1] for size in sizes} == {logits.shape[1]} else columns
    height = len(rows)
    # Every band reads as many rows, from wherever its first lies: one program for all.
    rows = np.pad(rows, ((0, -height % _BAND), (0, 0)))
    bands = rows.reshape(-1, _BAND, rows.shape[1])
    used = [np.flatnonzero(band.any(axis=0)) for band in bands]
    reach = max(int(read[-1] - read[0]) + 1 for read in used)
    labels = []
    for band, read in zip(bands, used, strict=True):
        first = min(int(read[0]), len(logits) - reach)
        part = slice(first, first + reach)
        labels.append(np.asarray(_argmax(logits[part], band[:, part], columns)))
    return np.concatenate(labels)[:height]


@jax.jit
def _argmax(logits: Array, rows: Array, columns: Array | None) -> Array:
    exact = jax.lax.Precision.HIGHEST
    logits = jnp.einsum("rh,hwc->rwc", rows, logits, precision=exact)
    if columns is not None:
        logits = jnp.einsum("vw,rwc->rvc", columns, logits, precision=exact)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32)


def resizing(length: int, new_lengths: list[int]) -> Float[np.ndarray, "new old"]:
    """The matrix that resamples one axis bilinearly to each length in turn; see `resize`."""
    whole = np.eye(length, dtype=np.float64)
    for new in new_lengths:
        old = len(whole)
        at = np.clip((np.arange(new) + 0.5) * (old / new) - 0.5, 0, old - 1)
        first = np.minimum(at.astype(int), max(old - 2, 0))
        part = (at - first)[:, None]
        whole = whole[first] * (1 - part) + whole[np.minimum(first + 1, old - 1)] * part
    return whole.astype(np.float32)
