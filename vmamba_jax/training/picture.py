"""The picture of a run: its curves, and held-out images with what the model makes of them."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np


def draw_run(
    path: Path,
    rows: Sequence[dict[str, Any]],
    images: np.ndarray,
    labels: np.ndarray,
    predictions: np.ndarray,
    class_names: Sequence[str],
) -> None:
    """Writes a PNG with loss and accuracy curves over a grid of held-out images.

    Args:
        path: the file to write.
        rows: of the metrics file.
        images: (M, H, W, C), bytes or float32 that runs from 0 to 1.
        labels: (M,) true classes.
        predictions: (M,) predicted classes.
        class_names: names of the classes.

    Raises:
        ImportError: if matplotlib is missing.
    """
    import matplotlib  # noqa: PLC0415 (of the demo extra)
    from matplotlib.figure import Figure  # noqa: PLC0415

    del matplotlib
    columns = 12
    grid_rows = -(-len(images) // columns)
    figure = Figure(figsize=(12, 4 + 1.15 * grid_rows), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[4, 1.15 * grid_rows])
    top, bottom = parts

    loss_axes, accuracy_axes = top.subplots(1, 2)
    training = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "accuracy" in row]
    loss_axes.plot(
        [row["epoch"] for row in training], [row["loss"] for row in training], label="training"
    )
    loss_axes.plot(
        [row["epoch"] for row in held_out], [row["val_loss"] for row in held_out], label="held out"
    )
    loss_axes.set(xlabel="epoch", ylabel="cross-entropy (nats)", yscale="log")
    loss_axes.legend()
    accuracy_axes.plot(
        [row["epoch"] for row in held_out], [100 * row["accuracy"] for row in held_out], marker="."
    )
    accuracy_axes.set(xlabel="epoch", ylabel="held-out accuracy (%)")
    if held_out:
        accuracy_axes.set_title(f"last: {100 * held_out[-1]['accuracy']:.2f}%")

    pixels = images / 255 if images.dtype == np.uint8 else images
    if pixels.shape[-1] != 3:  # grey, by what all channels have in common
        pixels = np.repeat(pixels.mean(axis=-1, keepdims=True), 3, axis=-1)
    pixels = np.clip(pixels, 0, 1)
    cells = bottom.subplots(grid_rows, columns, squeeze=False).ravel()
    for cell in cells:
        cell.set_axis_off()
    for cell, image, label, prediction in zip(cells, pixels, labels, predictions, strict=False):
        right = label == prediction
        cell.imshow(image)
        title = (
            class_names[prediction]
            if right
            else (f"{class_names[prediction]} (is {class_names[label]})")
        )
        cell.set_title(title, fontsize=9, color="tab:green" if right else "tab:red")
    bottom.suptitle("held-out images and predictions; mistakes first")
    figure.savefig(path, dpi=100)
