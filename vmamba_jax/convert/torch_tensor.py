"""Tensors of a PyTorch pickle: storages, bounds-checked views of them, and those it can't read."""

import dataclasses
import sys
from typing import Any

import ml_dtypes
import numpy as np

from vmamba_jax.convert.opaque import Opaque
from vmamba_jax.errors import CheckpointError

_MAX_DIMENSIONS = 32
_MAX_INTEGER = 2**63  # of a shape, a stride, an offset; so that their products stay cheap

_FLOAT8 = ("e4m3fn", "e4m3fnuz", "e5m2", "e5m2fnuz", "e8m0fnu")
# Storages that say their type.
STORAGE_DTYPES = {
    "torch.BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "torch.BoolStorage": np.dtype(np.bool_),
    "torch.ByteStorage": np.dtype(np.uint8),
    "torch.CharStorage": np.dtype(np.int8),
    "torch.DoubleStorage": np.dtype(np.float64),
    "torch.FloatStorage": np.dtype(np.float32),
    "torch.HalfStorage": np.dtype(np.float16),
    "torch.IntStorage": np.dtype(np.int32),
    "torch.LongStorage": np.dtype(np.int64),
    "torch.ShortStorage": np.dtype(np.int16),
    "torch.storage.UntypedStorage": np.dtype(np.uint8),
}
# Types of tensors over a storage that does not.
_DTYPES = {f"torch.{name}": np.dtype(name) for name in ("uint16", "uint32", "uint64")} | {
    f"torch.float8_{kind}": np.dtype(getattr(ml_dtypes, f"float8_{kind}")) for kind in _FLOAT8
}
# Functions that rebuild tensors of other kinds.
_FAULTS = {
    "_rebuild_meta_tensor_no_storage": "a meta tensor: it has no data",
    "_rebuild_sparse_tensor": "a sparse tensor: not supported",
    "_rebuild_sparse_csr_tensor": "a sparse tensor: not supported",
    "_rebuild_nested_tensor": "a nested tensor: not supported",
    "_rebuild_qtensor": "a quantised tensor: not supported",
}


@dataclasses.dataclass(eq=False, slots=True)
class Storage:
    """The bytes that tensors are views of.

    Attributes:
        dtype: of its elements; uint8 where only its tensors say it.
        bytes: one-dimensional uint8 array, in this machine's byte order if `dtype` is known.
        swapped: whether its elements are still in the other byte order.
    """

    dtype: np.dtype
    bytes: np.ndarray
    swapped: bool = False


def new_storage(kind: str, content: np.ndarray, byteorder: str) -> Storage:
    """A storage of a kind that is in `STORAGE_DTYPES`; takes `content` over."""
    dtype = STORAGE_DTYPES[kind]
    swapped = byteorder != sys.byteorder
    if swapped:
        content.view(f"u{dtype.itemsize}").byteswap(inplace=True)
    return Storage(dtype, content, swapped and kind == "torch.storage.UntypedStorage")


def rebuild(function: str, args: tuple[Any, ...]) -> np.ndarray | Opaque | None:
    """What torch's function of that name makes of its arguments; None if it makes no tensor.

    Raises:
        CheckpointError: the tensor would reach beyond its storage.
    """
    module, _, name = function.rpartition(".")
    if module not in ("torch._utils", "torch._tensor") or not name.startswith("_rebuild_"):
        return None
    match name, args:
        case (("_rebuild_tensor_v2" | "_rebuild_tensor"), (storage, offset, shape, strides, *_)):
            return _view(storage, offset, shape, strides)
        case "_rebuild_tensor_v3", (storage, offset, shape, strides, _, _, Opaque() as kind, *_):
            if kind.name not in _DTYPES:
                return Opaque(kind.name, fault=f"a tensor of {kind.name}: not supported")
            return _view(storage, offset, shape, strides, _DTYPES[kind.name])
        case (("_rebuild_parameter" | "_rebuild_parameter_with_state"), (tensor, *_)):
            return tensor
        case "_rebuild_from_type_v2", (Opaque() as inner, _, tuple() as inner_args, *_):
            # A subclass of a tensor, or one with attributes: the tensor inside. Never two deep.
            if inner.name != function and (tensor := rebuild(inner.name, inner_args)) is not None:
                return tensor
            name = inner.name
    return Opaque(function, fault=_FAULTS.get(name, f"a tensor made by {name}: not supported"))


def _view(
    storage: object, offset: object, shape: object, strides: object, dtype: np.dtype | None = None
) -> np.ndarray | Opaque:
    if isinstance(storage, Opaque):
        kind = storage.name.removeprefix("torch.").removesuffix("Storage")
        return Opaque(storage.name, fault=f"a tensor of type {kind}: not supported")
    if (
        not isinstance(storage, Storage)
        or not isinstance(shape, tuple)
        or not isinstance(strides, tuple)
        or not len(shape) == len(strides) <= _MAX_DIMENSIONS
        or not all(type(n) is int and 0 <= n < _MAX_INTEGER for n in (offset, *shape, *strides))
    ):
        raise CheckpointError("damaged: a tensor with a malformed storage, shape or stride")
    assert isinstance(offset, int)
    dtype = dtype or storage.dtype
    size = dtype.itemsize
    if storage.swapped and size > 1:
        return Opaque(dtype.name, fault=f"{dtype.name} of the other byte order: not supported")
    capacity = len(storage.bytes) // size
    count, last = 1, offset
    for length, stride in zip(shape, strides, strict=True):
        count *= length
        last += (length - 1) * stride
    if count and (last >= capacity or count > capacity):
        raise CheckpointError(
            f"damaged: a tensor of shape {shape} and stride {strides} reaches beyond its storage "
            f"of {capacity} elements"
        )
    if not count:
        return np.empty(shape, dtype)
    return np.ndarray(shape, dtype, storage.bytes, offset * size, tuple(n * size for n in strides))
