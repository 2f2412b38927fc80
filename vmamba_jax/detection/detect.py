"""Finds objects in image files."""

from collections.abc import Iterator, Sequence
from functools import cache, partial
from importlib import resources
from pathlib import Path
from typing import Any, NamedTuple, cast

import jax
import numpy as np

from vmamba_jax.data.decode import decode_rgb
from vmamba_jax.data.errors import DamagedRecordError
from vmamba_jax.detection.mask_rcnn import Detections, MaskRCNN
from vmamba_jax.detection.paste import paste_mask, run_lengths
from vmamba_jax.detection.preprocess import LONG_SIDE, SHORT_SIDE, Prepared, prepare
from vmamba_jax.typing import Bool, Float, Variables

_MASK_THRESHOLD = 0.5


class Instance(NamedTuple):
    """One object in a picture.

    Attributes:
        label: index of its class.
        score: probability of the class.
        box: corners ``(x1, y1, x2, y2)``, in pixels of the picture as it was given.
        cells: probability of each cell of the box to be of the object.
    """

    label: int
    score: float
    box: Float[np.ndarray, "4"]
    cells: Float[np.ndarray, "h w"]

    def mask(self, size: tuple[int, int]) -> Bool[np.ndarray, "H W"]:
        """Which pixels of the picture, of that height and width, are of the object."""
        return paste_mask(self.cells, self.box, *size) >= _MASK_THRESHOLD


class Found(NamedTuple):
    """What came of one image.

    Attributes:
        path: the file.
        size: its height and width, in pixels; (0, 0) if it could not be read.
        instances: the objects in it, the likeliest first.
        error: why it could not be read, else None.
    """

    path: Path
    size: tuple[int, int]
    instances: list[Instance]
    error: str | None = None


def detect(
    model: MaskRCNN,
    variables: Variables,
    paths: Sequence[Path],
    *,
    long_side: int = LONG_SIDE,
    short_side: int = SHORT_SIDE,
    size_divisor: int = 32,
) -> Iterator[Found]:
    """Finds objects in image files, one after the other.

    Args:
        model: the detector.
        variables: its weights.
        paths: image files. One that can't be read gives a `Found` with an error.
        long_side: see `prepare`.
        short_side: see `prepare`.
        size_divisor: see `prepare`. The model compiles once for each size of a padded picture.

    Yields:
        One result a path, in order.
    """
    variables = jax.device_put(variables)
    for path in paths:
        try:
            picture = np.asarray(decode_rgb(path, str(path)))
        except DamagedRecordError as error:
            yield Found(path, (0, 0), [], error.reason)
            continue
        prepared = prepare(
            picture, long_side=long_side, short_side=short_side, size_divisor=size_divisor
        )
        sizes = np.array([prepared.size], np.int32)
        detections = _apply(model, variables, prepared.pixels[None], sizes)
        yield Found(path, prepared.original_size, instances_of(detections, 0, prepared))


@partial(jax.jit, static_argnums=0)
def _apply(
    model: MaskRCNN, variables: Variables, images: jax.Array, sizes: jax.Array
) -> Detections:
    return cast("Detections", model.apply(variables, images, sizes))


def instances_of(detections: Detections, image: int, prepared: Prepared) -> list[Instance]:
    """The objects in one image of a batch, in pixels of the picture before it was resized."""
    boxes, scores, labels, masks, found = (np.asarray(array[image]) for array in detections)
    height, width = (
        np.float32(new / old)
        for new, old in zip(prepared.size, prepared.original_size, strict=True)
    )
    boxes = boxes / np.array([width, height, width, height], np.float32)
    return [
        Instance(int(labels[i]), float(scores[i]), boxes[i], masks[i])
        for i in np.flatnonzero(found)
    ]


@cache
def coco_classes() -> tuple[str, ...]:
    """Names of COCO's 80 classes in the order of the released heads."""
    text = resources.files("vmamba_jax").joinpath("coco_classes.txt").read_text("utf-8")
    return tuple(line for line in text.splitlines() if not line.startswith("#"))


def as_json(found: Found, class_names: Sequence[str]) -> dict[str, Any]:
    """A result as JSON types; the masks as COCO's uncompressed run lengths."""
    if found.error is not None:
        return {"image": str(found.path), "error": found.error}
    instances = [
        {
            "label": instance.label,
            "name": class_names[instance.label],
            "score": instance.score,
            "box": instance.box.tolist(),
            "segmentation": {
                "size": list(found.size),
                "counts": run_lengths(instance.mask(found.size)),
            },
        }
        for instance in found.instances
    ]
    return {"image": str(found.path), "size": list(found.size), "instances": instances}
