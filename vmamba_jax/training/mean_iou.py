"""Intersection over union of predicted and true label maps, from one confusion matrix."""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Integer
from rich.markup import escape
from rich.table import Table

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
        accuracy: (classes,) share of a class's pixels that is found.
        pixel_accuracy: share of all pixels that is right (aAcc).
        images: how many images were counted.
        class_names: names of the classes.
    """

    iou: np.ndarray
    accuracy: np.ndarray
    pixel_accuracy: float
    images: int
    class_names: Sequence[str]

    @classmethod
    def of(
        cls, confusion: np.ndarray, images: int, class_names: Sequence[str]
    ) -> "SegmentationEvaluation":
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
                accuracy=hits / truth,
                pixel_accuracy=float(hits.sum() / confusion.sum()),
                images=images,
                class_names=class_names,
            )

    @property
    def mean_iou(self) -> float:
        """Mean over the classes that occur, in truth or prediction (mIoU)."""
        return float(np.nanmean(self.iou))

    @property
    def mean_accuracy(self) -> float:
        """Mean over the classes that occur in truth (mAcc)."""
        return float(np.nanmean(self.accuracy))

    def metrics(self) -> dict[str, float]:
        """What is kept of it beside the weights."""
        return {
            "mean_iou": self.mean_iou,
            "mean_accuracy": self.mean_accuracy,
            "pixel_accuracy": self.pixel_accuracy,
        }

    def summary(self) -> str:
        """The three ratios that are usually published."""
        return (
            f"held-out mIoU {100 * self.mean_iou:.2f}%, mAcc {100 * self.mean_accuracy:.2f}%, "
            f"aAcc {100 * self.pixel_accuracy:.2f}%"
        )

    def headline(self) -> str:
        """The mean IoU."""
        return f"held-out mIoU {100 * self.mean_iou:.2f}%"

    def details(self) -> Table:
        """IoU and accuracy of every class."""
        table = Table("class", "IoU (%)", "Acc (%)", title=f"{self.images} images")
        for column in table.columns[1:]:
            column.justify = "right"
        for name, iou, accuracy in zip(self.class_names, self.iou, self.accuracy, strict=True):
            table.add_row(escape(name), f"{100 * iou:.2f}", f"{100 * accuracy:.2f}")
        table.add_section()
        table.add_row("mean", f"{100 * self.mean_iou:.2f}", f"{100 * self.mean_accuracy:.2f}")
        table.add_row("all pixels", "", f"{100 * self.pixel_accuracy:.2f}")
        return table
