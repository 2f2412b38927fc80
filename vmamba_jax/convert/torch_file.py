"""Reads PyTorch checkpoint files into NumPy, without torch and without running what is inside.

A checkpoint is a pickle beside raw storages, and a pickle is a program: unpickling a stranger's
file runs whatever it names. Here the program is interpreted over plain values instead. It can make
numbers, strings, lists, dicts, and tensors over bounds-checked storages; any other class or
function it names becomes an `Opaque` that is never imported and never called.

Formats: the zip archive of torch >= 1.6 and the stream of pickles before it.
"""

import dataclasses
import io
import os
import pickletools
import struct
import sys
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, cast

import ml_dtypes
import numpy as np

from vmamba_jax.errors import CheckpointError

RESAVE = (
    "Re-save it where torch is installed: torch.save({'model': model.state_dict()}, 'weights.pth')"
)

# Far above any real checkpoint; they bound the memory and time that a small hostile file can cost.
_MAX_PICKLE_BYTES = 1 << 29
_MAX_OPERATIONS = 5_000_000
_MAX_NAME = 512
_MAX_DIMENSIONS = 32
_CHUNK = 1 << 20

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001

_STORAGE_DTYPES = {
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
}


@dataclasses.dataclass(eq=False, slots=True, repr=False)
class Opaque:
    """Stands for a class, a function or an instance that the reader knows only by name.

    Attributes:
        name: dotted name that the file gave, such as ``"yacs.config.CfgNode"``.
        items: what the file stored by key in it, for subclasses of dict; else empty.
    """

    name: str
    items: dict[Any, Any] = dataclasses.field(default_factory=dict)

    def __repr__(self) -> str:
        return f"<opaque {self.name}>"  # not the items: they may nest without end


def load_torch_file(path: str | os.PathLike[str]) -> Any:
    """Reads what `torch.save` wrote.

    Nothing in the file is imported or called, and memory stays near the file's size whatever
    sizes the file declares.

    Args:
        path: a ``.pth`` or ``.pt`` file.

    Returns:
        The saved object: dicts, lists, tuples, scalars; `np.ndarray` for tensors (``bfloat16``
        from `ml_dtypes`), sharing memory where the tensors shared a storage; `Opaque` for the rest.

    Raises:
        CheckpointError: not a checkpoint, cut short, damaged, or of a kind this reader refuses.
        OSError: the file can't be opened.
    """
    with Path(path).open("rb") as file:
        try:
            head = file.read(4)
            if head == b"PK\x03\x04":
                return _load_zip(file)
            if head[:1] == b"\x80":
                return _load_legacy(file)
            file.seek(0)
            raise CheckpointError(
                f"not a PyTorch checkpoint: it begins with {file.read(16)!r}. "
                "Check that the download gave the file and not a web page"
            )
        except CheckpointError as error:
            raise CheckpointError(f"{path}: {error}") from error.__cause__
        except (
            Exception
        ) as error:  # what damaged bytes provoke in the parsers is never our caller's
            raise CheckpointError(f"{path}: damaged or not a checkpoint ({error})") from error


@dataclasses.dataclass(eq=False, slots=True)
class _Storage:
    dtype: np.dtype
    bytes: np.ndarray


# (key, number of bytes) -> that many bytes, as a one-dimensional uint8 array.
_ReadStorage = Callable[[str, int], np.ndarray]


def _load_zip(file: io.BufferedReader) -> Any:
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(
            "cut short or damaged: the directory at the end of the zip archive is missing. "
            "Download or copy it again"
        ) from error
    members = {info.filename: info for info in archive.infolist()}
    if len(members) != len(archive.infolist()):
        raise CheckpointError("damaged: two members of the zip archive share one name")
    roots = [name for name in members if name.count("/") == 1 and name.endswith("/data.pkl")]
    if len(roots) != 1:
        raise CheckpointError("a zip archive, but not a PyTorch checkpoint: it has no data.pkl")
    root = roots[0].removesuffix("data.pkl")
    room = os.fstat(file.fileno()).st_size

    def read(name: str, size: int | None = None) -> np.ndarray:
        nonlocal room
        info = members.get(root + name)
        if info is None:
            raise CheckpointError(f"damaged: {name!r} is missing from the archive")
        if info.compress_type != zipfile.ZIP_STORED or info.flag_bits & 1:
            raise CheckpointError(
                f"{name!r} is compressed or encrypted, which torch.save never does. {RESAVE}"
            )
        if size is not None and size != info.file_size:
            raise CheckpointError(
                f"damaged: storage {name!r} declares {size} bytes and holds {info.file_size}"
            )
        room -= info.file_size  # members that overlap could otherwise add up to any size
        if room < 0:
            raise CheckpointError("damaged: its members add up to more than the file")
        content = np.empty(info.file_size, np.uint8)
        with archive.open(info) as member:  # verifies the checksum
            _fill(member.read, content)
        return content

    order = read("byteorder").tobytes().decode() if root + "byteorder" in members else "little"
    if members[roots[0]].file_size > _MAX_PICKLE_BYTES:
        raise CheckpointError(f"its pickle is larger than {_MAX_PICKLE_BYTES >> 20} MiB. {RESAVE}")
    program = io.BytesIO(read("data.pkl").tobytes())
    return _Interpreter(lambda key, size: read(f"data/{key}", size), order).run(program)


