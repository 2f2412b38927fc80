"""The commands that run a detector: on pictures, and on a data set in COCO's layout."""

import dataclasses
import json
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Annotated

from rich.console import Console
from rich.markup import escape
from rich.progress import MofNCompleteColumn, Progress
from rich.table import Table
from tyro.conf import Positional, arg

from vmamba_jax.convert.source import Weights, read_weights, sha256
from vmamba_jax.convert.tasks import task_of
from vmamba_jax.detection.coco import (
    STATISTICS,
    Record,
    average_precisions,
    find_all,
    load_coco,
)
from vmamba_jax.detection.config import InferenceConfig, MaskRCNNConfig
from vmamba_jax.detection.detect import Found, as_json, coco_classes, detect
from vmamba_jax.detection.mask_rcnn import MaskRCNN
from vmamba_jax.detection.picture import draw
from vmamba_jax.detection.preprocess import LONG_SIDE, SHORT_SIDE
from vmamba_jax.errors import CheckpointError
from vmamba_jax.picture_path import picture_paths
from vmamba_jax.predict import find_images

_Images = Annotated[tuple[Path, ...], Positional, arg(metavar="IMAGE...")]
_Folder = Annotated[Path, Positional, arg(metavar="FOLDER")]

# In a file or a pipe there is no width to fit: nothing is cut.
_out = Console(width=None if sys.stdout.isatty() else 200)
_err = Console(stderr=True)


def detect_objects(
    images: _Images,
    *,
    checkpoint: Path,
    min_score: float = 0.3,
    long_side: int = LONG_SIDE,
    short_side: int = SHORT_SIDE,
    size_divisor: int = 32,
    json_: Annotated[bool, arg(name="json")] = False,
    save: Path | None = None,
) -> int:
    """Finds objects in images; ends with status 1 if one could not be read.

    Args:
        images: Image files, or folders of them.
        checkpoint: The detector's weights: a converted model, a .pth or a .safetensors file.
        min_score: Show objects at least this probable.
        long_side: Resize images to at most so many pixels on the longer side,
        short_side: and to at most so many on the shorter.
        size_divisor: Pad them to a multiple of so many pixels. The model compiles once for each
            padded size; 32 is what detectors are trained with.
        json_: Print JSON, the masks as COCO's run lengths, instead of a table.
        save: Draw the objects: into this picture, or for several images into this folder.
    """
    if not 0 <= min_score <= 1:
        raise ValueError("--min-score must be between 0 and 1")
    if min(long_side, short_side, size_divisor) < 1:
        raise ValueError("--long-side, --short-side and --size-divisor must be positive")
    paths = find_images(images)
    if not paths:
        raise ValueError("no images: give image files, or folders that hold some")
    pictures: list[Path] = []
    if save is not None:  # what can't be written is said before the work and not after it
        pictures = picture_paths("--save", save, paths)
    read, model, names, _ = _detector(checkpoint, InferenceConfig())
    find = partial(detect, long_side=long_side, short_side=short_side, size_divisor=size_divisor)
    results: list[Found] = []
    with _progress() as progress:
        task = progress.add_task("detecting", total=len(paths))
        for found in find(model, read.variables(), paths):
            likely = [instance for instance in found.instances if instance.score >= min_score]
            found = found._replace(instances=likely)  # noqa: PLW2901
            results.append(found)
            progress.advance(task)
            if pictures and found.error is None:
                target = pictures[len(results) - 1]
                target.parent.mkdir(parents=True, exist_ok=True)
                draw(found, names, target)
            if found.error is not None:
                _err.print(
                    f"[red]unreadable:[/red] {escape(f'{found.path}: {found.error}')}",
                    soft_wrap=True,
                )
    if json_:
        print(json.dumps([as_json(found, names) for found in results], indent=1))
    else:
        _print_objects(results, names)
    if save is not None and any(found.error is None for found in results):
        _err.print(f"picture: {escape(str(save))}", soft_wrap=True)
    return 1 if any(found.error is not None for found in results) else 0


