"""Class names and colours, and a photograph with its segments laid over it."""

import colorsys
from collections.abc import Sequence
from functools import cache
from importlib import resources
from pathlib import Path

import numpy as np
from jaxtyping import UInt8
from PIL import Image, ImageDraw, ImageFont

from vmamba_jax.segmentation.inference import Labels

_OPACITY = 0.55
_GOLDEN_RATIO = 0.618033988749895  # multiples of it, less whole turns, are spread evenly
_ROW, _LEGEND_WIDTH, _LONGEST_NAME = 24, 260, 22


@cache
def _ade20k() -> list[tuple[str, str]]:
    text = resources.files("vmamba_jax").joinpath("ade20k_classes.txt").read_text("utf-8")
    rows = (line.split("\t") for line in text.splitlines() if not line.startswith("#"))
    return [(name, colour) for colour, name in rows]


def ade20k_classes() -> tuple[str, ...]:
    """Names of ADE20K's 150 classes in the order of the published heads."""
    return tuple(name for name, _ in _ade20k())


def palette(num_classes: int) -> UInt8[np.ndarray, "classes 3"]:
    """A colour for each class: ADE20K's own for its 150, hues spread evenly for others.

    Args:
        num_classes: classes of a pixel.

    Returns:
        uint8 RGB.
    """
    if num_classes == len(_ade20k()):
        return np.array([list(bytes.fromhex(colour)) for _, colour in _ade20k()], np.uint8)
    turns = np.arange(num_classes) * _GOLDEN_RATIO % 1
    rgb = np.array([colorsys.hsv_to_rgb(turn, 0.75, 0.9) for turn in turns])
    return np.rint(255 * rgb).astype(np.uint8)


def shares(labels: Labels) -> list[tuple[int, float]]:
    """The classes in a label map with their shares of its pixels, the largest first."""
    counts = np.bincount(labels.ravel())
    present = np.flatnonzero(counts)
    order = present[np.argsort(-counts[present], kind="stable")]
    return [(int(label), float(counts[label] / labels.size)) for label in order]


def overlay(
    image: Image.Image, labels: Labels, class_names: Sequence[str], path: Path, most: int = 12
) -> None:
    """Saves the photograph with each pixel tinted in its class's colour, and a legend beside it.

    Args:
        image: RGB photograph.
        labels: of its size.
        class_names: in the order of the labels.
        path: where to; the suffix decides the format.
        most: classes in the legend, the largest of those that are there.

    Raises:
        ValueError: for a suffix that Pillow can't write.
        OSError: if the picture can't be written.
    """
    colours = palette(len(class_names))
    tinted = np.asarray(image, np.float32)
    tinted = tinted + _OPACITY * (colours[labels].astype(np.float32) - tinted)
    found = shares(labels)[:most]
    height = max(image.height, _ROW * (len(found) + 1))
    picture = Image.new("RGB", (image.width + _LEGEND_WIDTH, height), "white")
    picture.paste(Image.fromarray(np.rint(tinted).astype(np.uint8)))
    canvas, font = ImageDraw.Draw(picture), ImageFont.load_default(size=14)
    left = image.width + 12
    for row, (label, share) in enumerate(found):
        top = 12 + row * _ROW
        fill = (int(colours[label, 0]), int(colours[label, 1]), int(colours[label, 2]))
        canvas.rectangle((left, top, left + 16, top + 16), fill=fill)
        name = class_names[label].split(",")[0][:_LONGEST_NAME]
        canvas.text((left + 24, top), f"{name}  {share:.1%}", fill="black", font=font)
    picture.save(path)


def write_labels(labels: Labels, path: Path) -> None:
    """Saves a label map as a grey PNG of class indices, 8 bits or, above 256 classes, 16.

    Raises:
        OSError: if it can't be written.
    """
    kind = np.uint8 if labels.max() < 256 else np.uint16
    Image.fromarray(labels.astype(kind)).save(path, format="PNG")
