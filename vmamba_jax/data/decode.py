"""What a source yields, and the one place where bytes from strangers become pixels."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypedDict, runtime_checkable

import numpy as np
from PIL import Image

_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF")
"""The only Pillow decoders that a data set may reach, whatever its files claim to be."""


class Sample(TypedDict):
    """One example: an RGB image, uint8, and the index of its class."""

    image: Image.Image
    label: int


@runtime_checkable
class ImageSource(Protocol):
    """A random-access collection of labelled images; must survive pickling to worker processes.

    ``source[i]`` raises :class:`DamagedRecordError` for a record that can't be read.
    """

    @property
    def class_names(self) -> Sequence[str]:
        """Class names, in the order of the labels."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> Sample: ...


class LabelMapSample(TypedDict):
    """One example of segmentation: an RGB image, and as large an "L" image of class indices."""

    image: Image.Image
    label: Image.Image


@runtime_checkable
class LabelMapSource(Protocol):
    """A random-access collection of images with a class for each pixel; else as `ImageSource`.

    A pixel of class 255 (:data:`IGNORED`) belongs to none and is never counted.
    """

    @property
    def class_names(self) -> Sequence[str]:
        """Class names, in the order of the labels."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> LabelMapSample: ...

    def blank(self, index: int) -> LabelMapSample:
        """What stands for a damaged record: as large an image without a single label."""
        ...


IGNORED = 255
"""The label of a pixel that belongs to no class."""


class DataError(ValueError):
    """A data set that can't be used as it is; the message says what is wrong and what to do."""


class DamagedRecordError(Exception):
    """One record can't be read.

    Attributes:
      path: the file, or the file and the row, that holds the record.
      reason: what went wrong.
    """

    def __init__(self, path: str, reason: str):
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path}: {self.reason}"


def decode_image(data: bytes | Path, path: str) -> Image.Image:
    """Decodes one image completely, to RGB.

    EXIF orientation is ignored and transparency is dropped, as torchvision's loader does.

    Args:
      data: the encoded file: its bytes, or where to read them.
      path: what to call the record if it is damaged.

    Returns:
      An RGB image, its pixels in memory.

    Raises:
      DamagedRecordError: the file is missing, is cut, is no image, has one channel of more than 8
        bits, or claims to be so large that decoding it would exhaust memory.
    """
    with _opened(data, path) as image:
        if image.mode in ("F", "I") or image.mode.startswith("I;"):
            # Pillow would clip them, and nearly every pixel would turn white.
            raise ValueError(f"{image.mode} pixels: convert it to 8 bits a channel")
        if image.mode == "P" and "transparency" in image.info:
            return image.convert("RGBA").convert("RGB")  # Pillow warns about the direct way
        return image.convert("RGB")


def decode_label_map(data: bytes | Path, path: str) -> Image.Image:
    """Decodes a label map: a class index for each pixel, in one channel or as a palette's index.

    Args:
      data: the encoded file: its bytes, or where to read them.
      path: what to call the record if it is damaged.

    Returns:
      An "L" image of the indices as the file has them.

    Raises:
      DamagedRecordError: the file can't be read, as in `decode_image`.
      DataError: it is a picture in colours, or has more than 8 bits a pixel.
    """
    with _opened(data, path) as image:
        if image.mode not in ("L", "P", "1"):
            kind = "a picture in colours" if len(image.getbands()) > 1 else "of more than 8 bits"
            raise DataError(
                f"{path}: this label map is {kind} ({image.mode}), but must hold one class index "
                "a pixel: save it with one channel of 8 bits (or with a palette)"
            )
        return Image.fromarray(np.asarray(image).astype(np.uint8))


def image_size(path: Path) -> tuple[int, int]:
    """Height and width of an image, in pixels, from the beginning of its file.

    Raises:
      DamagedRecordError: the file can't be read.
    """
    with _opened(path, str(path)) as image:
        return image.height, image.width


@contextmanager
def _opened(data: bytes | Path, path: str) -> Iterator[Image.Image]:
    """An image of a known format; all that goes wrong with it, but a DataError, is damage."""
    try:
        stream = io.BytesIO(data) if isinstance(data, bytes) else data
        with Image.open(stream, formats=_FORMATS) as image:
            yield image
    except DataError:
        raise
    # A hostile file can make a decoder raise anything at all.
    except Exception as error:
        raise DamagedRecordError(path, f"{type(error).__name__}: {error}") from error