def evaluate_coco(
    folder: _Folder,
    *,
    checkpoint: Path,
    split: str = "val2017",
    annotations: Path | None = None,
    record: Path | None = None,
    long_side: int = LONG_SIDE,
    short_side: int = SHORT_SIDE,
    size_divisor: int = 32,
) -> int:
    """Measures a detector's average precision on a data set in COCO's layout.

    Stopped, the same command goes on where it was.

    Args:
        folder: FOLDER/SPLIT holds the images, FOLDER/annotations/instances_SPLIT.json the truth.
        checkpoint: The detector's weights: a converted model, a .pth or a .safetensors file.
        split: The part of the data set.
        annotations: The file with the truth, if it is elsewhere.
        record: Where the detections are kept, a picture a line; by default
            CHECKPOINT.SPLIT.jsonl in the current folder.
        long_side: Resize images to at most so many pixels on the longer side,
        short_side: and to at most so many on the shorter.
        size_divisor: Pad them to a multiple of so many pixels. The model compiles once for each
            padded size; 32 is what detectors are trained with.
    """
    if min(long_side, short_side, size_divisor) < 1:
        raise ValueError("--long-side, --short-side and --size-divisor must be positive")
    inference = InferenceConfig()
    read, model, names, named = _detector(checkpoint, inference)
    truth = annotations or folder / "annotations" / f"instances_{split}.json"
    with _err.status(f"reading {escape(str(truth))}"):
        dataset = load_coco(truth, folder / split, names, named)
    sizes = {"long_side": long_side, "short_side": short_side, "size_divisor": size_divisor}
    about = {
        "checkpoint": read.provenance.get("sha256"),
        "annotations": sha256(truth),
        "inference": dataclasses.asdict(inference),
        **sizes,
    }
    record = record or Path(f"{checkpoint.stem}.{split}.jsonl")
    kept = Record(record, about)
    find = partial(detect, model, read.variables(), **sizes)
    with _progress() as progress:
        done = len(dataset.paths.keys() & kept.detections.keys())
        task = progress.add_task("detecting", total=len(dataset.paths), completed=done)
        detections = find_all(find, dataset, kept, lambda: progress.advance(task))
    with _err.status("comparing with the truth"):
        scores = average_precisions(dataset, detections)
    table = Table("", *STATISTICS, title=f"{escape(str(truth))}: {len(dataset.paths)} images")
    for name, values in scores.items():
        table.add_row(name, *(f"{100 * values[key]:.1f}" for key in STATISTICS))
    _out.print(table)
    _err.print(f"detections: {escape(str(record))}")
    return 0


def _detector(
    checkpoint: Path, inference: InferenceConfig
) -> tuple[Weights, MaskRCNN, list[str], bool]:
    """The weights, the detector, its classes' names, and whether these are more than numbers."""
    with _err.status(f"reading {escape(str(checkpoint))}"):
        read = read_weights(checkpoint)
    config = read.config
    if not isinstance(config, MaskRCNNConfig):
        task = task_of(config)
        raise CheckpointError(f"{checkpoint} holds {task.holds}: run it with `{task.command}`")
    names = read.class_names
    if names is None and config.num_classes == len(coco_classes()):
        names = list(coco_classes())
    numbers = [f"class {i}" for i in range(config.num_classes)]
    return read, MaskRCNN(config, inference), names or numbers, names is not None


def _progress() -> Progress:
    columns = (*Progress.get_default_columns(), MofNCompleteColumn())
    return Progress(*columns, console=_err, transient=True)


def _print_objects(results: Sequence[Found], names: Sequence[str]) -> None:
    table = Table("image", "object", "score", "x1", "y1", "x2", "y2", "pixels")
    for column in table.columns[2:]:
        column.justify = "right"
    for found in results:
        for i, instance in enumerate(found.instances):
            table.add_row(
                escape(str(found.path)) if i == 0 else "",
                escape(names[instance.label]),
                f"{instance.score:.2f}",
                *(f"{side:.1f}" for side in instance.box),
                str(int(instance.mask(found.size).sum())),
            )
        if found.error is None and not found.instances:
            table.add_row(escape(str(found.path)), "nothing found")
        table.add_section()
    if table.row_count:
        _out.print(table)
