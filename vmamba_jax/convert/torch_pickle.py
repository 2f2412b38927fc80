"""Interprets the pickle of a PyTorch checkpoint over plain values; nothing in it is ever run.

It can make numbers, strings, lists, dicts, and tensors over storages; any other class or function
that it names becomes an `Opaque` that is never imported and never called.
"""

import io
import pickletools
import sys
from collections.abc import Callable, Iterable
from typing import Any, cast

import numpy as np

from vmamba_jax.convert.opaque import Opaque
from vmamba_jax.convert.torch_tensor import STORAGE_DTYPES, Storage, new_storage, rebuild
from vmamba_jax.errors import CheckpointError

RESAVE = (
    "Re-save it where torch is installed: torch.save({'model': model.state_dict()}, 'weights.pth')"
)

# Far above any real checkpoint; they bound the memory and time that a small hostile file can cost.
_MAX_BYTES = 1 << 26  # of all that a pickle makes, each operation counted as
_OPERATION_BYTES = 128  # the largest object that one makes out of a byte or two
_MAX_BITS = 4096  # of an integer, whose hash and product cost its length each time
_MAX_NAME = 512
# Python hashes strings with a secret, but not numbers: keys could be chosen to collide.
_MAX_KEY = 1 << 60
_MAX_TUPLE, _MAX_TUPLES = 8, 2000

# (key, number of bytes) -> that many bytes, as a one-dimensional uint8 array.
ReadStorage = Callable[[str, int], np.ndarray]


class Interpreter:
    """Executes the operations of one pickle over plain values; a refusal for every other one."""

    def __init__(self, read_storage: ReadStorage, byteorder: str = "little"):
        self._tuple_keys = 0
        self._read_storage = read_storage
        self._byteorder = byteorder
        self.storages: dict[str, Storage] = {}

    def run(self, program: io.BytesIO | io.BufferedReader) -> Any:
        """The value of the pickle that begins where `program` stands.

        Raises:
            CheckpointError: it is damaged, or does what no checkpoint needs.
        """
        stack: list[Any] = []
        below: list[list[Any]] = []  # the stack under each mark
        memo: dict[int, Any] = {}
        steps = cast("Iterable[tuple[Any, Any, Any]]", pickletools.genops(program))
        spent = 0
        for operation, arg, _ in steps:
            spent += _cost(arg)
            if spent > _MAX_BYTES:
                raise CheckpointError(
                    f"its pickle makes more than {_MAX_BYTES >> 20} MiB of objects beside the "
                    f"tensors. {RESAVE}"
                )
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
                    | ("BINBYTES" | "SHORT_BINBYTES" | "BINBYTES8" | "BYTEARRAY8")
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
                case "FROZENSET":
                    stack = below.pop()
                    stack.append(Opaque("builtins.frozenset"))
                case "APPEND":
                    item = stack.pop()
                    _extend(stack[-1], [item])
                case "APPENDS" | "ADDITEMS":
                    items, stack = stack, below.pop()
                    _extend(stack[-1], items)
                case "SETITEM":
                    value, key = stack.pop(), stack.pop()
                    self._set_items(stack[-1], [key, value])
                case "SETITEMS":
                    items, stack = stack, below.pop()
                    self._set_items(stack[-1], items)
                case "GLOBAL":
                    stack.append(_named(*arg.split(" ", 1)))
                case "STACK_GLOBAL":
                    name, module = stack.pop(), stack.pop()
                    stack.append(_named(module, name))
                case "REDUCE" | "NEWOBJ":
                    args, function = stack.pop(), stack.pop()
                    stack.append(self._call(function, args))
                case "NEWOBJ_EX":
                    _, args, function = stack.pop(), stack.pop(), stack.pop()
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
            case "torch.Size" if len(args) == 1 and isinstance(args[0], tuple | list):
                return args[0]
            case name:
                tensor = rebuild(name, args)
                return Opaque(name) if tensor is None else tensor

    def _set_items(self, target: object, items: list[Any]) -> None:
        if isinstance(target, Opaque):
            target = target.items
        if not isinstance(target, dict) or len(items) % 2:
            raise CheckpointError("damaged: items set on something that is no dict")
        for key, value in zip(items[::2], items[1::2], strict=True):
            # Only flat keys: the hash of a deeply nested tuple overflows the interpreter's own
            # stack.
            parts = key if isinstance(key, tuple) else (key,)
            self._tuple_keys += isinstance(key, tuple)
            if len(parts) > _MAX_TUPLE or self._tuple_keys > _MAX_TUPLES:
                raise CheckpointError(f"refused: dict keys that are long or many tuples. {RESAVE}")
            for part in parts:
                if not isinstance(part, _KEYS) or (isinstance(part, int) and abs(part) >= _MAX_KEY):
                    raise CheckpointError(f"refused: a dict key of type {type(key).__name__}")
            target[key] = value

    def _storage(self, identity: object) -> Storage | Opaque:
        match identity:
            case ("storage", Opaque() as kind, str() as key, str(), int() as count, *view):
                pass
            case _:
                raise CheckpointError("damaged: a reference to something that is no storage")
        if view not in ([], [None]):
            raise CheckpointError(f"refused: a view of a storage. {RESAVE}")
        if kind.name not in STORAGE_DTYPES:
            return Opaque(kind.name)
        if len(key) > _MAX_NAME or type(count) is not int or not 0 <= count < 1 << 60:
            raise CheckpointError("damaged: a storage with a malformed name or size")
        if key not in self.storages:
            content = self._read_storage(key, count * STORAGE_DTYPES[kind.name].itemsize)
            self.storages[key] = new_storage(kind.name, content, self._byteorder)
        return self.storages[key]


def _cost(arg: object) -> int:
    if isinstance(arg, str | bytes | bytearray):
        return _OPERATION_BYTES + sys.getsizeof(arg)
    if isinstance(arg, int) and arg.bit_length() > _MAX_BITS:
        raise CheckpointError(f"damaged: an integer of {arg.bit_length()} bits")
    return _OPERATION_BYTES


def _named(module: object, name: object) -> Opaque:
    if not isinstance(module, str) or not isinstance(name, str):
        raise CheckpointError("damaged: a class whose name is no string")
    if len(module) + len(name) > _MAX_NAME:
        raise CheckpointError(f"damaged: a class name of over {_MAX_NAME} characters")
    return Opaque(f"{module}.{name}")


def _extend(target: object, items: list[Any]) -> None:
    if isinstance(target, list):
        target.extend(items)
    elif not isinstance(target, Opaque):
        raise CheckpointError("damaged: items appended to something that is no list")


_KEYS = (str, bytes, int, float, type(None), Opaque)
