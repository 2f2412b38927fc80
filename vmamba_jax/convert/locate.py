"""Finds every VMamba in a checkpoint: in whichever entry, under whatever prefix of its names.

A VMamba is known by two groups of names under one prefix: its blocks (``layers.I.blocks.J``) and
its stem (``patch_embed``), or the same two as the Hugging Face port spells them.
"""

import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np

from vmamba_jax.convert.opaque import Opaque
from vmamba_jax.errors import CheckpointError

# What DistributedDataParallel, torch.compile, FSDP and activation checkpointing put into names.
_WRAPPER = r"(?:module|_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
_ANY_WRAPPER = re.compile(rf"(?<![^.]){_WRAPPER}")
_BLOCK = re.compile(
    rf"(?:^|\.)(layers\.(?:{_WRAPPER})*\d{{1,3}}\.(?:{_WRAPPER})*blocks\.(?:{_WRAPPER})*\d{{1,3}}\.)"
)
_STEM = re.compile(r"(?:^|\.)((patch_embed|embeddings)\.)")
# First components of a VMamba's names; what else lies under its prefix is another network's.
_PARTS = {
    "patch_embed": re.compile(r"(patch_embed|pos_embed|layers|norm|head|classifier|outnorm\d+)\."),
    "embeddings": re.compile(r"(embeddings|encoder|layernorm|classifier)\."),
}
_BESIDE = ("total_ops", "total_params")  # buffers that FLOP counters leave in every module
_DEPTH = 4  # of entries in entries
_LONGEST = 512  # characters of a name


class Located(NamedTuple):
    """A VMamba and where it is.

    Attributes:
        path: keys of the entry it is in; empty for the checkpoint itself.
        prefix: what its names begin with, as in the file, such as ``"module.backbone."``.
        tensors: its tensors under their names less prefix and wrappers.
        sources: those names -> the names in the file.
        beside: what else is in that entry, by its name.
    """

    path: tuple[Any, ...]
    prefix: str
    tensors: dict[str, Any]
    sources: dict[str, str]
    beside: dict[str, Any]

    @property
    def heads(self) -> dict[str, tuple[str, Any]]:
        """What lies beside a backbone: name less prefix and wrappers -> name as in the file, value.

        A VMamba is a backbone if it is called so: its prefix ends in ``backbone.``.
        """
        outer = re.sub(rf"backbone\.(?:{_WRAPPER})*$", "", self.prefix)
        if outer == self.prefix:
            return {}
        return {
            _ANY_WRAPPER.sub("", name[len(outer) :]): (name, value)
            for name, value in self.beside.items()
            if name.startswith(outer)
        }

    @property
    def entry(self) -> str:
        """The entry's keys as ``"outer/inner"``."""
        return "/".join(map(str, self.path))

    def __str__(self) -> str:
        return f"entry {self.entry[:80]!r}, prefix {self.prefix[:80]!r}"


def locate(checkpoint: Mapping[Any, Any]) -> list[Located]:
    """Every VMamba in it, in the order of the file.

    Raises:
        CheckpointError: two tensors of one VMamba differ only in a wrapper's name.
    """
    return [
        _take(path, entry, prefix, stem)
        for path, entry in _entries(checkpoint)
        for prefix, stem in _prefixes(entry)
    ]


def _entries(checkpoint: Mapping[Any, Any]) -> Iterator[tuple[tuple[Any, ...], Mapping[Any, Any]]]:
    level: list[tuple[tuple[Any, ...], Mapping[Any, Any]]] = [((), checkpoint)]
    seen = {id(checkpoint)}  # a pickle can put one dict in many places, and into itself
    for _ in range(_DEPTH):
        yield from level
        below = []
        for path, entry in level:
            for key, value in entry.items():
                if isinstance(value, dict) and id(value) not in seen:
                    seen.add(id(value))
                    below.append(((*path, key), value))
        level = below


def _prefixes(entry: Mapping[Any, Any]) -> list[tuple[str, str]]:
    """Each prefix under which a VMamba lies, with the name of its stem."""
    blocks: dict[str, None] = {}
    stems: set[tuple[str, str]] = set()
    for name, value in entry.items():
        if not _is_name(name) or not isinstance(value, np.ndarray | Opaque):
            continue
        if match := _BLOCK.search(name):
            blocks[name[: match.start(1)]] = None
        elif match := _STEM.search(name):
            stems.add((name[: match.start(1)], match[2]))
    found = []
    for prefix in blocks:
        if (prefix, "patch_embed") in stems:
            found.append((prefix, "patch_embed"))
        elif ((outer := prefix.removesuffix("encoder.")), "embeddings") in stems:
            found.append((outer, "embeddings"))
    return found


def _take(path: tuple[Any, ...], entry: Mapping[Any, Any], prefix: str, stem: str) -> Located:
    # The Hugging Face port keeps its head beside the encoder, under the name of neither.
    head = f"{prefix.removesuffix('vmamba.')}classifier." if stem == "embeddings" else prefix
    tensors: dict[str, Any] = {}
    sources: dict[str, str] = {}
    beside: dict[str, Any] = {}
    for name, value in entry.items():
        inner = None
        if _is_name(name) and name.startswith(prefix):
            inner = _ANY_WRAPPER.sub("", name[len(prefix) :])
        elif _is_name(name) and name.startswith(head):
            inner = "classifier." + name[len(head) :]
        if (
            inner is None
            or not _PARTS[stem].match(f"{inner}.")
            or inner.rpartition(".")[2] in _BESIDE
        ):
            beside[str(name)[:_LONGEST]] = value
        elif inner in tensors:
            raise CheckpointError(f"two of its tensors stand for {inner}; one is {name}")
        else:
            tensors[inner], sources[inner] = value, name
    return Located(path, prefix, tensors, sources, beside)


def _is_name(key: object) -> bool:
    return isinstance(key, str) and len(key) <= _LONGEST
