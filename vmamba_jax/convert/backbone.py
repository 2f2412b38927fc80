"""Makes a backbone of a classifier's weights, and a classifier of a backbone's."""

import re
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np

from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert.naming import Change
from vmamba_jax.convert.vmamba import tabulate, vmamba_weight
from vmamba_jax.convert.weight import Weight, variables_of
from vmamba_jax.models import VSSMBackbone
from vmamba_jax.typing import Variables

_OUTNORM = re.compile(r"outnorm(\d+)\.")
_STAGE = re.compile(r"layers\.(\d+)\.(blocks|downsample)\.")


def backbone_weights(config: VMambaConfig, out_indices: Sequence[int]) -> tuple[Weight, ...]:
    """Every weight of a `VSSMBackbone`, in the order of its tree."""
    return tabulate(
        lambda one_each: VSSMBackbone(one_each, tuple(out_indices)),
        config,
        partial(vmamba_weight, config=config),
    )


def backbone_from_torch(
    state_dict: dict[str, np.ndarray], config: VMambaConfig, out_indices: Sequence[int]
) -> Variables:
    """PyTorch's weights as variables for ``VSSMBackbone(config, out_indices).apply``.

    Raises:
        ValueError: naming every key that is missing, unexpected, or of another shape.
    """
    return variables_of(state_dict, backbone_weights(config, out_indices))


def as_backbone(
    state_dict: dict[str, np.ndarray],
    changes: list[Change],
    config: VMambaConfig,
    out_indices: Sequence[int],
) -> tuple[dict[str, np.ndarray], list[Change]]:
    """What a backbone needs of a VMamba's weights; norms that it has not are made.

    Args:
        state_dict: arrays under PyTorch's names of today; not changed.
        changes: what became of each tensor until now.
        config: the architecture.
        out_indices: the stages whose maps are asked for.

    Returns:
        The backbone's state dict, and what became of each tensor.
    """

    def why_not(key: str) -> str:
        if match := _OUTNORM.match(key):
            return "" if int(match[1]) in out_indices else "the norm of a map not asked for"
        match = _STAGE.match(key)
        if match and int(match[1]) + (match[2] == "downsample") > max(out_indices):
            return "of a stage after the last one asked for"
        return ""

    state_dict, changes = without_classifier(state_dict, changes)
    state_dict, changes = _leave_out(state_dict, changes, why_not)
    for weight in backbone_weights(config, out_indices):
        if weight.key not in state_dict and _OUTNORM.match(weight.key):
            make = np.ones if weight.path[-1] in ("scale", "var") else np.zeros
            state_dict[weight.key] = make(weight.shape, np.float32)
            changes.append(Change("", weight.key, "initialised", "a new norm of a stage's map"))
    return state_dict, changes


def without_classifier(
    state_dict: dict[str, np.ndarray], changes: list[Change]
) -> tuple[dict[str, np.ndarray], list[Change]]:
    """Leaves out what only a classifier has.

    Args:
        state_dict: arrays under PyTorch's names of today; not changed.
        changes: what became of each tensor until now.

    Returns:
        The rest of the state dict, and what became of each tensor.
    """

    def why_not(key: str) -> str:
        if key.startswith("classifier."):
            return "a backbone has no classifier"
        return "a backbone applies no position embedding" if key == "pos_embed" else ""

    return _leave_out(state_dict, changes, why_not)


def as_classifier(
    state_dict: dict[str, np.ndarray], changes: list[Change]
) -> tuple[dict[str, np.ndarray], list[Change]]:
    """What a classifier needs of a VMamba's weights.

    A backbone has no classifier; its features need none, and pooling needs its norm's shape.

    Args:
        state_dict: arrays under PyTorch's names of today; not changed.
        changes: what became of each tensor until now.

    Returns:
        The classifier's state dict, and what became of each tensor.
    """
    why = "the norm of a backbone's map; create_backbone takes it"
    state_dict, changes = _leave_out(
        state_dict, changes, lambda key: why if _OUTNORM.match(key) else ""
    )
    last = max((key for key in state_dict if key.endswith("blocks.0.norm.weight")), default=None)
    has_classifier = {"classifier.norm.weight", "classifier.head.weight"} & state_dict.keys()
    if last is not None and not has_classifier:
        dim = state_dict[last].shape[0]
        norm = {
            "classifier.norm.weight": np.ones(dim, np.float32),
            "classifier.norm.bias": np.zeros(dim, np.float32),
        }
        why = "a backbone without classifier; its stages' features are exact"
        state_dict |= norm
        changes += [Change("", key, "initialised", why) for key in norm]
    return state_dict, changes


def _leave_out(
    state_dict: dict[str, np.ndarray], changes: list[Change], why_not: Callable[[str], str]
) -> tuple[dict[str, np.ndarray], list[Change]]:
    """Copies of both, less the keys for which there is a reason."""
    kept = {key: array for key, array in state_dict.items() if not why_not(key)}
    return kept, [
        Change(change.source, "", "left out", why)
        if change.target and (why := why_not(change.target))
        else change
        for change in changes
    ]
