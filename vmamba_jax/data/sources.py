"""The data sets that can be opened by name, and the check that two splits belong together."""

from collections.abc import Callable, Sequence
from pathlib import Path

from vmamba_jax.data.array_record import ArrayRecord
from vmamba_jax.data.decode import ImageSource, Sample
from vmamba_jax.data.digits import Digits
from vmamba_jax.data.errors import DamagedRecordError, DataError
from vmamba_jax.data.huggingface import HuggingFace
from vmamba_jax.data.image_folder import ImageFolder

__all__ = [
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
    "register_source",
]

Opener = Callable[[str, str, int], ImageSource]
"""(root, split, channels) -> the source."""

_openers: dict[str, Callable[[str, str, int, Sequence[str] | None], ImageSource]] = {
    "image_folder": ImageFolder,
    "array_record": lambda root, split, channels, _: ArrayRecord(root, split, channels),
    "huggingface": HuggingFace,
    "digits": lambda _, split, channels, __: Digits(split, channels),
}
_own: dict[str, Opener] = {}


def register_source(kind: str, opener: Opener) -> None:
    """Gives a kind of data of one's own a name, for `open_source` and ``--data.kind``.

    Args:
      kind: the name.
      opener: opens one split: ``(root, split, channels) -> source``, an `ImageSource`. It raises
        :class:`DataError` if the data can't be used.

    Raises:
      ValueError: the name is taken.
    """
    if kind in _openers:
        raise ValueError(f"kind of data {kind!r} is built in: choose another name")
    if kind in _own and _full_name(_own[kind]) != _full_name(opener):
        raise ValueError(f"kind of data {kind!r} is registered already, with another opener")
    _own[kind] = opener  # of the same name: a cell of a notebook that ran again


def _full_name(opener: Opener) -> tuple[str, str]:
    kind = opener if hasattr(opener, "__qualname__") else type(opener)
    return kind.__module__, kind.__qualname__


def open_source(
    kind: str,
    root: str | Path,
    split: str,
    channels: int = 3,
    classes: Sequence[str] | None = None,
) -> ImageSource:
    """Opens one split of a data set.

    Args:
      kind: ``image_folder``, ``array_record``, ``huggingface``, ``digits``, or a name given to
        `register_source`.
      root: where the data lies; not looked at for ``"digits"``.
      split: the split's name, such as ``"train"``.
      channels: of the images; 3 for RGB.
      classes: the names of the classes, in order, where the training images or a model say them:
        not all of them need have images in this split.

    Raises:
      DataError: no such kind, or the data can't be used.
    """
    if kind in _own:
        return _own[kind](str(root), split, channels)
    if kind not in _openers:
        known = ", ".join((*_openers, *_own))
        raise DataError(f"No kind of data {kind!r}: choose one of {known}.")
    return _openers[kind](str(root), split, channels, classes)


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
