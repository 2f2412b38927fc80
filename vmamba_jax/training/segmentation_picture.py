"""The picture of a segmenter's run: its curves, and photographs with labels and predictions."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from vmamba_jax.data.augment import IMAGENET_MEAN, IMAGENET_STD
from vmamba_jax.data.decode import IGNORED


def draw_segmentation(
    path: Path,
    rows: Sequence[dict[str, Any]],
    shown: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]],
    class_names: Sequence[str],
) -> None:
    """Writes a PNG with loss and mIoU curves over held-out photographs, labels and predictions.

    Args:
        path: the file to write.
        rows: of the metrics file.
        shown: for each photograph, itself, (h, w, 3) float32, normalised as the pipeline does, and
            its true and predicted classes, (H, W).
        class_names: names of the classes.

    Raises:
        ImportError: if matplotlib is missing.
    """
    import matplotlib  # noqa: PLC0415 (of the demo extra)
    from matplotlib.figure import Figure  # noqa: PLC0415
    from matplotlib.patches import Patch  # noqa: PLC0415

    count = len(class_names)
    palette = np.ones((256, 3))  # what belongs to no class is white
    if count <= 10:
        palette[:count] = matplotlib.colormaps["tab10"](np.arange(count))[:, :3]
    else:
        palette[:count] = matplotlib.colormaps["gist_ncar"](np.arange(count) / count)[:, :3]

    columns = max(len(shown), 1)
    figure = Figure(figsize=(12, 8.5), layout="constrained")
    parts: Any = figure.subfigures(2, 1, height_ratios=[3.5, 5])
    top, bottom = parts
    loss_axes, iou_axes = top.subplots(1, 2)
    training = [row for row in rows if "loss" in row]
    held_out = [row for row in rows if "mean_iou" in row]
    loss_axes.plot([row["step"] for row in training], [row["loss"] for row in training])
    loss_axes.set(xlabel="update", ylabel="training loss (nats)", yscale="log")
    iou_axes.plot(
        [row["step"] for row in held_out], [100 * row["mean_iou"] for row in held_out], marker="."
    )
    iou_axes.set(xlabel="update", ylabel="held-out mIoU (%)")
    if held_out:
        iou_axes.set_title(f"last: {100 * held_out[-1]['mean_iou']:.2f}%")

    cells = bottom.subplots(3, columns, squeeze=False)
    for cell in cells.ravel():
        cell.set_axis_off()
    present = set()
    for column, (photograph, labels, predictions) in enumerate(shown):
        pixels = np.clip(photograph * np.array(IMAGENET_STD) + np.array(IMAGENET_MEAN), 0, 1)
        for cell, picture in zip(
            cells[:, column], (pixels, palette[labels], palette[predictions]), strict=True
        ):
            cell.imshow(picture, interpolation="nearest")
        present |= set(np.unique(labels)) | set(np.unique(predictions))
    if shown:
        for cell, title in zip(cells[:, 0], ("photograph", "label", "prediction"), strict=True):
            cell.set_title(title, loc="left", fontsize=9)
    names = {**dict(enumerate(class_names)), IGNORED: "none"}
    patches = [
        Patch(facecolor=tuple(palette[i]), edgecolor="gray", label=names[i])
        for i in sorted(present)
    ]
    if patches:
        bottom.legend(handles=patches[:24], loc="outside lower center", ncols=8, fontsize=9)
    figure.savefig(path, dpi=100)
