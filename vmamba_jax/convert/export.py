"""Writes weights under PyTorch's names, for PyTorch."""

import os
from pathlib import Path

import ml_dtypes
import numpy as np
import safetensors.numpy

from vmamba_jax.errors import CheckpointError
from vmamba_jax.local_path import local_path


def save_safetensors(path: Path, state_dict: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file; it appears only when it is complete.

    Args:
        path: a file that does not exist yet.
        state_dict: arrays under PyTorch's names.

    Raises:
        CheckpointError: if `path` exists.
        OSError: if it can't be written.
    """
    part = _part_of(path)
    try:
        # In C order, which the writer takes for granted; ascontiguousarray has no 0-d arrays.
        arrays = {key: np.asarray(array, order="C") for key, array in state_dict.items()}
        safetensors.numpy.save_file(arrays, part, metadata={"format": "pt"})
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def save_torch(path: Path, state_dict: dict[str, np.ndarray]) -> None:
    """Writes ``{"model": state_dict}`` as the released files do; needs torch.

    Args:
        path: a file that does not exist yet.
        state_dict: arrays under PyTorch's names.

    Raises:
        CheckpointError: if `path` exists or torch is not installed.
        OSError: if it can't be written.
    """
    try:
        # An optional extra that nothing else needs.
        import torch  # noqa: PLC0415  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise CheckpointError(
            f"{path}: writing a .pth file needs torch: pip install 'vmamba-jax[parity]'. "
            "A .safetensors file needs nothing more, and PyTorch reads it too"
        ) from error
    part = _part_of(path)
    tensors = {}
    for key, array in state_dict.items():
        owned = np.array(array, order="C")  # torch takes the memory over
        if owned.dtype.type.__module__ == ml_dtypes.bfloat16.__module__:  # unknown to from_numpy
            bits = torch.from_numpy(owned.view(f"u{owned.itemsize}"))
            tensors[key] = bits.view(getattr(torch, owned.dtype.name))
        else:
            tensors[key] = torch.from_numpy(owned)
    try:
        torch.save({"model": tensors}, part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _part_of(path: Path) -> Path:
    if local_path(path).exists():
        raise CheckpointError(f"{path}: exists already; choose another name or delete it")
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.with_name(f"{path.name}.{os.getpid()}.part")
