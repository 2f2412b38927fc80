"""The classes of ImageNet-1K in the order of the released heads."""

from collections.abc import Sequence
from functools import cache
from importlib import resources


@cache
def imagenet_synsets() -> dict[str, str]:
    """WordNet synset -> name of each of the 1000 classes, in order."""
    text = resources.files("vmamba_jax").joinpath("imagenet_classes.txt").read_text("utf-8")
    return dict(line.split("\t")[:2] for line in text.splitlines() if not line.startswith("#"))


def imagenet_classes() -> tuple[str, ...]:
    """Names of the 1000 classes."""
    return tuple(imagenet_synsets().values())


def in_words(class_names: Sequence[str]) -> list[str]:
    """Class names with the synsets that ImageNet's folders are called after put into words."""
    synsets = imagenet_synsets()
    return [synsets.get(name, name) for name in class_names]
