"""Suppression against the greedy loop as it is written in papers, one box after another."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmamba_jax.detection.boxes import box_iou
from vmamba_jax.detection.nms import nms


def greedy(boxes, scores, valid, groups, iou_threshold, max_outputs):
    """Indices of the kept boxes, by two loops over boxes."""

    def overlap(a, b):
        width = max(min(a[2], b[2]) - max(a[0], b[0]), 0)
        height = max(min(a[3], b[3]) - max(a[1], b[1]), 0)
        areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
        union = sum(areas) - width * height
        return width * height / union if union > 0 else 0

    kept = []
    for i in np.argsort(-scores, kind="stable"):
        rivals = [j for j in kept if groups[j] == groups[i]]
        if valid[i] and all(overlap(boxes[i], boxes[j]) <= iou_threshold for j in rivals):
            kept.append(int(i))
    return kept[:max_outputs]


def boxes_like_whole_pixels(rng, count, side=64):
    """Corners on whole pixels: no rounding anywhere, so that both ways overlap to the bit."""
    low = rng.integers(0, side, (count, 2))
    return np.concatenate([low, low + rng.integers(0, side // 2, (count, 2))], 1).astype(np.float32)


@partial(jax.jit, static_argnames=("iou_threshold", "max_outputs"))
def compiled(*arrays, iou_threshold, max_outputs):
    return nms(*arrays, iou_threshold=iou_threshold, max_outputs=max_outputs)


def kept_by_nms(*arrays, iou_threshold=0.5, max_outputs=64):
    arrays = [jnp.asarray(array) for array in arrays]
    indices, filled = compiled(*arrays, iou_threshold=iou_threshold, max_outputs=max_outputs)
    count = int(filled.sum())
    assert filled[:count].all()
    assert not np.any(indices[count:])
    return indices[:count].tolist()


# More boxes than two tiles hold, and thresholds that leave few and nearly all.
@pytest.mark.parametrize(("iou_threshold", "max_outputs"), [(0.1, 64), (0.5, 400), (0.9, 1200)])
def test_random_boxes_of_several_groups_are_suppressed_greedily(iou_threshold, max_outputs):
    rng = np.random.default_rng(0)
    count = 1100
    boxes = boxes_like_whole_pixels(rng, count)
    scores = rng.permutation(count).astype(np.float32) / count
    valid, groups = rng.random(count) < 0.8, rng.integers(0, 3, count, np.int32)
    arrays = (boxes, scores, valid, groups)
    expected = greedy(*arrays, iou_threshold, max_outputs)
    assert len(expected) > 20
    assert kept_by_nms(*arrays, iou_threshold=iou_threshold, max_outputs=max_outputs) == expected


def test_degenerate_boxes():
    rng = np.random.default_rng(1)
    boxes = boxes_like_whole_pixels(rng, 40)
    boxes[::3, 2] = boxes[::3, 0]  # no width
    boxes[::4, 3] = boxes[::4, 1]  # no height
    boxes[5:9] = boxes[5]  # all the same
    scores = np.full(40, 0.5, np.float32)  # the first of equal ones wins
    arrays = (boxes, scores, np.ones(40, bool), np.zeros(40, np.int32))
    assert kept_by_nms(*arrays) == greedy(*arrays, 0.5, 64)


def test_an_overlap_of_just_the_threshold_is_kept():
    boxes = np.array([[0, 0, 4, 4], [0, 0, 2, 4]], np.float32)
    arrays = (boxes, np.array([0.9, 0.8], np.float32), np.ones(2, bool), np.zeros(2, np.int32))
    assert kept_by_nms(*arrays, iou_threshold=0.5) == [0, 1]
    assert kept_by_nms(*arrays, iou_threshold=0.49) == [0]


def test_nothing_in_nothing_out():
    rng = np.random.default_rng(2)
    boxes, scores = boxes_like_whole_pixels(rng, 8), np.ones(8, np.float32)
    assert kept_by_nms(boxes, scores, np.zeros(8, bool), np.zeros(8, np.int32)) == []
    none = (boxes[:0], scores[:0], np.zeros(0, bool), np.zeros(0, np.int32))
    assert kept_by_nms(*none) == []


def test_several_pictures_at_once():
    rng = np.random.default_rng(3)
    boxes = np.stack([boxes_like_whole_pixels(rng, 50) for _ in range(3)])
    scores = rng.permuted(np.tile(np.linspace(0, 1, 50, dtype=np.float32), (3, 1)), axis=1)
    valid, groups = np.ones((3, 50), bool), np.zeros((3, 50), np.int32)
    valid[1] = False
    function = jax.jit(jax.vmap(partial(nms, iou_threshold=0.3, max_outputs=50)))
    indices, filled = function(*map(jnp.asarray, (boxes, scores, valid, groups)))
    for i in range(3):
        expected = greedy(boxes[i], scores[i], valid[i], groups[i], 0.3, 50)
        assert indices[i][filled[i]].tolist() == expected


def test_the_overlap_of_empty_boxes_is_zero():
    boxes = jnp.asarray([[1, 1, 1, 5], [0, 0, 2, 2]], jnp.float32)
    np.testing.assert_array_equal(box_iou(boxes, boxes), [[0, 0], [0, 1]])