def _load_legacy(file: io.BufferedReader) -> Any:
    file.seek(0)
    room = os.fstat(file.fileno()).st_size
    contents: dict[str, np.ndarray] = {}

    def reserve(key: str, size: int) -> np.ndarray:
        nonlocal room
        room -= size
        if room < 0:
            raise CheckpointError("damaged or cut short: it declares more bytes than it holds")
        contents[key] = np.empty(size, np.uint8)  # the bytes follow after the pickles
        return contents[key]

    def plain() -> Any:
        return _Interpreter(_no_storage).run(file)

    if plain() != _LEGACY_MAGIC or plain() != _LEGACY_PROTOCOL:
        raise CheckpointError(f"a pickle, but not of torch.save. {RESAVE}")
    system = plain()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"an old checkpoint written on a big-endian machine. {RESAVE}")
    interpreter = _Interpreter(reserve)
    result = interpreter.run(file)
    order = plain()
    if not isinstance(order, list) or not all(isinstance(key, str) for key in order):
        raise CheckpointError("damaged: its list of storages is not a list of names")
    if sorted(order) != sorted(contents):
        raise CheckpointError("damaged: its list of storages does not match its tensors")
    for key in order:
        (count,) = struct.unpack("<q", file.read(8))
        if count != len(contents[key]) // interpreter.storages[key].dtype.itemsize:
            raise CheckpointError(f"damaged: storage {key!r} is not of the size it was declared")
        _fill(file.read, contents[key])
    return result


def _no_storage(key: str, size: int) -> np.ndarray:
    raise CheckpointError(f"damaged: storage {key!r} of {size} bytes in the file's header")


def _fill(read: Callable[[int], bytes], content: np.ndarray) -> None:
    filled = 0
    while filled < len(content):
        chunk = read(min(_CHUNK, len(content) - filled))
        if not chunk:
            raise CheckpointError("cut short: a storage ends before its declared size")
        content.data[filled : filled + len(chunk)] = chunk
        filled += len(chunk)


