"""Draws what a detector found over the picture."""

import colorsys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from vmamba_jax.data.decode import decode_rgb
from vmamba_jax.detection.detect import Found

_OPACITY = 0.45
_GOLDEN_RATIO = 0.618033988749895  # multiples of it, less whole turns, are spread evenly


def draw(found: Found, class_names: Sequence[str], path: Path) -> None:
    """Saves the picture with the mask, box, name and score of each object, the likeliest on top.

    Args:
        found: of `detect`; its image is read again.
        class_names: in the order of the labels.
        path: where to; the suffix decides the format.

    Raises:
        ValueError: for a suffix that Pillow can't write.
        OSError: if the picture can't be written.
    """
    picture = np.array(decode_rgb(found.path, str(found.path)), np.float32)
    worst_first = found.instances[::-1]
    for instance in worst_first:
        mask = instance.mask(found.size)
        colour = np.array(_colour(instance.label), np.float32)
        picture[mask] += _OPACITY * (colour - picture[mask])
    image = Image.fromarray(np.rint(picture).astype(np.uint8))
    canvas = ImageDraw.Draw(image)
    unit = max(1, round(max(found.size) / 500))
    font = ImageFont.load_default(size=11 * unit)
    for instance in worst_first:
        colour = _colour(instance.label)
        canvas.rectangle(instance.box.tolist(), outline=colour, width=unit)
        text = f"{class_names[instance.label]} {instance.score:.2f}"
        room = image.width - canvas.textlength(text, font)
        corner = max(0, min(instance.box[0] + unit, room)), max(0, instance.box[1] - 14 * unit)
        canvas.rectangle(canvas.textbbox(corner, text, font), fill=colour)
        canvas.text(corner, text, "white", font)
    image.save(path)


def _colour(label: int) -> tuple[int, int, int]:
    red, green, blue = colorsys.hsv_to_rgb(label * _GOLDEN_RATIO % 1, 0.8, 0.75)
    return round(255 * red), round(255 * green), round(255 * blue)
