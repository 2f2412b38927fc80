"""Folders and files are those of a file system: what to say of a bucket's address."""

import os
import re
from collections.abc import Iterable
from pathlib import Path

# pathlib makes gs:/bucket of gs://bucket, and would make a folder "gs:". A drive has one letter.
_ADDRESS = re.compile(r"[A-Za-z][A-Za-z0-9+.-]+:/")
_FETCHED = ("http://", "https://")


class NotLocalError(ValueError):
    """An address where a folder or a file of a file system is needed."""

    def __init__(self, address: str) -> None:
        super().__init__(
            f"{address}: an address, and what is read and written here are folders and files: "
            "mount the bucket (gcsfuse, s3fs, blobfuse) and give its folder"
        )


def local_path(path: str | os.PathLike[str]) -> Path:
    """A path, unless it is an address, such as that of a bucket.

    Raises:
        NotLocalError: it is one.
    """
    if _ADDRESS.match(os.fspath(path)):
        raise NotLocalError(os.fspath(path))
    return Path(path)


def check_arguments(arguments: Iterable[str]) -> None:
    """Refuses a command line that names a bucket, before anything is done.

    Of the web, weights are fetched; what takes them says what else can't be.

    Raises:
        NotLocalError: naming the address.
    """
    for argument in arguments:
        value = argument.partition("=")[2] if argument.startswith("--") else argument
        if not value.startswith(_FETCHED):
            local_path(value)
