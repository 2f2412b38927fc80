"""Resizing against what OpenCV 5.0 made of the same pixels."""

from pathlib import Path

import numpy as np
import pytest

from vmamba_jax.data.resize import fitted_size, resize_bilinear, resize_nearest

MADE = np.load(Path(__file__).parent / "data" / "opencv_bilinear.npz")


# Enlarged, shrunk, to the half, a single column, unchanged.
@pytest.mark.parametrize("i", range(5))
def test_every_pixel_is_opencvs(i):
    expected = MADE[f"resized{i}"]
    height, width = expected.shape[:2]
    actual = resize_bilinear(MADE[f"image{i}"], height, width)
    np.testing.assert_array_equal(actual, expected)


def test_a_part_of_the_result_is_that_part_of_the_whole():
    image = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    for height, width in (9, 7), (20, 30), (4, 5):
        whole = resize_bilinear(image, height, width)
        part = resize_bilinear(image, height, width, slice(1, 3), slice(2, 4))
        np.testing.assert_array_equal(part, whole[1:3, 2:4])


def test_labels_are_resized_to_the_nearest():
    label = np.array([[1, 2], [3, 255]], np.uint8)
    doubled = np.repeat(np.repeat(label, 2, 0), 2, 1)
    np.testing.assert_array_equal(resize_nearest(label, 4, 4), doubled)
    part = resize_nearest(label, 4, 4, slice(1, 3), slice(1, 4))
    np.testing.assert_array_equal(part, doubled[1:3, 1:4])


def test_the_resized_size_is_the_published_one():
    assert fitted_size(512, 683, (2048, 512)) == (512, 683)
    assert fitted_size(256, 1536, (2048, 512)) == (341, 2048)
    assert fitted_size(683, 511, (2048, 512)) == (684, 512)  # 683 * 512 / 511 + 0.5
    assert fitted_size(2, 3000, (128, 64)) == (1, 128)
    assert fitted_size(3000, 2, (128, 64)) == (128, 1)
