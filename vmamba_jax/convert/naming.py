"""Brings a VMamba state dict to today's names and shapes.

The PyTorch project renamed its modules twice and published three spellings of the same layers, and
the Hugging Face port has its own; this is the table of all of them. Only names and shapes decide,
never where a file came from.
"""

import re
from typing import NamedTuple

import numpy as np

from vmamba_jax.config import VMambaConfig
from vmamba_jax.errors import CheckpointError

_ROUTES = 4  # K: every VMamba scans along four routes

# Names of the first release (v0) -> today's.
_RENAMED = (
    (re.compile(r"^patch_embed\.proj\."), "patch_embed.0."),
    (re.compile(r"^patch_embed\.norm\."), "patch_embed.2."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.ln_1\."), r"\1.norm."),
    (re.compile(r"^(layers\.\d+\.blocks\.\d+)\.self_attention\."), r"\1.op."),
    (re.compile(r"^norm\."), "classifier.norm."),
    (re.compile(r"^head\."), "classifier.head."),
    # Names of the Hugging Face port.
    (re.compile(r"^embeddings\.(conv1|projection)\."), "patch_embed.0."),
    (re.compile(r"^embeddings\.(norm1|norm)\."), "patch_embed.2."),
    (re.compile(r"^embeddings\.conv2\."), "patch_embed.5."),
    (re.compile(r"^embeddings\.norm2\."), "patch_embed.7."),
    (re.compile(r"^encoder\.layers\."), "layers."),
    (re.compile(r"^layernorm\."), "classifier.norm."),
    (re.compile(r"^classifier\.(weight|bias)$"), r"classifier.head.\1"),
)
# Names of the one-file edition: the projections of all routes as one grouped linear layer.
_GROUPED = re.compile(r"^(.*\.op)\.(x_proj|dt_projs)\.weight$")
_MERGING = re.compile(r"^(layers\.\d+\.downsample)\.([12])\.(weight|bias)$")
# The Hugging Face port's strided convolution and its norm; a merging's norm has today's name there.
_STRIDED = re.compile(r"^(layers\.\d+\.downsample)\.(conv|norm)\.")
# Layers that are linear whichever way they are stored; a convolution's 1x1 kernel stays 4-D.
_LINEAR = re.compile(r"\.(in_proj|out_proj|fc1|fc2|head|reduction)\.weight$")

# Today's names -> the Hugging Face port's, whose stem has two.
_STEM_V1 = (
    ("patch_embed.0.", "vmamba.embeddings.projection."),
    ("patch_embed.2.", "vmamba.embeddings.norm."),
)
_STEM_V2 = (
    ("patch_embed.0.", "vmamba.embeddings.conv1."),
    ("patch_embed.2.", "vmamba.embeddings.norm1."),
    ("patch_embed.5.", "vmamba.embeddings.conv2."),
    ("patch_embed.7.", "vmamba.embeddings.norm2."),
)
_REST = (
    ("layers.", "vmamba.encoder.layers."),
    ("classifier.norm.", "vmamba.layernorm."),
    ("classifier.head.", "classifier."),
)


class Change(NamedTuple):
    """What became of one tensor.

    Attributes:
        source: its name in the file; empty if it was not there.
        target: today's name; empty if it was left out.
        action: ``"mapped"``, ``"renamed"``, ``"reshaped"``, ``"resized"``, ``"initialised"`` or
            ``"left out"``.
        why: the reason, where the names don't say it all.
    """

    source: str
    target: str
    action: str
    why: str = ""


def standard_names(
    tensors: dict[str, np.ndarray],
) -> tuple[dict[str, np.ndarray], list[Change]]:
    """Renames and reshapes a state dict of any VMamba release.

    Args:
        tensors: arrays under the names of the file.

    Returns:
        Views of them under today's names, and what became of each.

    Raises:
        CheckpointError: if two tensors come to bear one name.
    """
    one_file_merging = any(
        name.endswith("downsample.1.weight") and array.ndim == 1 for name, array in tensors.items()
    )
    strided = any(".downsample.conv." in name for name in tensors)
    state_dict: dict[str, np.ndarray] = {}
    changes: list[Change] = []
    for source, array in tensors.items():
        target, shape = source, array.shape
        for pattern, replacement in _RENAMED:
            target = pattern.sub(replacement, target)
        if one_file_merging and (match := _MERGING.match(target)):
            layer = {"1": "norm", "2": "reduction"}[match[2]]
            target = f"{match[1]}.{layer}.{match[3]}"
        if strided and (match := _STRIDED.match(target)):
            layer = {"conv": "1", "norm": "3"}[match[2]]
            target = f"{match[1]}.{layer}.{target[match.end() :]}"
        if match := _GROUPED.match(target):
            target = f"{match[1]}.{match[2]}_weight"
            if array.shape[2:] in ((), (1,), (1, 1)) and array.shape[0] % _ROUTES == 0:
                shape = (_ROUTES, array.shape[0] // _ROUTES, array.shape[1])
        elif _LINEAR.search(target) and array.shape[2:] in ((1,), (1, 1)):
            shape = array.shape[:2]
        if target in state_dict:
            raise CheckpointError(f"two of its tensors stand for {target}; one is {source}")
        state_dict[target] = array.reshape(shape)
        if shape != array.shape:
            changes.append(Change(source, target, "reshaped", f"{array.shape} to {shape}"))
        else:
            changes.append(Change(source, target, "mapped" if target == source else "renamed"))
    return state_dict, changes


def hugging_face_name(key: str, config: VMambaConfig) -> str:
    """The Hugging Face port's name of a weight.

    Args:
        key: today's name.
        config: the architecture it belongs to.
    """
    stem = _STEM_V2 if config.patchembed_version == "v2" else _STEM_V1
    for today, theirs in (*stem, *_REST):
        if key.startswith(today):
            key = theirs + key.removeprefix(today)
            break
    for today, theirs in (
        (".downsample.1.", ".downsample.conv."),
        (".downsample.3.", ".downsample.norm."),
    ):
        key = key.replace(today, theirs)
    return key
