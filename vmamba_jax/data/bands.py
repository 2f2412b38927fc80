"""Images of any number of channels and more than 8 bits, for which Pillow has no mode."""

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from PIL import Image

from vmamba_jax.data.errors import DataError

_NPY = b"\x93NUMPY"
_TIFF = (b"II*\0", b"MM\0*", b"II+\0", b"MM\0+")
_MOST_VALUES = 1 << 29  # of one image: 2 GiB in float32


class Bands:
    """An image as one plane of float32 a channel; cut and resized as Pillow does each of them.

    Args:
      planes: Pillow images of mode ``"F"`` and one size. Integers of a file were divided by the
        greatest that their type holds; floating-point numbers are as in the file.
    """

    def __init__(self, planes: Sequence[Image.Image]):
        self.planes = tuple(planes)

    @classmethod
    def from_array(cls, pixels: np.ndarray) -> "Bands":
        """From ``(H, W, C)``, or ``(H, W)``: uint8, uint16 or floating point.

        Raises:
          ValueError: another shape or type, or values that are not finite.
        """
        if pixels.ndim == 2:
            pixels = pixels[:, :, None]
        if pixels.ndim != 3 or not pixels.size:
            raise ValueError(f"an image is (H, W, channels), not {pixels.shape}")
        if pixels.dtype in (np.uint8, np.uint16):
            scale = np.float32(np.iinfo(pixels.dtype).max)
        elif np.issubdtype(pixels.dtype, np.floating):
            scale = np.float32(1)
        else:
            raise ValueError(f"{pixels.dtype} pixels: convert them to uint8, uint16 or float32")
        values = pixels.astype(np.float32) / scale
        if not np.isfinite(values).all():
            raise ValueError("not all of its values are finite")
        return cls([Image.fromarray(plane) for plane in np.moveaxis(values, -1, 0)])

    @property
    def size(self) -> tuple[int, int]:
        """Width and height, in pixels."""
        return self.planes[0].size

    @property
    def width(self) -> int:
        """In pixels."""
        return self.size[0]

    @property
    def height(self) -> int:
        """In pixels."""
        return self.size[1]

    def crop(self, box: tuple[int, int, int, int]) -> "Bands":
        """See `PIL.Image.Image.crop`."""
        return Bands([plane.crop(box) for plane in self.planes])

    def resize(self, size: tuple[int, int], resample: Image.Resampling) -> "Bands":
        """See `PIL.Image.Image.resize`."""
        return Bands([plane.resize(size, resample) for plane in self.planes])

    def transpose(self, method: Image.Transpose) -> "Bands":
        """See `PIL.Image.Image.transpose`."""
        return Bands([plane.transpose(method) for plane in self.planes])

    def transform(
        self,
        size: tuple[int, int],
        method: Image.Transform,
        data: Sequence[Any],
        resample: Image.Resampling,
    ) -> "Bands":
        """See `PIL.Image.Image.transform`."""
        return Bands([plane.transform(size, method, data, resample) for plane in self.planes])

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """``(H, W, C)`` float32."""
        del copy
        return np.stack([np.asarray(plane) for plane in self.planes], axis=-1).astype(
            dtype or np.float32, copy=False
        )

    def preview(self) -> Image.Image:
        """A grey RGB picture to show: the mean over the channels, from darkest to lightest."""
        grey = np.asarray(self).mean(axis=-1)
        grey = (grey - grey.min()) / max(np.ptp(grey), 1e-6)
        return Image.fromarray(np.round(255 * grey).astype(np.uint8)).convert("RGB")


Picture: TypeAlias = Image.Image | Bands
"""An RGB image of bytes, or one of other channels or more bits."""


def is_array(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a NumPy array."""
    return head.startswith(_NPY)


def is_tiff(head: bytes) -> bool:
    """Whether a file that begins with these bytes is a TIFF."""
    return head.startswith(_TIFF)


def read_array(data: bytes | Path) -> np.ndarray:
    """The content of a ``.npy`` file; nothing in it is run.

    Raises:
      ValueError: it is damaged, or claims to be larger than it is.
    """
    content = data if isinstance(data, bytes) else data.read_bytes()
    stream = io.BytesIO(content)
    version = np.lib.format.read_magic(stream)
    readers = {(1, 0): "read_array_header_1_0", (2, 0): "read_array_header_2_0"}
    if version not in readers:
        raise ValueError(f"a .npy file of version {version}: save it with numpy.save")
    shape, by_columns, dtype = getattr(np.lib.format, readers[version])(stream)
    if dtype.hasobject or dtype.itemsize == 0:
        raise ValueError(f"an array of {dtype} is no image")
    rest = memoryview(content)[stream.tell() :]
    count = int(np.prod(shape, dtype=object)) if shape else 1
    if not 0 <= count * dtype.itemsize <= len(rest) or min(shape, default=1) < 0:
        raise ValueError("the file is cut short")
    flat = np.frombuffer(rest, dtype, count)
    return flat.reshape(shape, order="F" if by_columns else "C")


def read_tiff(data: bytes | Path) -> np.ndarray:
    """The first image of a TIFF of any number of bands, as ``(H, W, C)``.

    Raises:
      DataError: tifffile is missing.
      ValueError: its axes are not those of one image, or it is too large.
    """
    try:
        import tifffile  # noqa: PLC0415 (optional)
    except ImportError as error:
        raise DataError(
            "TIFF files of other channels than grey and RGB need the package tifffile: "
            "pip install 'vmamba-jax[tiff]'."
        ) from error
    with tifffile.TiffFile(io.BytesIO(data) if isinstance(data, bytes) else data) as file:
        if not file.series:
            raise ValueError("it holds no image")
        series = file.series[0]
        if series.size > _MOST_VALUES:
            raise ValueError(f"{series.size} values are too many for one image")
        # Bands lie beside one another in a pixel, or one after another as planes or pages.
        others = series.axes.replace("Y", "").replace("X", "")
        if not {"Y", "X"} <= set(series.axes) or len(others) > 1:
            raise ValueError(f"its axes are {series.axes}, shape {series.shape}, not one image's")
        pixels = series.asarray()
        if others:
            pixels = np.moveaxis(pixels, series.axes.index(others), -1)
        return pixels if series.axes.index("Y") < series.axes.index("X") else pixels.swapaxes(0, 1)
