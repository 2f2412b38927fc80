"""Reads safetensors files into NumPy, the types that NumPy itself has no name for included.

The format: the header's length in eight bytes, the header in JSON (name -> dtype, shape, range of
bytes), then the bytes of all tensors, one after the other.
"""

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from vmamba_jax.convert.opaque import Opaque
from vmamba_jax.errors import CheckpointError

_MAX_HEADER_BYTES = 1 << 22  # a hundred bytes a tensor; JSON takes up to 30 times that in memory
_MAX_DIMENSIONS = 32  # the product of many large ones costs their number squared
_DAMAGED = "not a safetensors file, cut short or damaged"

_DTYPES = {
    name: np.dtype(dtype)
    for name, dtype in {
        "BOOL": np.bool_,
        "I8": np.int8,
        "U8": np.uint8,
        "I16": np.int16,
        "U16": np.uint16,
        "I32": np.int32,
        "U32": np.uint32,
        "I64": np.int64,
        "U64": np.uint64,
        "F16": np.float16,
        "BF16": ml_dtypes.bfloat16,
        "F32": np.float32,
        "F64": np.float64,
        "F8_E4M3": ml_dtypes.float8_e4m3fn,
        "F8_E4M3FNUZ": ml_dtypes.float8_e4m3fnuz,
        "F8_E5M2": ml_dtypes.float8_e5m2,
        "F8_E5M2FNUZ": ml_dtypes.float8_e5m2fnuz,
        "F8_E8M0": ml_dtypes.float8_e8m0fnu,
    }.items()
}


def load_safetensors(path: str | os.PathLike[str]) -> dict[str, np.ndarray | Opaque]:
    """Reads a safetensors file.

    Args:
        path: a ``.safetensors`` file.

    Returns:
        Arrays by name, in the file's shapes and dtypes (float8 and bfloat16 from `ml_dtypes`);
        an `Opaque` for a tensor of another dtype.

    Raises:
        CheckpointError: not such a file, cut short or damaged.
        OSError: it can't be opened.
    """
    with Path(path).open("rb") as file:
        room = os.fstat(file.fileno()).st_size - 8
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= room:
            raise CheckpointError(_DAMAGED)
        if length > _MAX_HEADER_BYTES:
            raise CheckpointError(f"its header is larger than {_MAX_HEADER_BYTES >> 20} MiB")
        try:
            header = json.loads(file.read(length))
            header.pop("__metadata__", None)
            ranges = sorted((*about["data_offsets"], name) for name, about in header.items())
            # One after the other and all of the file: no byte is read twice.
            ends = [0, *(end for _, end, _ in ranges)]
            starts = [*(start for start, _, _ in ranges), room - length]
            if starts != ends:
                raise CheckpointError(f"{_DAMAGED}: its tensors do not fill the file")
            loaded = {
                name: _read(file, name, header[name], end - start) for start, end, name in ranges
            }
        except CheckpointError:
            raise
        except Exception as error:  # what damaged bytes provoke is never our caller's
            raise CheckpointError(f"{_DAMAGED} ({str(error)[:200]})") from error
    return {name: loaded[name] for name in header}


def _read(file: Any, name: str, about: dict[str, Any], size: int) -> np.ndarray | Opaque:
    kind, shape = about["dtype"], tuple(about["shape"])
    dtype = _DTYPES.get(kind)
    if dtype is None:
        file.seek(size, os.SEEK_CUR)
        return Opaque(str(kind)[:80], fault=f"a tensor of type {str(kind)[:80]}: not supported")
    whole = all(type(n) is int and 0 <= n < 1 << 63 for n in shape)
    if not whole or len(shape) > _MAX_DIMENSIONS or size < 0:
        raise CheckpointError(f"{_DAMAGED}: {name[:80]!r} has a malformed shape")
    if math.prod(shape) * dtype.itemsize != size:
        raise CheckpointError(f"{_DAMAGED}: {name[:80]!r} does not fill the bytes it names")
    array = np.fromfile(file, dtype, size // dtype.itemsize).reshape(shape)
    return array if sys.byteorder == "little" else array.byteswap()
