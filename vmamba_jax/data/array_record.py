"""ArrayRecord files of ``tf.train.Example`` records, as TFDS writes them; without TensorFlow."""

import json
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import grain
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from vmamba_jax.data.decode import Sample, decode_image
from vmamba_jax.data.errors import DamagedRecordError, DataError
from vmamba_jax.local_path import local_path


class ArrayRecord:
    """Images in ``root/*<split>*.array_record*``, classes in ``root/label.labels.txt``.

    This is the layout that TensorFlow Datasets writes with ``file_format="array_record"``, such as
    ``~/tensorflow_datasets/imagenet2012/5.1.0``. Any other program may write it: each record is a
    ``tf.train.Example`` with the encoded image (bytes) under ``image`` and the class index (int64)
    under ``label``, and the class names stand one a line in ``label.labels.txt``.

    Args:
      root: the folder that holds the files.
      split: the split's name, such as ``"train"`` or ``"validation"``.
      channels: of the images, see `decode_image`.

    Raises:
      DataError: the folder, the split or the class names are missing, or the data set was
        prepared in another format.
    """

    def __init__(self, root: str | Path, split: str, channels: int = 3):
        self._channels = channels
        root = local_path(root)
        files = [str(path) for path in _shards(root, split)]
        self.class_names: Sequence[str] = _class_names(root)
        self._name = f"{root} ({split})"
        try:
            self._records: Any = grain.sources.ArrayRecordDataSource(files)
        except Exception as error:  # the reader raises whatever its C++ side reports
            raise DataError(
                f"{self._name}: not ArrayRecord files, or damaged ones: {error}"
            ) from error
        if not len(self._records):
            raise DataError(f"The split {split!r} in {root} has no record.")

    def __len__(self) -> int:
        return len(self._records)

    def __getitem__(self, index: int, /) -> Sample:
        path = f"{self._name}, record {index}"
        try:
            features = _example_type().FromString(self._records[index]).features.feature
            image = features["image"].bytes_list.value[0]
            label = features["label"].int64_list.value[0]
        except Exception as error:  # a broken record, whatever it breaks
            raise DamagedRecordError(path, f"{type(error).__name__}: {error}") from error
        if not 0 <= label < len(self.class_names):
            raise DamagedRecordError(path, f"label {label} of {len(self.class_names)} classes")
        return {"image": decode_image(image, path, self._channels), "label": label}


def _shards(root: Path, split: str) -> list[Path]:
    if not root.is_dir():
        raise DataError(f"No folder {root}: give the folder that holds the array_record files.")
    every = sorted(path for path in root.iterdir() if ".array_record" in path.name)
    # TFDS: <name>-<split>.array_record-00000-of-00002; a plain file: <split>.array_record.
    files = [path for path in every if path.name.split(".array_record")[0].split("-")[-1] == split]
    if files:
        return files
    if every:
        splits = sorted({path.name.split(".array_record")[0].split("-")[-1] for path in every})
        raise DataError(f"{root} has no split {split!r}; it has {', '.join(splits)}.")
    nested = sorted({path.parent for path in root.glob("*/*.array_record*")})
    nested += sorted({path.parent for path in root.glob("*/*/*.array_record*")})
    if nested:
        raise DataError(f"{root} has no array_record file itself; did you mean {nested[-1]}?")
    if any(root.glob("*.tfrecord*")):
        raise DataError(
            f"{root} holds TFRecord files, which can't be read at random. Prepare the data set "
            'again with tfds.builder(name, file_format="array_record").download_and_prepare().'
        )
    raise DataError(f"{root} has no *.array_record file.")


def _class_names(root: Path) -> list[str]:
    path = root / "label.labels.txt"
    if path.is_file():
        names = [line.strip() for line in path.read_text(encoding="utf-8").splitlines()]
        names = [name for name in names if name]
        if len(names) < 2:
            raise DataError(f"{path} names {len(names)} classes: a classifier needs at least two.")
        return names
    count = _class_count(root / "features.json")
    if count is None or count < 2:
        raise DataError(f"{path} is missing: write the class names into it, one a line, in order.")
    return [str(index) for index in range(count)]


def _class_count(path: Path) -> int | None:
    """What TFDS's ``features.json`` says of a label whose classes have no names."""
    try:
        features: Any = json.loads(path.read_text(encoding="utf-8"))
        return int(features["featuresDict"]["features"]["label"]["classLabel"]["numClasses"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


@cache
def _example_type() -> Any:
    """The message ``tf.train.Example``, built here because only TensorFlow ships it.

    Source: tensorflow/core/example/{example,feature}.proto, whose field numbers these are.
    """
    field = descriptor_pb2.FieldDescriptorProto
    file = descriptor_pb2.FileDescriptorProto(name="vmamba_jax/example.proto", syntax="proto3")
    file.package = "vmamba_jax"

    def message(name: str, *fields: tuple[str, int, bool, Any]) -> Any:
        added = file.message_type.add(name=name)
        for field_name, number, repeated, kind in fields:
            label = field.LABEL_REPEATED if repeated else field.LABEL_OPTIONAL
            entry = added.field.add(name=field_name, number=number, label=label)
            if isinstance(kind, str):
                entry.type, entry.type_name = field.TYPE_MESSAGE, f".vmamba_jax.{kind}"
            else:
                entry.type = kind
        return added

    message("BytesList", ("value", 1, True, field.TYPE_BYTES))
    message("FloatList", ("value", 1, True, field.TYPE_FLOAT))
    message("Int64List", ("value", 1, True, field.TYPE_INT64))
    message(
        "Feature",
        ("bytes_list", 1, False, "BytesList"),
        ("float_list", 2, False, "FloatList"),
        ("int64_list", 3, False, "Int64List"),
    )
    features = message("Features", ("feature", 1, True, "Features.FeatureEntry"))
    entry = features.nested_type.add(name="FeatureEntry")
    entry.options.map_entry = True
    entry.field.add(name="key", number=1, label=field.LABEL_OPTIONAL, type=field.TYPE_STRING)
    entry.field.add(
        name="value",
        number=2,
        label=field.LABEL_OPTIONAL,
        type=field.TYPE_MESSAGE,
        type_name=".vmamba_jax.Feature",
    )
    message("Example", ("features", 1, False, "Features"))
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName("vmamba_jax.Example"))
