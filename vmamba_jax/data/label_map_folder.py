"""A folder of images and their label maps in ADE20K's layout.

``root/images/training/*.jpg`` and, of the same name, ``root/annotations/training/*.png``.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from vmamba_jax.data.decode import (
    EXTENSIONS,
    IGNORED,
    LabelMapSample,
    decode_label_map,
    decode_rgb,
    image_size,
)
from vmamba_jax.data.errors import DamagedRecordError, DataError
from vmamba_jax.local_path import local_path

_ADE20K_LIST = "objectInfo150.txt"
_NAMES = "classes.txt"
_PROBED = 8
"""Label maps that are read when a split is opened, so that a systematic fault shows at once."""


class LabelMapFolder:
    """Images in ``root/images/split`` and label maps in ``root/annotations/split``.

    The classes are the lines of ``root/classes.txt``; where ADE20K's own list,
    ``objectInfo150.txt``, lies there, its 150 classes. Label 255 marks pixels of no class.

    Args:
      root: the data set's folder.
      split: the sub-folder of both, such as ``"training"`` or ``"validation"``.
      num_classes: how many classes there are, where no file says it.
      reduce_zero_label: label 0 means no class, and class i is stored as label i + 1, as ADE20K
        does; None: only where ADE20K's list lies in the root.

    Raises:
      DataError: a folder is missing or empty, an image has no label map, the classes are unknown,
        or one of the label maps looked at can't be used.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        *,
        num_classes: int | None = None,
        reduce_zero_label: bool | None = None,
    ):
        root = local_path(root)
        self._images, self._labels = root / "images" / split, root / "annotations" / split
        _check_folders(root, split)
        if reduce_zero_label is None:
            reduce_zero_label = (root / _ADE20K_LIST).is_file()
        self._reduce_zero_label = reduce_zero_label
        self.class_names: Sequence[str] = _class_names(root, num_classes)
        # An array, not a list: a tenth of the memory, and pickled to worker processes at once.
        self._names = np.array([os.fsencode(name) for name in _image_names(self._images)])
        self._check_pairs()
        self._probe()

    def __len__(self) -> int:
        return len(self._names)

    def __getitem__(self, index: int, /) -> LabelMapSample:
        image_path, label_path = self._paths(index)
        image = decode_rgb(image_path, str(image_path))
        label = decode_label_map(label_path, str(label_path))
        if image.size != label.size:
            raise DataError(
                f"{label_path} is {_size(label)} pixels and its image {image_path} is "
                f"{_size(image)}: make the two the same size"
            )
        if self._reduce_zero_label:
            label = label.point([IGNORED, *range(254), IGNORED])
        self._check_classes(label, label_path)
        return {"image": image, "label": label}

    def blank(self, index: int) -> LabelMapSample:
        """An image of the size of that at `index`, without a single label."""
        height, width = self._size(index)
        size = width, height
        return {"image": Image.new("RGB", size), "label": Image.new("L", size, IGNORED)}

    def groups(self) -> list[list[int]]:
        """Indices of the images of each size, read from the beginnings of their files."""
        found: dict[tuple[int, int], list[int]] = {}
        for index in range(len(self)):
            found.setdefault(self._size(index), []).append(index)
        return list(found.values())

    def _size(self, index: int) -> tuple[int, int]:
        """Height and width; those of one pixel if the file can't be read."""
        try:
            return image_size(self._paths(index)[0])
        except DamagedRecordError:
            return 1, 1

    def _paths(self, index: int) -> tuple[Path, Path]:
        name = os.fsdecode(self._names[index])
        return self._images / name, (self._labels / name).with_suffix(".png")

    def _check_pairs(self) -> None:
        missing = [label for _, label in map(self._paths, range(len(self))) if not label.is_file()]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self)} images in {self._images} have no label map; the "
                f"first lacks {missing[0]}: add it, or take the image away"
            )

    def _check_classes(self, label: Image.Image, path: Path) -> None:
        count = len(self.class_names)
        strange = [i for i, pixels in enumerate(label.histogram()) if pixels and count <= i < 255]
        if strange:
            stored = [i + self._reduce_zero_label for i in strange]
            raise DataError(
                f"{path} has the labels {', '.join(map(str, stored[:8]))}"
                f"{', ...' if len(stored) > 8 else ''}, but there are {count} classes (and 255 for "
                "none): correct the label map or the list of classes" + self._advice(strange)
            )

    def _advice(self, strange: list[int]) -> str:
        if not self._reduce_zero_label and strange == [len(self.class_names)]:
            return "; where label 0 means no class, set --data.reduce-zero-label"
        return ""

    def _probe(self) -> None:
        """Reads a few label maps, so that what is wrong with all of them is said before training.

        A mask of 0 and 255 would even train: every pixel that counts is of one class.
        """
        seen = np.zeros(256, np.int64)
        for index in np.linspace(0, len(self) - 1, min(len(self), _PROBED)).astype(int):
            try:
                seen += self[int(index)]["label"].histogram()
            except DamagedRecordError:
                continue
        binary = len(self.class_names) == 2 and not self._reduce_zero_label
        if binary and seen[0] and seen[IGNORED] and not seen[1:IGNORED].any():
            raise DataError(
                f"the label maps in {self._labels} hold 0 and 255, and 255 means no class: store "
                "the second class as 1"
            )


def _check_folders(root: Path, split: str) -> None:
    for kind in ("images", "annotations"):
        if not (root / kind / split).is_dir():
            raise DataError(
                f"No folder {root / kind / split}: expected {root}/images/{split}/NAME.jpg and "
                f"{root}/annotations/{split}/NAME.png"
            )


def _class_names(root: Path, num_classes: int | None) -> list[str]:
    path = root / _NAMES
    if path.is_file():
        names = [line.strip() for line in path.read_text("utf-8").splitlines() if line.strip()]
    elif (root / _ADE20K_LIST).is_file():
        names = _ade20k_names(root / _ADE20K_LIST)
    elif num_classes is not None:
        names = [f"class {i}" for i in range(num_classes)]
    else:
        raise DataError(
            f"{root} does not say which classes there are: write their names into {path}, one a "
            "line in the order of the labels, or set --data.num-classes"
        )
    if num_classes is not None and num_classes != len(names):
        raise DataError(f"{root} lists {len(names)} classes and data.num-classes is {num_classes}")
    if not 2 <= len(names) <= IGNORED:
        raise DataError(f"{root}: {len(names)} classes, but there must be 2 to {IGNORED}")
    return names


def _ade20k_names(path: Path) -> list[str]:
    """The last column of ADE20K's table, up to the first synonym."""
    lines = path.read_text("utf-8").splitlines()[1:]
    return [line.split("\t")[-1].split(",")[0].strip() for line in lines if line.strip()]


def _image_names(folder: Path) -> list[str]:
    """Sorted paths of the images below a folder, relative to it."""
    names = [
        (Path(parent) / name).relative_to(folder).as_posix()
        for parent, _, files in os.walk(folder)
        for name in files
        if name.lower().endswith(EXTENSIONS) and not name.startswith(".")
    ]
    if not names:
        raise DataError(f"{folder} has no image: images end in {', '.join(EXTENSIONS)}")
    return sorted(names)


def _size(image: Image.Image) -> str:
    return f"{image.width}x{image.height}"