class _Interpreter:
    """Executes the operations of one pickle over plain values; a refusal for every other one."""

    def __init__(self, read_storage: _ReadStorage, byteorder: str = "little"):
        self._read_storage = read_storage
        self._byteorder = byteorder
        self.storages: dict[str, _Storage] = {}

    def run(self, program: io.BytesIO | io.BufferedReader) -> Any:
        stack: list[Any] = []
        below: list[list[Any]] = []  # the stack under each mark
        memo: dict[int, Any] = {}
        steps = cast("Iterable[tuple[Any, Any, Any]]", pickletools.genops(program))
        for count, (operation, arg, _) in enumerate(steps):
            if count > _MAX_OPERATIONS:
                raise CheckpointError(f"its pickle runs to over {_MAX_OPERATIONS} steps. {RESAVE}")
            match operation.name:
                case "BINGET" | "LONG_BINGET" | "GET":
                    stack.append(memo[arg])
                case "BINPUT" | "LONG_BINPUT" | "PUT":
                    memo[arg] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case (
                    ("BININT1" | "BININT2" | "BININT" | "LONG1" | "LONG4" | "BINFLOAT")
                    | ("BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8")
                    | ("BINSTRING" | "SHORT_BINSTRING")
                    | ("BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8")
                ):
                    stack.append(arg)
                case "NONE":
                    stack.append(None)
                case "NEWTRUE":
                    stack.append(True)
                case "NEWFALSE":
                    stack.append(False)
                case "MARK":
                    below.append(stack)
                    stack = []
                case "TUPLE":
                    items, stack = stack, below.pop()
                    stack.append(tuple(items))
                case "EMPTY_TUPLE":
                    stack.append(())
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    length = int(operation.name[-1])
                    items = [stack.pop() for _ in range(length)]
                    stack.append(tuple(reversed(items)))
                case "EMPTY_LIST":
                    stack.append([])
                case "EMPTY_DICT":
                    stack.append({})
                case "EMPTY_SET":
                    stack.append(Opaque("builtins.set"))
                case "APPEND":
                    item = stack.pop()
                    _extend(stack[-1], [item])
                case "APPENDS" | "ADDITEMS":
                    items, stack = stack, below.pop()
                    _extend(stack[-1], items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    _set_items(stack[-1], [key, value])
                case "SETITEMS":
                    items, stack = stack, below.pop()
                    _set_items(stack[-1], items)
                case "GLOBAL":
                    stack.append(_named(*arg.split(" ", 1)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(_named(module, name))
                case "REDUCE" | "NEWOBJ":
                    args, function = stack.pop(), stack.pop()
                    stack.append(self._call(function, args))
                case "BUILD":
                    # Attributes beside the items, such as a state dict's _metadata: not weights.
                    stack.pop()
                    if not isinstance(stack[-1], dict | Opaque | np.ndarray):
                        raise CheckpointError("damaged: attributes set on a plain value")
                case "BINPERSID":
                    stack.append(self._storage(stack.pop()))
                case "POP":
                    stack.pop()
                case "POP_MARK":
                    stack = below.pop()
                case "PROTO" | "FRAME" | "STOP":
                    pass
                case refused:
                    raise CheckpointError(f"refused: pickle operation {refused}. {RESAVE}")
        return stack.pop()

    def _call(self, function: object, args: object) -> Any:
        if not isinstance(function, Opaque) or not isinstance(args, tuple):
            raise CheckpointError("damaged: a call of something that is no function")
        match function.name:
            case "collections.OrderedDict" if not args:
                return {}
            case "torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor":
                return _view(*args[:4])
            case "torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state":
                return args[0]
            case "torch.Size" if len(args) == 1 and isinstance(args[0], tuple | list):
                return args[0]
            case name:
                return Opaque(name)

    def _storage(self, identity: object) -> _Storage | Opaque:
        match identity:
            case ("storage", Opaque() as kind, str() as key, str(), int() as count, *view):
                pass
            case _:
                raise CheckpointError("damaged: a reference to something that is no storage")
        if view not in ([], [None]):
            raise CheckpointError(f"refused: a view of a storage. {RESAVE}")
        dtype = _STORAGE_DTYPES.get(kind.name)
        if dtype is None:
            return Opaque(kind.name)
        if len(key) > _MAX_NAME or type(count) is not int or count < 0:
            raise CheckpointError("damaged: a storage with a malformed name or size")
        if key not in self.storages:
            content = self._read_storage(key, count * dtype.itemsize)
            if self._byteorder != sys.byteorder:
                content.view(f"u{dtype.itemsize}").byteswap(inplace=True)
            self.storages[key] = _Storage(dtype, content)
        return self.storages[key]


def _named(module: object, name: object) -> Opaque:
    if not isinstance(module, str) or not isinstance(name, str):
        raise CheckpointError("damaged: a class whose name is no string")
    if len(module) + len(name) > _MAX_NAME:
        raise CheckpointError(f"damaged: a class name of over {_MAX_NAME} characters")
    return Opaque(f"{module}.{name}")


def _view(storage: object, offset: object, shape: object, strides: object) -> np.ndarray | Opaque:
    if isinstance(storage, Opaque):
        return Opaque(f"tensor over a {storage.name}")
    if (
        not isinstance(storage, _Storage)
        or not isinstance(shape, tuple)
        or not isinstance(strides, tuple)
        or not len(shape) == len(strides) <= _MAX_DIMENSIONS
        or not all(type(n) is int and n >= 0 for n in (offset, *shape, *strides))
    ):
        raise CheckpointError("damaged: a tensor with a malformed storage, shape or stride")
    assert isinstance(offset, int)
    size = storage.dtype.itemsize
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
        return np.empty(shape, storage.dtype)
    return np.ndarray(
        shape, storage.dtype, storage.bytes, offset * size, tuple(n * size for n in strides)
    )


def _extend(target: object, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Opaque):
        raise CheckpointError("damaged: items appended to something that is no list")


def _set_items(target: object, items: list[Any]) -> None:
    if isinstance(target, Opaque):
        target = target.items
    if not isinstance(target, dict) or len(items) % 2:
        raise CheckpointError("damaged: items set on something that is no dict")
    for key, value in zip(items[::2], items[1::2], strict=True):
        # Only flat keys: the hash of a deeply nested tuple overflows the interpreter's own stack.
        flat = key if isinstance(key, tuple) else (key,)
        if not all(isinstance(part, _KEYS) for part in flat):
            raise CheckpointError(f"refused: a dict key of type {type(key).__name__}")
        target[key] = value


_KEYS = (str, bytes, int, float, type(None), Opaque)
