"""Mean IoU against a direct count."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vmamba_jax.training.mean_iou import SegmentationEvaluation, confusion_matrix

CLASSES = 5


def test_the_ratios_are_those_of_a_direct_count() -> None:
    rng = np.random.default_rng(0)
    labels = rng.choice([0, 1, 2, 3, 255], (4, 9, 7)).astype(np.uint8)
    # Class 2 is never predicted, class 3 never right, class 4 in neither.
    predictions = np.where(rng.random(labels.shape) < 0.6, labels, rng.integers(0, 2, labels.shape))
    predictions = np.where((labels >= 2) & (labels != 3), 0, predictions)
    predictions = np.where(labels == 3, 1, predictions)
    predictions[0, 0, :2] = 3
    labels[0, 0, :2] = 0

    count = jax.jit(confusion_matrix, static_argnums=2)
    matrix = np.asarray(count(jnp.asarray(labels), jnp.asarray(predictions, jnp.int32), CLASSES))
    result = SegmentationEvaluation.of(matrix, 4, list("abcde"))
    seen = labels != 255
    for c in range(CLASSES):
        truth, found = (labels == c) & seen, (predictions == c) & seen
        both, either = np.sum(truth & found), np.sum(truth | found)
        assert either == 0 if np.isnan(result.iou[c]) else result.iou[c] == both / either
        assert np.isnan(result.accuracy[c]) or result.accuracy[c] == both / truth.sum()
    np.testing.assert_array_equal(np.isnan(result.iou), [False] * 4 + [True])
    assert result.iou[2] == result.iou[3] == 0
    assert 0 < result.iou[0] < 1
    assert result.mean_iou == np.mean(result.iou[:4])
    assert result.mean_accuracy == np.mean(result.accuracy[:4])
    assert result.pixel_accuracy == np.mean((labels == predictions)[seen])


def test_counts_add_up_over_batches() -> None:
    rng = np.random.default_rng(1)
    labels, predictions = (jnp.asarray(rng.integers(0, 3, (6, 4, 4)), jnp.int32) for _ in range(2))
    whole = confusion_matrix(labels, predictions, 3)
    parts = [confusion_matrix(labels[i : i + 2], predictions[i : i + 2], 3) for i in (0, 2, 4)]
    np.testing.assert_array_equal(whole, parts[0] + parts[1] + parts[2])
    assert whole.sum() == labels.size


def test_a_split_without_a_counted_pixel_is_refused() -> None:
    with pytest.raises(ValueError, match="no readable pixel"):
        SegmentationEvaluation.of(np.zeros((3, 3), np.int64), 2, list("abc"))
