"""Intersection over union of predicted and true label maps, from one confusion matrix."""

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer

from vmamba_jax.data.decode import IGNORED


def confusion_matrix(
    labels: Integer[Array, "B H W"], predictions: Integer[Array, "B H W"], num_classes: int
) -> Int[Array, "num_classes num_classes"]:
    """Counts pixels by true class (rows) and predicted class (columns), on the device.

    Args:
        labels: true classes; 255 is not counted.
        predictions: predicted classes.
        num_classes: how many there are.

    Returns:
        int32 counts.
    """
    labels, predictions = labels.astype(jnp.int32), predictions.astype(jnp.int32)
    cell = jnp.where(labels == IGNORED, num_classes**2, labels * num_classes + predictions)
    counts = jnp.bincount(cell.ravel(), length=num_classes**2 + 1)[:-1]
    return counts.reshape(num_classes, num_classes).astype(jnp.int32)


class SegmentationEvaluation(NamedTuple):
    """Results over a whole held-out set; ratios are NaN for a class that never occurs.

    Attributes:
        iou: (classes,) intersection of prediction and truth over their union, in pixels.
        recall: (classes,) share of a class's pixels that is found.
        pixel_accuracy: share of all pixels that is right (aAcc).
        images: how many images were counted.
    """

    iou: np.ndarray
    recall: np.ndarray
    pixel_accuracy: float
    images: int

    @classmethod
    def of(cls, confusion: np.ndarray, images: int) -> "SegmentationEvaluation":
        """Results from a confusion matrix, true classes in rows.

        Raises:
            ValueError: if no pixel was counted.
        """
        if not confusion.sum():
            raise ValueError("the held-out split has no readable pixel of any class")
        hits = np.diag(confusion).astype(float)
        truth, found = confusion.sum(axis=1), confusion.sum(axis=0)
        with np.errstate(invalid="ignore"):
            return cls(
                iou=hits / (truth + found - hits),
                recall=hits / truth,
                pixel_accuracy=float(hits.sum() / confusion.sum()),
                images=images,
            )

    @property
    def mean_iou(self) -> float:
        """Mean over the classes that occur, in truth or prediction (mIoU)."""
        return float(np.nanmean(self.iou))

    @property
    def mean_recall(self) -> float:
        """Mean over the classes that occur in truth (mAcc)."""
        return float(np.nanmean(self.recall))
