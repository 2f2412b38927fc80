"""Parquet files and anything else that Hugging Face `datasets` opens, memory-mapped."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from vmamba_jax.data.decode import Sample, decode_image
from vmamba_jax.data.errors import DamagedRecordError, DataError
from vmamba_jax.local_path import local_path

_SINGLE = "state.json"
"""A file of one data set that ``save_to_disk`` wrote."""


class HuggingFace:
    """A data set opened by Hugging Face ``datasets``; needs ``pip install 'vmamba-jax[datasets]'``.

    Parquet files are converted once to a memory-mapped copy in the cache of ``datasets``
    (``HF_HOME``), because a row of a Parquet file can't be read without its neighbours.

    Args:
      root: a folder of Parquet files named after their splits (``train-00000-of-00010.parquet``),
        a folder written by ``save_to_disk``, or a data set's name on the Hub
        (``"ILSVRC/imagenet-1k"``). ``save_to_disk`` writes all splits together or one data set;
        such single ones lie in ``root/split``, or in the root, which is then that split alone.
      split: the split's name, such as ``"train"``.
      channels: of the images, see `decode_image`.
      classes: the classes, in order, where the training images say them and the file does not.

    Attributes:
      class_names: the classes, in the order of the labels.
      is_whole_root: the root is one data set, which any split would be.

    Raises:
      DataError: ``datasets`` is missing, can't open this, has no such split, or finds no image or
        no label column.
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
        try:
            import datasets  # noqa: PLC0415 (optional, slow to import)
        except ImportError as error:
            raise DataError(
                "Parquet files and the Hub need the package datasets: "
                "pip install 'vmamba-jax[datasets]'."
            ) from error
        try:
            rows: Any
            if (root / "dataset_dict.json").is_file():
                rows = datasets.load_from_disk(str(root))[split]
            elif (root / split / _SINGLE).is_file():
                rows = datasets.load_from_disk(str(root / split))
            elif (root / _SINGLE).is_file():
                rows = datasets.load_from_disk(str(root))
                if rows.split is not None and str(rows.split) != split:
                    raise DataError(
                        f"{root} holds the split {rows.split} alone: save each split into a folder "
                        f"of its own, such as {root}/{split}"
                    )
            else:
                rows = datasets.load_dataset(str(root), split=split)
        except DataError:
            raise
        except KeyError as error:
            raise DataError(f"{root} has no split {split!r}.") from error
        except Exception as error:  # from a missing folder to a refused connection
            raise DataError(
                f"datasets can't open the split {split!r} of {root}: {error} (give a folder of "
                "Parquet files, one written by save_to_disk, or a name on the Hub)"
            ) from error
        self.is_whole_root = (root / _SINGLE).is_file()
        if not len(rows):
            raise DataError(f"The split {split!r} of {root} has no row.")
        self._name = f"{root} ({split})"
        self._image = self._column(rows.features, datasets.Image, "image")
        self._label = self._column(rows.features, datasets.ClassLabel, "label")
        self.class_names: Sequence[str] = self._classes(rows, datasets.ClassLabel, classes)
        # Undecoded, so that all decoding, and all damage, is met in one place of ours.
        self._rows = rows.cast_column(self._image, datasets.Image(decode=False))

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int, /) -> Sample:
        path = f"{self._name}, row {index}"
        try:
            row = self._rows[int(index)]
            encoded, label = row[self._image], int(row[self._label])
            data = encoded["bytes"] if encoded["bytes"] is not None else Path(encoded["path"])
        except Exception as error:  # a broken record, whatever it breaks
            raise DamagedRecordError(path, f"{type(error).__name__}: {error}") from error
        if not 0 <= label < len(self.class_names):
            raise DamagedRecordError(path, f"label {label} of {len(self.class_names)} classes")
        return {"image": decode_image(data, path, self._channels), "label": label}

    def _column(self, features: Any, kind: type, usual: str) -> str:
        """The only column of a kind, or else the one with the usual name."""
        columns = [name for name, feature in features.items() if isinstance(feature, kind)]
        if len(columns) == 1:
            return columns[0]
        if usual in features:
            return usual
        raise DataError(
            f"{self._name} has the columns {', '.join(features)}: name the one to use {usual!r}."
        )

    def _classes(self, rows: Any, class_label: type, classes: Sequence[str] | None) -> list[str]:
        feature = rows.features[self._label]
        if isinstance(feature, class_label):
            names = list(feature.names)  # pyright: ignore[reportAttributeAccessIssue]
        else:
            labels = rows.unique(self._label)
            if not all(isinstance(label, int) for label in labels):
                raise DataError(
                    f"The column {self._label!r} of {self._name} is no class index: convert it "
                    f"with class_encode_column({self._label!r})."
                )
            names = [str(label) for label in range(max(labels) + 1)]
            if classes is not None and names == list(classes[: len(names)]):
                names = list(classes)
        if len(names) < 2:
            raise DataError(f"{self._name} has one class: a classifier needs at least two.")
        return names
