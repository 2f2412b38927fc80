"""RoIAlign against its definition, one sample after another."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmamba_jax.detection.roi_align import roi_align, roi_level

STRIDES = (4, 8, 16, 32)


def bilinear(level, y, x):
    """The map at one point: 0 more than one position outside, else cut to it."""
    height, width = level.shape[:2]
    if not (-1 <= y <= height and -1 <= x <= width):
        return np.zeros(level.shape[2])
    y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
    upper = level[top, left] * (1 - (x - left)) + level[top, right] * (x - left)
    lower = level[bottom, left] * (1 - (x - left)) + level[bottom, right] * (x - left)
    return upper * (1 - (y - top)) + lower * (y - top)


def directly(maps, box, output_size):
    """One region's bins, by four loops in double precision."""
    x1, y1, x2, y2 = (float(v) for v in box)
    level = math.floor(math.log2(math.sqrt((x2 - x1) * (y2 - y1)) / 56 + 1e-6))
    level = min(max(level, 0), len(maps) - 1)
    x1, y1, x2, y2 = (v / STRIDES[level] - 0.5 for v in (x1, y1, x2, y2))
    height, width = (y2 - y1) / output_size, (x2 - x1) / output_size
    down, across = math.ceil(height), math.ceil(width)
    bins = np.zeros((output_size, output_size, maps[0].shape[-1]))
    for p in range(output_size):
        for q in range(output_size):
            for i in range(down):
                for j in range(across):
                    y = y1 + p * height + (i + 0.5) * height / down
                    x = x1 + q * width + (j + 0.5) * width / across
                    bins[p, q] += bilinear(maps[level], y, x)
    return bins / max(down * across, 1)


def pyramid(rng, batch, height, width, channels=3):
    """Maps of a picture, each of half the size of the one before, rounded up."""
    shapes = [(-(-height // s), -(-width // s)) for s in STRIDES]
    return [rng.standard_normal((batch, *shape, channels), np.float32) for shape in shapes]


def random_boxes(rng, count, height, width):
    centre = rng.uniform(0, [width, height], (count, 2))
    size = np.exp(rng.uniform(np.log(2), np.log(2 * max(height, width)), (count, 2)))
    return np.concatenate([centre - size / 2, centre + size / 2], axis=1).astype(np.float32)


DEGENERATE = np.array(
    [
        [10, 20, 10, 60],  # no width
        [10, 20, 60, 20],  # no height
        [30, 30, 30, 30],
        [0, 0, 0, 0],
        [-500, -400, -300, -200],  # outside
        [900, 900, 990, 999],
        [-300, -300, 700, 700],  # all of it and more
        [0, 50, 1100, 53],  # long: many tiles and samples along one axis
        [70, -20, 74, 600],
        [0, 0, 320, 200],
        [319, 199, 320, 200],
    ],
    np.float32,
)


@pytest.mark.parametrize("output_size", [7, 14])
def test_regions_of_all_sizes_inside_and_outside(output_size):
    rng = np.random.default_rng(output_size)
    maps = pyramid(rng, 2, 200, 320)
    boxes = np.stack([np.concatenate([DEGENERATE, random_boxes(rng, 29, 200, 320)])] * 2)
    boxes[1] = boxes[1, ::-1]
    align = jax.jit(partial(roi_align, strides=STRIDES, output_size=output_size))
    bins = align(maps, jnp.asarray(boxes))
    levels = set()
    for image in range(2):
        alone = [level[image] for level in maps]
        for box, actual in zip(boxes[image], bins[image], strict=True):
            expected = directly(alone, box, output_size)
            np.testing.assert_allclose(actual, expected, atol=2e-4, err_msg=str(box))
            levels.add(int(roi_level(jnp.asarray(box), 4)))
    assert levels == {0, 1, 2, 3}
    assert not np.any(bins[0, :6])


def test_maps_of_odd_sizes_smaller_than_a_tile():
    rng = np.random.default_rng(0)
    maps = pyramid(rng, 1, 37, 21)
    boxes = random_boxes(rng, 16, 37, 21)
    align = jax.jit(partial(roi_align, strides=STRIDES, output_size=7))
    for box, actual in zip(boxes, align(maps, jnp.asarray(boxes[None]))[0], strict=True):
        expected = directly([level[0] for level in maps], box, 7)
        np.testing.assert_allclose(actual, expected, atol=2e-5, err_msg=str(box))
