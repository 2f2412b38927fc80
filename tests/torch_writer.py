"""Writes files as `torch.save` does, without torch: zip, pickle protocol 2, 64-byte alignment."""

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, NamedTuple

import ml_dtypes
import numpy as np

_STORAGES = {
    np.dtype(ml_dtypes.bfloat16): "BFloat16Storage",
    np.dtype(np.float32): "FloatStorage",
    np.dtype(np.float16): "HalfStorage",
    np.dtype(np.float64): "DoubleStorage",
    np.dtype(np.int64): "LongStorage",
}
_ALIGNMENT = 64


class Raw(NamedTuple):
    """Pickle operations that leave one value on the stack, written as they are."""

    operations: bytes


def reference(module: str, name: str) -> bytes:
    return pickle.GLOBAL + f"{module}\n{name}\n".encode()


def save(path: Path, value: Any, byteorder: str = "little") -> None:
    """Saves nested dicts, lists and scalars with arrays as tensors."""
    storages: list[np.ndarray] = []
    program = pickle.PROTO + b"\x02" + _operations(value, storages) + pickle.STOP
    swap = byteorder != "little"
    save_members(
        path,
        {
            "data.pkl": program,
            ".format_version": b"1",
            ".storage_alignment": b"64",
            "byteorder": byteorder.encode(),
            **{
                f"data/{i}": (a.byteswap() if swap else a).view(np.uint8)
                for i, a in enumerate(storages)
            },
            "version": b"3\n",
        },
    )


def save_members(path: Path, members: dict[str, Any]) -> None:
    """Writes the archive around given members."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        for name, content in members.items():
            info = zipfile.ZipInfo(f"{path.stem}/{name}")
            assert archive.fp is not None
            start = archive.fp.tell() + 30 + len(info.filename) + 4
            padding = -start % _ALIGNMENT
            info.extra = struct.pack("<HH", 0x4246, padding) + b"Z" * padding
            with archive.open(info, "w") as member:
                member.write(content)


def _operations(value: Any, storages: list[np.ndarray]) -> bytes:
    match value:
        case Raw(operations):
            return operations
        case bool():
            return pickle.NEWTRUE if value else pickle.NEWFALSE
        case None:
            return pickle.NONE
        case int():
            encoded = pickle.encode_long(value)
            return pickle.LONG1 + bytes([len(encoded)]) + encoded
        case float():
            return pickle.BINFLOAT + struct.pack(">d", value)
        case str():
            return pickle.BINUNICODE + struct.pack("<I", len(value.encode())) + value.encode()
        case tuple():
            return pickle.MARK + _all(value, storages) + pickle.TUPLE
        case list():
            return pickle.EMPTY_LIST + pickle.MARK + _all(value, storages) + pickle.APPENDS
        case dict():
            items = [part for item in value.items() for part in item]
            return pickle.EMPTY_DICT + pickle.MARK + _all(items, storages) + pickle.SETITEMS
        case np.ndarray():
            return _tensor(value, storages)
    raise TypeError(type(value))


def _all(values: Any, storages: list[np.ndarray]) -> bytes:
    return b"".join(_operations(value, storages) for value in values)


def _tensor(array: np.ndarray, storages: list[np.ndarray]) -> bytes:
    array = np.ascontiguousarray(array).reshape(array.shape)
    storage = Raw(reference("torch", _STORAGES[array.dtype]))
    identity = ("storage", storage, str(len(storages)), "cpu", array.size)
    storages.append(array.reshape(-1))
    strides = tuple(stride // array.itemsize for stride in array.strides)
    hooks = Raw(reference("collections", "OrderedDict") + pickle.EMPTY_TUPLE + pickle.REDUCE)
    persistent = Raw(_operations(identity, storages) + pickle.BINPERSID)
    args = (persistent, 0, array.shape, strides, False, hooks)
    return (
        reference("torch._utils", "_rebuild_tensor_v2")
        + _operations(args, storages)
        + pickle.REDUCE
    )
