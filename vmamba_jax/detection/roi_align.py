"""RoIAlign over the levels of a pyramid, exact, as small matrix products.

Bilinear sampling and the mean over a bin's samples are linear, and each is a product of one factor
for the rows and one for the columns: with ``rows`` and ``columns`` the mean weights of a region's
bins, its features are ``rows @ map @ columns.T``. Only the positions under the region have weight,
so the map is taken in tiles, as many as the region needs, however long it is. All levels lie side
by side in one map, like the levels of a mipmap, so that a region is sliced from any of them alike.

RoIAlign is of Mask R-CNN (https://arxiv.org/abs/1703.06870), its levels of FPN
(https://arxiv.org/abs/1612.03144, equation 1).
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vmamba_jax.detection.boxes import box_area
from vmamba_jax.typing import Array, FeatureMap, Float, Int

_TILE = 16  # positions along either axis
_SAMPLES = 4  # of a bin along one axis, at a time
_TOGETHER = 64  # regions, on an accelerator
_EXACT = jax.lax.Precision.HIGHEST  # samples are interpolated, and features must not be rounded


def roi_level(boxes: Float[Array, "*n 4"], levels: int) -> Int[Array, "*n"]:
    """The level that a region is taken from: the larger, the coarser.

    Args:
        boxes: corners, in pixels.
        levels: of the pyramid; the first takes regions of a side up to 112 pixels, each next one
            twice as large ones, the last all larger ones.
    """
    side = jnp.sqrt(box_area(boxes))
    level = jnp.floor(jnp.log2(side / 56 + 1e-6))
    return jnp.clip(level, 0, levels - 1).astype(jnp.int32)


def roi_align(
    maps: Sequence[Array],
    boxes: Float[Array, "B n 4"],
    *,
    strides: Sequence[int],
    output_size: int,
) -> Float[Array, "B n size size C"]:
    """The features of regions, each from its level, in bins of equal number.

    A bin is the mean of a grid of bilinear samples, one a position or denser. A sample more than
    one position outside the map is 0, and so is a region without width or height.

    Args:
        maps: levels of the pyramid (B, H, W, C), the finest first.
        boxes: regions as corners, in pixels of the picture; they may leave it.
        strides: pixels a position, of each level.
        output_size: bins along either axis.

    Returns:
        One small map a region, of the dtype of `maps`.
    """
    level = roi_level(boxes, len(maps))
    scale = 1 / jnp.asarray(strides, boxes.dtype)[level]
    atlas, corners = _atlas(maps)
    sizes = jnp.asarray([level.shape[1:3] for level in maps], jnp.int32)
    image = jnp.broadcast_to(jnp.arange(len(boxes), dtype=jnp.int32)[:, None], level.shape)

    def align(region: tuple[Array, ...]) -> Array:
        image, level, box = region
        rows = _Bins(box[1], box[3], sizes[level, 0], output_size)
        columns = _Bins(box[0], box[2], sizes[level, 1], output_size)

        def add_tile(i: Array, total: Array) -> Array:
            down, across = i // columns.tiles, i % columns.tiles
            y, x = rows.first + down * _TILE, columns.first + across * _TILE
            start = (image, corners[level, 0] + y, corners[level, 1] + x, jnp.zeros_like(image))
            tile = jax.lax.dynamic_slice(atlas, start, (1, _TILE, _TILE, atlas.shape[-1]))[0]
            tile = tile.astype(total.dtype)
            narrow = jnp.tensordot(rows.weights(y), tile, axes=1, precision=_EXACT)
            return total + jnp.einsum("qx,pxc->pqc", columns.weights(x), narrow, precision=_EXACT)

        zeros = jnp.zeros((output_size, output_size, atlas.shape[-1]), box.dtype)
        return jax.lax.fori_loop(0, rows.tiles * columns.tiles, add_tile, zeros)

    regions = (image, level, boxes * scale[..., None] - 0.5)
    regions = jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), regions)
    bins = jax.lax.platform_dependent(
        regions,
        cpu=partial(jax.lax.map, align),
        default=partial(jax.lax.map, align, batch_size=_TOGETHER),
    )
    return bins.reshape(*level.shape, *bins.shape[1:]).astype(maps[0].dtype)


class _Bins:
    """The bins of one region along one axis.

    Attributes:
        first: position under the first sample.
        tiles: how many tiles of the map reach from there to the last one.
    """

    def __init__(self, start: Array, end: Array, length: Array, bins: int):
        self._start, self._length, self._bins = start, length, bins
        self._size = (end - start) / bins
        self._samples = jnp.ceil(self._size).astype(jnp.int32)
        last = (length - 1).astype(start.dtype)
        self.first = jnp.floor(jnp.clip(start, 0, last)).astype(jnp.int32)
        positions = jnp.floor(jnp.clip(end, 0, last)).astype(jnp.int32) + 2 - self.first
        self.tiles = jnp.where(self._samples > 0, -(-positions // _TILE), 0)

    def weights(self, first: Array) -> Float[Array, "bins tile"]:
        """Of each position of the tile that starts at `first`, in the mean of each bin."""
        position = first + jnp.arange(_TILE, dtype=jnp.int32)
        position = jnp.where(position < self._length, position, -9).astype(self._start.dtype)
        length = self._length.astype(self._start.dtype)
        samples = jnp.maximum(self._samples, 1).astype(self._start.dtype)
        bin_start = self._start + jnp.arange(self._bins, dtype=self._start.dtype) * self._size

        def add_samples(i: Array, total: Array) -> Array:
            sample = i * _SAMPLES + jnp.arange(_SAMPLES, dtype=jnp.int32)
            offset = (sample.astype(total.dtype) + 0.5) * self._size / samples
            at = bin_start[:, None] + offset[None]
            inside = (sample < self._samples)[None] & (at >= -1) & (at <= length)
            at = jnp.clip(at, 0, length - 1)
            weight = jnp.maximum(1 - jnp.abs(at[..., None] - position[None, None]), 0)
            return total + jnp.where(inside[..., None], weight, 0).sum(axis=1)

        zeros = jnp.zeros((self._bins, _TILE), self._start.dtype)
        steps = -(-self._samples // _SAMPLES)
        return jax.lax.fori_loop(0, steps, add_samples, zeros) / samples


def _atlas(maps: Sequence[Array]) -> tuple[FeatureMap, Int[Array, "levels 2"]]:
    """All levels in one map, and the row and column where each begins.

    The first is at the left, the others right of it, one below the other.
    """
    (first, *rest), below = maps, 0
    corners = [(0, 0)]
    for level in rest:
        corners.append((below, first.shape[2]))
        below += level.shape[1]
    # A tile's width more at the ends: a slice is never moved to fit.
    height = max(first.shape[1], below) + _TILE
    width = first.shape[2] + max((level.shape[2] for level in rest), default=0) + _TILE
    atlas = jnp.zeros((len(first), height, width, first.shape[3]), first.dtype)
    for level, corner in zip(maps, corners, strict=True):
        atlas = jax.lax.dynamic_update_slice(atlas, level, (0, *corner, 0))
    return atlas, jnp.asarray(np.array(corners, np.int32))
