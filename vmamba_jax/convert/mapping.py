"""Weights both ways: PyTorch's state dict <-> our variables, and the architecture behind them."""

import functools
from collections.abc import Mapping
from typing import Any

import numpy as np

from vmamba_jax.convert.tasks import NetworkConfig, recognise, task_of
from vmamba_jax.convert.weight import StateDict, Weight, is_counter, state_dict_of, variables_of
from vmamba_jax.typing import Variables

__all__ = ["Weight", "from_torch", "infer_config", "is_counter", "to_torch", "weight_table"]


@functools.lru_cache(maxsize=64)
def weight_table(config: NetworkConfig) -> tuple[Weight, ...]:
    """Every weight of a network under both names, in the order of our tree."""
    return task_of(config).weights(config)


def from_torch(state_dict: StateDict, config: NetworkConfig) -> Variables:
    """PyTorch's weights as variables for the ``apply`` of the network of this config.

    Args:
        state_dict: arrays under PyTorch's names and in its shapes, any float dtype.
        config: the architecture they belong to; `infer_config` finds it.

    Returns:
        float32 NumPy arrays in our tree (views where the dtype allows).

    Raises:
        ValueError: naming every key that is missing, unexpected, or of another shape.
    """
    return variables_of(state_dict, weight_table(config))


def to_torch(tree: Mapping[str, Any], config: NetworkConfig) -> dict[str, np.ndarray]:
    """Our variables (or gradients of them) under PyTorch's names and in its shapes.

    Args:
        tree: variable collections: ``{"params": ...}``, with or without ``"batch_stats"``.
        config: the architecture they belong to.

    Returns:
        NumPy arrays in the dtype of the leaves.

    Raises:
        ValueError: naming every leaf that is missing, unexpected, or of another shape.
    """
    return state_dict_of(tree, weight_table(config))


def infer_config(state_dict: StateDict) -> NetworkConfig:
    """The architecture behind a state dict, from its names and shapes alone.

    What leaves no trace there takes the released models' value; `vmamba.infer_config`,
    `upernet.infer_upernet` and `mask_rcnn.infer_mask_rcnn` say which that is.

    Returns:
        A `VMambaConfig`; or, with heads beside ``backbone.``, a `UPerNetConfig` or
        `MaskRCNNConfig`.

    Raises:
        ValueError: if a key that every such network has is missing, or shapes contradict each
            other.
    """
    return recognise(state_dict).infer_config(state_dict)
