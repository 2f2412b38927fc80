"""Evaluates a detector on a data set in COCO's layout, by COCO's own program (pycocotools)."""

import contextlib
import io
import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple

import numpy as np

from vmamba_jax.data.errors import DataError
from vmamba_jax.detection.detect import Found, Instance

STATISTICS = ("AP", "AP50", "AP75", "APs", "APm", "APl")
"""COCO's average precisions: over overlaps of 0.5 to 0.95, at 0.5, at 0.75; of small, medium and
large objects."""

_NEEDED = {"area", "bbox", "category_id", "image_id", "iscrowd", "segmentation"}


class CocoDataset(NamedTuple):
    """Pictures and their annotations.

    Attributes:
        annotations: a `pycocotools.coco.COCO`.
        paths: picture files by their numbers.
        categories: COCO's number of each class of the detector, in the order of its labels.
    """

    annotations: Any
    paths: dict[int, Path]
    categories: list[int]


def load_coco(
    annotations: Path, images: Path, class_names: Sequence[str], named: bool
) -> CocoDataset:
    """Reads an annotation file, and finds its pictures and the detector's classes in it.

    Args:
        annotations: such as ``annotations/instances_val2017.json``.
        images: the folder of the pictures.
        class_names: of the detector, in the order of its labels.
        named: whether these are names, by which categories are found; else, only numbers, and the
            categories are taken in the order of theirs.

    Raises:
        DataError: pycocotools is missing, the file is no such file, a picture is missing, or the
            categories are others than the detector's classes.
    """
    coco = _pycocotools("coco")
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            data = coco.COCO(str(annotations))
        files = {int(image["id"]): str(image["file_name"]) for image in data.imgs.values()}
        ids = {str(category["name"]): int(category["id"]) for category in data.cats.values()}
    except OSError as error:
        raise DataError(f"{annotations}: can't be read: {error.strerror}") from error
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise DataError(
            f"{annotations}: no annotations in COCO's format ({type(error).__name__}: {error})"
        ) from error
    if not files or not data.anns:
        raise DataError(f"{annotations}: it lists no pictures or no objects")
    if any(_NEEDED - annotation.keys() for annotation in data.anns.values()):
        raise DataError(f"{annotations}: an object lacks one of {', '.join(sorted(_NEEDED))}")
    for name in files.values():
        # The file is a stranger's: it must not name files elsewhere.
        inside = not PurePosixPath(name).is_absolute() and ".." not in PurePosixPath(name).parts
        if not inside or not (images / name).is_file():
            raise DataError(f"{annotations}: its picture {name!r} is not in {images}")
    if named and (missing := [name for name in class_names if name not in ids]):
        raise DataError(
            f"{annotations}: it has no category {missing[0]!r}, one of the detector's classes "
            f"({len(missing)} of {len(class_names)} are missing)"
        )
    if not named and len(ids) != len(class_names):
        raise DataError(
            f"{annotations}: it has {len(ids)} categories, and the detector {len(class_names)} "
            "classes without names"
        )
    categories = [ids[name] for name in class_names] if named else sorted(ids.values())
    paths = {number: images / name for number, name in sorted(files.items())}
    return CocoDataset(data, paths, categories)


class Record:
    """Detections on disk, a picture a line, so that an evaluation goes on where it stopped.

    Args:
        path: the file; made if it is not there.
        about: what the detections depend on, as JSON types; the file's first line.

    Raises:
        DataError: the file is of other detections, or of something else.
    """

    def __init__(self, path: Path, about: Mapping[str, Any]):
        self._path = path
        self.detections: dict[int, list[dict[str, Any]]] = {}
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(about) + "\n")
            return
        complete, newline, _ = path.read_text().rpartition("\n")
        first, *lines = complete.split("\n")
        try:
            matches = json.loads(first) == json.loads(json.dumps(about))
            entries = [json.loads(line) for line in lines]
            self.detections = {int(entry["image"]): entry["detections"] for entry in entries}
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"{path}: no record of detections; choose another file") from error
        if not matches:
            raise DataError(
                f"{path}: detections of another checkpoint, data set or setting; choose another "
                "file or delete it"
            )
        path.write_text(complete + newline)  # less a line that was cut off

    def add(self, image: int, detections: list[dict[str, Any]]) -> None:
        """Keeps the detections in one picture."""
        self.detections[image] = detections
        with self._path.open("a") as file:
            file.write(json.dumps({"image": image, "detections": detections}) + "\n")


