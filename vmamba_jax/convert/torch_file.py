"""Reads PyTorch checkpoint files into NumPy, without torch and without running what is inside.

A checkpoint is a pickle beside raw storages, and a pickle is a program: unpickling a stranger's
file runs whatever it names. Here the program is interpreted over plain values instead. It can make
numbers, strings, lists, dicts, and tensors over bounds-checked storages; any other class or
function it names becomes an `Opaque` that is never imported and never called.

Formats: the zip archive of torch >= 1.6 and the stream of pickles before it.
"""

import io
import os
import struct
import zipfile
from collections.abc import Callable
from typing import Any

import numpy as np

from vmamba_jax.convert.opaque import Opaque
from vmamba_jax.convert.torch_pickle import RESAVE, Interpreter
from vmamba_jax.errors import CheckpointError

SHARDS = (
    "a part of a torch.distributed.checkpoint folder. Make one file of the folder where torch is "
    "installed: python -m torch.distributed.checkpoint.format_utils dcp_to_torch DIR FILE"
)

# Far above any real checkpoint; they bound the memory and time that a small hostile file can cost.
_MAX_PICKLE_BYTES = 1 << 26
_MAX_READ_BYTES = 1 << 23  # at once: the archive's directory, a string in the pickle
_MAX_WORD = 16  # what an archive says in a member of its own
_CHUNK = 1 << 20

_LEGACY_MAGIC = 0x1950A86A20F9469CFC6C
_LEGACY_PROTOCOL = 1001


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
    with _File(io.FileIO(path)) as file:
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
            reason = " ".join(str(error)[:200].split())
            raise CheckpointError(f"{path}: damaged or not a checkpoint ({reason})") from error


class _File(io.BufferedReader):
    """A file whose single reads are bounded: what is in it says how long they should be."""

    def read(self, size: int | None = -1, /) -> bytes:
        if size is not None and size > _MAX_READ_BYTES:
            raise CheckpointError(
                f"damaged: {size} bytes to read at once, and no checkpoint needs more than "
                f"{_MAX_READ_BYTES >> 20} MiB"
            )
        return super().read(size)

    def readline(self, size: int | None = -1, /) -> bytes:
        return super().readline(_MAX_READ_BYTES)


def _load_zip(file: _File) -> Any:
    try:
        archive = zipfile.ZipFile(file)
    except (zipfile.BadZipFile, EOFError) as error:
        raise CheckpointError(
            "cut short or damaged: the directory at the end of the zip archive is missing. "
            "Download or copy it again"
        ) from error
    if archive.infolist() and min(info.header_offset for info in archive.infolist()):
        raise CheckpointError(f"several archives in one file: {SHARDS}")  # the last is one tensor
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

    order = "little"
    if (word := members.get(root + "byteorder")) is not None:
        if word.file_size > _MAX_WORD:
            raise CheckpointError(f"damaged: a byte order of {word.file_size} bytes")
        order = read("byteorder").tobytes().decode()
    if members[roots[0]].file_size > _MAX_PICKLE_BYTES:
        raise CheckpointError(f"its pickle is larger than {_MAX_PICKLE_BYTES >> 20} MiB. {RESAVE}")
    program = _File(io.BytesIO(read("data.pkl").data))
    return Interpreter(lambda key, size: read(f"data/{key}", size), order).run(program)


def _load_legacy(file: _File) -> Any:
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
        return Interpreter(_no_storage).run(file)

    first = plain()
    if isinstance(first, Opaque) and first.name.startswith("torch.distributed.checkpoint."):
        raise CheckpointError(SHARDS)
    if first != _LEGACY_MAGIC or plain() != _LEGACY_PROTOCOL:
        raise CheckpointError(f"a pickle, but not of torch.save. {RESAVE}")
    system = plain()
    if not isinstance(system, dict) or system.get("little_endian") is not True:
        raise CheckpointError(f"an old checkpoint written on a big-endian machine. {RESAVE}")
    interpreter = Interpreter(reserve)
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
