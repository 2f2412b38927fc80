"""What a source yields, and the one place where bytes from strangers become pixels."""

import io
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol, TypedDict, runtime_checkable

import numpy as np
from PIL import Image, UnidentifiedImageError, features

from vmamba_jax.data.bands import Bands, Picture, is_array, is_tiff, read_array, read_tiff
from vmamba_jax.data.errors import DamagedRecordError, DataError

EXTENSIONS = (
    *(".jpg", ".jpeg", ".png", ".webp", ".bmp", ".ppm", ".pgm", ".tif", ".tiff"),
    *(".gif", ".jp2", ".avif", ".npy"),
)
"""What the names of image files end in, wherever folders of images are taken."""
_FORMATS = (
    *("JPEG", "PNG", "WEBP", "BMP", "PPM", "TIFF", "GIF"),
    *(["JPEG2000"] if "jpg_2000" in features.get_supported() else []),
    *(["AVIF"] if "avif" in features.get_supported() else []),
)
"""The only Pillow decoders that a data set may reach, whatever its files claim to be."""
_NAMED = {
    "AVIF": (b"ftypavif", b"ftypavis"),
    "JPEG 2000": (b"\0\0\0\x0cjP  ", b"\xff\x4f\xff\x51"),
    "HEIC": (b"ftypheic", b"ftypheix", b"ftyphevc", b"ftypmif1", b"ftypmsf1"),
    "JPEG XL": (b"\xff\x0a", b"\0\0\0\x0cJXL "),
    "PostScript": (b"%!PS",),
    "PDF": (b"%PDF",),
    "Photoshop": (b"8BPS",),
    "HTML": (b"<!doctype html", b"<html"),
    "Git LFS": (b"version https://git-lfs",),
}
"""What else is met among images, by the beginning of the file; of MPEG-4's kin after four bytes."""

_HEAD = 32  # bytes that tell what a file is


class Sample(TypedDict):
    """One example: an image, and the index of its class."""

    image: Picture
    label: int


@runtime_checkable
class ImageSource(Protocol):
    """A random-access collection of labelled images: two methods, and the names of the classes.

    It must survive pickling to worker processes. ``source[i]`` gives the image as an RGB Pillow
    image (:func:`decode_image` makes one, or `Bands` of more channels) and its class as an index
    into ``class_names``; it raises :class:`DamagedRecordError` for a record that can't be read,
    which is then replaced or left out. Any other exception ends the run.
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


def decode_image(data: bytes | Path, path: str, channels: int = 3) -> Picture:
    """Decodes one image completely.

    EXIF orientation is ignored and, where RGB or grey is asked for, transparency is dropped, as
    torchvision's loader does.

    Args:
      data: the encoded file: its bytes, or where to read them. Beside Pillow's formats a NumPy
        array ``(H, W, C)`` (``.npy``) and a TIFF of any number of bands.
      path: what to call the record if it is damaged.
      channels: how many are wanted. One grey channel serves for three, and colours for one.

    Returns:
      The image, its pixels in memory: RGB for three channels of bytes, else `Bands`. Of a grey
      image of 16 bits the upper 8 make an RGB image, and all 16 one channel. Of an animation it is
      the first frame.

    Raises:
      DamagedRecordError: the file is missing, is cut, is no image, has other channels, or claims
        to be so large that decoding it would exhaust memory.
      DataError: it takes a package that is not installed.
    """
    with _damage(path):
        try:
            return _by_pillow(data, channels)
        except _NotForPillowError as error:
            head = _head(data)
            if is_array(head):
                return _bands(read_array(data), channels)
            if is_tiff(head):
                return _bands(read_tiff(data), channels)
            raise ValueError(str(error)) from None


def decode_rgb(data: bytes | Path, path: str) -> Image.Image:
    """Decodes one photograph: `decode_image` for what takes colours of 8 bits alone.

    Raises:
      DamagedRecordError: it can't be read, or is no such image.
      DataError: it takes a package that is not installed.
    """
    image = decode_image(data, path)
    if not isinstance(image, Image.Image):
        raise DamagedRecordError(path, "its channels are not of 8 bits")
    return image


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
def _damage(path: str) -> Iterator[None]:
    """All that goes wrong with a file, but a DataError, is damage."""
    try:
        yield
    except DataError:
        raise
    # A hostile file can make a decoder raise anything at all.
    except Exception as error:
        raise DamagedRecordError(path, f"{type(error).__name__}: {error}") from error


@contextmanager
def _opened(data: bytes | Path, path: str) -> Iterator[Image.Image]:
    """An image of a format that Pillow knows."""
    with _damage(path), _open(data) as image:
        yield image


class _NotForPillowError(ValueError):
    """An image that Pillow can't read, or not as what it is."""


def _open(data: bytes | Path) -> Image.Image:
    stream = io.BytesIO(data) if isinstance(data, bytes) else data
    try:
        return Image.open(stream, formats=_FORMATS)
    except UnidentifiedImageError:
        raise _NotForPillowError(_unknown(_head(data))) from None


def _unknown(head: bytes) -> str:
    """What to say of a file that no decoder takes."""
    start = head.lower()
    for name, marks in _NAMED.items():
        if any(start.startswith(mark.lower()) or start[4:].startswith(mark) for mark in marks):
            return f"{name} can't be read here: convert it to JPEG or PNG"
    return f"not a readable image of a format that is known ({', '.join(_FORMATS)}, NumPy)"


def _by_pillow(data: bytes | Path, channels: int) -> Picture:
    with _open(data) as image:
        if channels not in (1, 3):
            if len(image.getbands()) != channels:
                raise _NotForPillowError(
                    f"it has {len(image.getbands())} channels ({image.mode}), not {channels}"
                )
            return _bands(np.asarray(image), channels)
        if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PPM"):
            grey = np.asarray(image).astype(np.uint16)
            if channels == 3:
                return Image.fromarray(np.round(grey / 257).astype(np.uint8)).convert("RGB")
            return _bands(grey, channels)
        if image.mode == "F" and channels == 1:
            return _bands(np.asarray(image), channels)
        if image.mode in ("F", "I"):
            # Pillow would clip them, and nearly every pixel would turn white.
            raise ValueError(f"{image.mode} pixels: convert it to 8 or 16 bits a channel")
        rgb = image
        if image.mode == "P" and "transparency" in image.info:
            rgb = image.convert("RGBA")  # Pillow warns about the direct way
        if channels == 3:
            return rgb.convert("RGB")
        return _bands(np.asarray(rgb if rgb.mode == "L" else rgb.convert("RGB").convert("L")), 1)


def _head(data: bytes | Path) -> bytes:
    if isinstance(data, bytes):
        return data[:_HEAD]
    with data.open("rb") as file:
        return file.read(_HEAD)


def _bands(pixels: np.ndarray, channels: int) -> Picture:
    held = 1 if pixels.ndim == 2 else pixels.shape[-1]
    if held == 1 and channels == 3:
        pixels = np.repeat(pixels.reshape(*pixels.shape[:2], 1), 3, axis=-1)
    elif held != channels:
        raise ValueError(f"it has {held} channels {pixels.shape}, not {channels}")
    if channels == 3 and pixels.dtype == np.uint8 and pixels.ndim == 3:
        return Image.fromarray(pixels)
    return Bands.from_array(pixels)
