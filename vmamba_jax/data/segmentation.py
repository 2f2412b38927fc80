"""What happens to an image and its label map between their files and the batch.

The published recipe: random resize, random crop, flip, photometric distortion; in evaluation a
resize of the image alone, as labels are compared at their own size.
"""

from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from vmamba_jax.data.augment import IMAGENET_MEAN, IMAGENET_STD, Pixels, normalize
from vmamba_jax.data.decode import IGNORED
from vmamba_jax.data.resize import fitted_size, resize_bilinear, resize_nearest

LabelMap = UInt8[np.ndarray, "H W"]


@runtime_checkable
class LabelMapTransform(Protocol):
    """Makes an image and its label map ready for the batch."""

    def __call__(
        self, image: Image.Image, label: Image.Image, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """RGB image and "L" label map to float32 ``(H, W, 3)`` and uint8 ``(H, W)``."""
        ...


@dataclass(frozen=True)
class PhotometricDistortion:
    """Random brightness, contrast, saturation and hue, each with a probability of one half.

    Contrast comes before or after the other two, at even odds.

    Attributes:
      brightness: greatest shift either way, of 255.
      contrast: least and greatest factor of all channels.
      saturation: least and greatest factor of the saturation.
      hue: greatest turn of the hue either way, in units of two degrees (of 180).

    Source: Liu et al., "SSD: Single Shot MultiBox Detector", ECCV 2016, in the order of Howard's
    "Some Improvements on Deep Convolutional Neural Network Based Image Classification", 2013.
    """

    brightness: int = 32
    contrast: tuple[float, float] = (0.5, 1.5)
    saturation: tuple[float, float] = (0.5, 1.5)
    hue: int = 18

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Distorts an RGB image."""
        if rng.integers(2):
            shift = rng.uniform(-self.brightness, self.brightness)
            image = image.point(_line(1.0, shift) * 3)
        contrast_last = rng.integers(2)
        if not contrast_last:
            image = self._contrast(image, rng)
        image = self._colour(image, rng)
        if contrast_last:
            image = self._contrast(image, rng)
        return image

    def _contrast(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        if not rng.integers(2):
            return image
        return image.point(_line(rng.uniform(*self.contrast)) * 3)

    def _colour(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Saturation and hue; Pillow's hue goes once around in 255 steps."""
        factor = rng.uniform(*self.saturation) if rng.integers(2) else 1.0
        turn = int(rng.integers(-self.hue, self.hue)) if rng.integers(2) and self.hue else 0
        if factor == 1.0 and not turn:
            return image
        steps = round(turn * 255 / 180)
        table = [*((i + steps) % 255 for i in range(256)), *_line(factor), *range(256)]
        return image.convert("HSV").point(table).convert("RGB")


def _line(factor: float, shift: float = 0.0) -> list[int]:
    """``factor * i + shift`` for every byte, clipped and cut off as the published code does."""
    return np.clip(np.arange(256) * factor + shift, 0, 255).astype(np.uint8).tolist()


@dataclass(frozen=True)
class SegmentationTrainTransform:
    """The published training recipe for an image and its label map.

    The image is resized so that it fits `scale` times a random factor, a square is cut out (again,
    up to ten times, while one class fills too much of it), mirrored at even odds and distorted.
    What the square lacks at the bottom and at the right is zero after normalising, and its label
    255.

    Attributes:
      size: height and width of the result, in pixels.
      scale: longest and shortest side that an image is resized to fit, in pixels, either way round.
      ratio: least and greatest factor of the scale.
      max_share: greatest share of one class among the pixels of a class.
      distortion: what changes the colours; None for nothing.
      mean: subtracted from each channel, which runs from 0 to 1.
      std: what each channel is then divided by.
    """

    size: int = 512
    scale: tuple[int, int] = (2048, 512)
    ratio: tuple[float, float] = (0.5, 2.0)
    max_share: float = 0.75
    distortion: PhotometricDistortion | None = field(default_factory=PhotometricDistortion)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __call__(
        self, image: Image.Image, label: Image.Image, rng: np.random.Generator
    ) -> tuple[Pixels, LabelMap]:
        """Resizes, crops, flips, distorts, normalises and pads."""
        factor = rng.uniform(*self.ratio)
        scale = int(self.scale[0] * factor), int(self.scale[1] * factor)
        height, width = fitted_size(image.height, image.width, scale)
        whole = np.asarray(label)
        rows, columns, cut = self._crop(whole, height, width, rng)
        pixels = resize_bilinear(np.asarray(image), height, width, rows, columns)
        if rng.random() < 0.5:
            pixels, cut = pixels[:, ::-1], cut[:, ::-1]
        picture = Image.fromarray(np.ascontiguousarray(pixels))
        if self.distortion is not None:
            picture = self.distortion(picture, rng)
        missing = (0, self.size - cut.shape[0]), (0, self.size - cut.shape[1])
        normalised = normalize(picture, self.mean, self.std)
        return (
            np.pad(normalised, (*missing, (0, 0))),
            np.pad(cut, missing, constant_values=IGNORED),
        )

    def _crop(
        self, label: np.ndarray, height: int, width: int, rng: np.random.Generator
    ) -> tuple[slice, slice, np.ndarray]:
        """Rows and columns of the resized image, and the label map there."""

        def draw() -> tuple[slice, slice, np.ndarray]:
            top = int(rng.integers(max(height - self.size, 0), endpoint=True))
            left = int(rng.integers(max(width - self.size, 0), endpoint=True))
            rows = slice(top, min(top + self.size, height))
            columns = slice(left, min(left + self.size, width))
            return rows, columns, resize_nearest(label, height, width, rows, columns)

        drawn = draw()
        for _ in range(10):
            counts = np.bincount(drawn[2].ravel(), minlength=256)[:IGNORED]
            if counts.max() < self.max_share * counts.sum():
                break
            drawn = draw()
        return drawn


@dataclass(frozen=True)
class SegmentationEvalTransform:
    """The published evaluation protocol: the image is resized to fit, its label map stays.

    Attributes:
      scale: longest and shortest side that the image is resized to fit, in pixels.
      mean: subtracted from each channel, which runs from 0 to 1.
      std: what each channel is then divided by.
    """

    scale: tuple[int, int] = (2048, 512)
    mean: tuple[float, float, float] = IMAGENET_MEAN
    std: tuple[float, float, float] = IMAGENET_STD

    def __call__(
        self, image: Image.Image, label: Image.Image, rng: np.random.Generator | None = None
    ) -> tuple[Pixels, UInt8[np.ndarray, "label_H label_W"]]:
        """Image to ``(h, w, 3)``, resized and normalised; label map as it is, ``(H, W)``."""
        height, width = fitted_size(image.height, image.width, self.scale)
        pixels = resize_bilinear(np.asarray(image), height, width)
        return normalize(Image.fromarray(pixels), self.mean, self.std), np.asarray(label)
