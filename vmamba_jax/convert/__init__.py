"""PyTorch weights in and out, without torch."""

from vmamba_jax.convert.mapping import from_torch, infer_config, to_torch

__all__ = ["from_torch", "infer_config", "to_torch"]
