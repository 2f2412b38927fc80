"""PyTorch weights in and out, without torch."""

from vmamba_jax.convert.artifact import SavedModel, load_model, save_model
from vmamba_jax.convert.mapping import from_torch, infer_config, to_torch
from vmamba_jax.convert.opaque import Opaque
from vmamba_jax.convert.source import Weights, read_network, read_weights
from vmamba_jax.convert.torch_file import load_torch_file
from vmamba_jax.errors import CheckpointError

__all__ = [
    "CheckpointError",
    "Opaque",
    "SavedModel",
    "Weights",
    "from_torch",
    "infer_config",
    "load_model",
    "load_torch_file",
    "read_network",
    "read_weights",
    "save_model",
    "to_torch",
]
