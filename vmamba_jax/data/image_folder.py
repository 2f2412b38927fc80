"""A folder of images with one sub-folder a class: ``root/train/cat/1.jpg``."""

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from vmamba_jax.data.decode import EXTENSIONS, Sample, decode_image
from vmamba_jax.data.errors import DataError
from vmamba_jax.local_path import local_path


class ImageFolder:
    """Images in ``root/split/<class>/**``; classes are numbered in sorted order of their names.

    Files are ordered by class and path. Hidden files and folders are passed over.

    Args:
      root: the data set's folder.
      split: its sub-folder, such as ``"train"`` or ``"val"``.
      channels: of the images, see `decode_image`.
      classes: the classes, in order, where the training images or a model say them: each may then
        be without images or a folder here. Folders of other classes are numbered as above.

    Attributes:
      class_names: the classes, in the order of the labels.
      empty_classes: those of them that have no image.

    Raises:
      DataError: a folder is missing, holds no image, or holds fewer than two classes.
    """

    def __init__(
        self,
        root: str | Path,
        split: str,
        channels: int = 3,
        classes: Sequence[str] | None = None,
    ):
        self._channels = channels
        root = local_path(root)
        self._folder = root / split
        folders = _class_folders(root, split)
        given = classes is not None and set(folders) <= set(classes)
        if len(folders) == 1 and not given:
            raise DataError(
                f"{self._folder} has one class, {folders[0]!r}: a classifier needs at least two "
                "class folders."
            )
        self.class_names: Sequence[str] = list(classes) if given and classes else folders
        paths, labels = [], []
        for label, name in enumerate(self.class_names):
            found = _image_files(self._folder / name, may_be_empty=given)
            paths += [os.fsencode(path) for path in found]
            labels += [label] * len(found)
        if not labels:
            raise DataError(f"{self._folder} has no image.")
        filled = set(labels)
        self.empty_classes = [n for i, n in enumerate(self.class_names) if i not in filled]
        # Arrays, not lists: a tenth of the memory, and pickled to worker processes at once.
        self._paths = np.array(paths)
        self._labels = np.array(labels, np.int32)

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int, /) -> Sample:
        path = self._folder / os.fsdecode(self._paths[index])
        return {
            "image": decode_image(path, str(path), self._channels),
            "label": int(self._labels[index]),
        }


def _class_folders(root: Path, split: str) -> list[str]:
    if not root.is_dir():
        raise DataError(f"No folder {root}: give the folder that holds {split}/<class>/<image>.")
    folder = root / split
    if not folder.is_dir():
        raise DataError(
            f"{root} has no split {split!r}: expected {folder}/<class>/<image>, found "
            f"{_listing(_sub_folders(root), 'no sub-folder')}."
        )
    names = _sub_folders(folder)
    if not names:
        loose = sum(_is_image(entry.name) for entry in os.scandir(folder))
        raise DataError(
            f"{folder} has no class folders ({loose} images lie in it directly): move each image "
            f"into a folder named after its class, {folder}/<class>/<image>."
        )
    return names


def _image_files(folder: Path, *, may_be_empty: bool) -> list[str]:
    """Sorted paths of the images below a class folder, relative to the split's folder."""
    images, others = [], Counter[str]()
    for parent, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if not name.startswith(".")]
        inside = Path(parent).relative_to(folder.parent).as_posix()
        for name in files:
            if _is_image(name):
                images.append(f"{inside}/{name}")
            elif not name.startswith("."):
                others[Path(name).suffix or "no extension"] += 1
    if not images and (others or not may_be_empty):
        found = _listing([f"{n} x {suffix}" for suffix, n in others.most_common(5)], "no file")
        raise DataError(
            f"Class folder {folder} has no image: found {found}, but images end in "
            f"{', '.join(EXTENSIONS)}. Convert its files, or remove the folder."
        )
    return sorted(images)


def _is_image(name: str) -> bool:
    return name.lower().endswith(EXTENSIONS) and not name.startswith(".")


def _sub_folders(folder: Path) -> list[str]:
    with os.scandir(folder) as entries:
        return sorted(e.name for e in entries if e.is_dir() and not e.name.startswith("."))


def _listing(names: Sequence[str], nothing: str) -> str:
    shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
    return shown or nothing