def find_all(
    find: Callable[[Sequence[Path]], Iterable[Found]],
    dataset: CocoDataset,
    record: Record,
    progress: Callable[[], None],
) -> list[dict[str, Any]]:
    """Detects in every picture that is not in the record yet.

    Args:
        find: finds the objects in files, in order.
        dataset: the pictures.
        record: keeps each result as soon as it is there.
        progress: called after each picture.

    Returns:
        All detections as COCO's results.

    Raises:
        DataError: a picture can't be read.
    """
    left = [number for number in dataset.paths if number not in record.detections]
    for number, found in zip(left, find([dataset.paths[n] for n in left]), strict=True):
        if found.error is not None:
            raise DataError(f"{found.path}: {found.error}")
        instances = found.instances
        record.add(
            number, [_as_result(i, found.size, number, dataset.categories) for i in instances]
        )
        progress()
    return [result for number in dataset.paths for result in record.detections[number]]


def _as_result(
    instance: Instance, size: tuple[int, int], image: int, categories: Sequence[int]
) -> dict[str, Any]:
    mask = np.asfortranarray(instance.mask(size).astype(np.uint8))
    rle = _pycocotools("mask").encode(mask)
    x1, y1, x2, y2 = map(float, instance.box)
    return {
        "image_id": image,
        "category_id": categories[instance.label],
        "score": instance.score,
        "bbox": [x1, y1, x2 - x1, y2 - y1],
        "segmentation": {"size": rle["size"], "counts": rle["counts"].decode("ascii")},
    }


def average_precisions(
    dataset: CocoDataset, detections: Sequence[Mapping[str, Any]]
) -> dict[str, dict[str, float]]:
    """COCO's average precisions of boxes and of masks.

    Args:
        dataset: pictures and the truth about them.
        detections: COCO's results, with ``bbox`` and ``segmentation``.

    Returns:
        ``{"box": ..., "mask": ...}``, each with the `STATISTICS`; -1 where there is no object of
        that size.
    """
    truth = dataset.annotations
    scores = {}
    for name, kind in (("box", "bbox"), ("mask", "segm")):
        # With a box beside it, a mask would be sorted into sizes by the area of the box.
        unused = {"box": "segmentation", "mask": "bbox"}[name]
        results = [{k: v for k, v in d.items() if k != unused} for d in detections]
        with contextlib.redirect_stdout(io.StringIO()):
            if results:
                found = truth.loadRes(results)
            else:
                found = _pycocotools("coco").COCO()
                found.dataset = {**truth.dataset, "annotations": []}
                found.createIndex()
            evaluation = _pycocotools("cocoeval").COCOeval(truth, found, kind)
            evaluation.params.imgIds = list(dataset.paths)
            evaluation.params.catIds = sorted(dataset.categories)
            evaluation.evaluate()
            evaluation.accumulate()
            evaluation.summarize()
        scores[name] = dict(zip(STATISTICS, map(float, evaluation.stats[:6]), strict=True))
    return scores


def _pycocotools(module: str) -> Any:
    try:
        # An optional extra that nothing else needs.
        import pycocotools.coco  # noqa: PLC0415
        import pycocotools.cocoeval  # noqa: PLC0415
        import pycocotools.mask  # noqa: PLC0415
    except ImportError as error:
        raise DataError("this needs pycocotools: pip install 'vmamba-jax[coco]'") from error
    return getattr(pycocotools, module)
