"""The data sets that can be opened by name, and the check that two splits belong together."""

from collections.abc import Callable
from pathlib import Path
from types import MappingProxyType

from vmamba_jax.data.array_record import ArrayRecord
from vmamba_jax.data.decode import ImageSource, Sample
from vmamba_jax.data.digits import Digits
from vmamba_jax.data.errors import DamagedRecordError, DataError
from vmamba_jax.data.huggingface import HuggingFace
from vmamba_jax.data.image_folder import ImageFolder

__all__ = [
    "SOURCES",
    "ArrayRecord",
    "DamagedRecordError",
    "DataError",
    "Digits",
    "HuggingFace",
    "ImageFolder",
    "ImageSource",
    "Sample",
    "check_same_classes",
    "open_source",
]

SOURCES: MappingProxyType[str, Callable[[str | Path, str, int], ImageSource]] = MappingProxyType(
    {
        "image_folder": ImageFolder,
        "array_record": ArrayRecord,
        "huggingface": HuggingFace,
        "digits": lambda _, split, channels: Digits(split, channels),
    }
)


def open_source(kind: str, root: str | Path, split: str, channels: int = 3) -> ImageSource:
    """Opens one split of a data set.

    Args:
      kind: a key of :data:`SOURCES`.
      root: where the data lies; not looked at for ``"digits"``.
      split: the split's name, such as ``"train"``.
      channels: of the images; 3 for RGB.

    Raises:
      DataError: no such kind, or the data can't be used.
    """
    if kind not in SOURCES:
        raise DataError(f"No kind of data {kind!r}: choose one of {', '.join(SOURCES)}.")
    return SOURCES[kind](root, split, channels)


def check_same_classes(train: ImageSource, val: ImageSource) -> None:
    """Checks that a label means the same class in both splits.

    Raises:
      DataError: the class lists differ; the message names the classes that do.
    """
    ours, theirs = list(train.class_names), list(val.class_names)
    if ours == theirs:
        return
    problems = [
        f"only in {split}: {', '.join(sorted(names)[:8])}{', ...' if len(names) > 8 else ''}"
        for split, names in (
            ("training", set(ours) - set(theirs)),
            ("validation", set(theirs) - set(ours)),
        )
        if names
    ]
    raise DataError(
        f"The training data has {len(ours)} classes and the validation data {len(theirs)}, and "
        f"they are not the same ones ({'; '.join(problems) or 'same names, another order'}). "
        "Give both splits the same class list."
    )
