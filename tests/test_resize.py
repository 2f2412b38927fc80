"""Resizing against what OpenCV 5.0 made of the same pixels."""

from pathlib import Path

import numpy as np
import pytest

from vmamba_jax.data.resize import resize_bilinear

MADE = np.load(Path(__file__).parent / "data" / "opencv_bilinear.npz")


# Enlarged, shrunk, to the half, a single column, unchanged.
@pytest.mark.parametrize("i", range(5))
def test_every_pixel_is_opencvs(i):
    expected = MADE[f"resized{i}"]
    height, width = expected.shape[:2]
    actual = resize_bilinear(MADE[f"image{i}"], height, width)
    np.testing.assert_array_equal(actual, expected)
