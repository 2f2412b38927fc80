"""What happens to one image between its file and the batch, in training and in evaluation.

The released recipe: random resized crop, flip, RandAugment (:mod:`vmamba_jax.data.randaugment`),
normalisation, random erasing; in evaluation a resize to 256/224 of the size and a centre crop.
What is done here leaves bytes; the device normalises and erases them. All randomness comes from the
generator that a transform is given, so a sample depends on nothing but the generator's seed.
"""

import math
from dataclasses import dataclass, field
from typing import Protocol, TypeAlias, runtime_checkable

import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from vmamba_jax.data.bands import Bands, Picture
from vmamba_jax.data.errors import DataError
from vmamba_jax.data.randaugment import RandAugment
from vmamba_jax.preprocessing import (
    IMAGENET_MEAN,
    IMAGENET_STD,
    Preprocessing,
    scale_and_shift,
)

Pixels = Float32[np.ndarray, "H W C"]
Values: TypeAlias = UInt8[np.ndarray, "H W C"] | Float32[np.ndarray, "H W C"]
"""What a picture holds: bytes of a photograph, float32 of `Bands`."""


@runtime_checkable
class Transform(Protocol):
    """Makes an image ready for the batch; evaluation transforms leave the generator alone."""

    def __call__(self, image: Picture, rng: np.random.Generator) -> np.ndarray:
        """Image to ``(H, W, C)``, of one size and dtype for all images of a batch."""
        ...


@dataclass(frozen=True)
class TrainTransform:
    """The released training recipe for one image, up to normalisation.

    Attributes:
      size: height and width of the result, in pixels.
      scale: least and greatest share of the image's area that the crop covers.
      ratio: least and greatest aspect ratio of the crop, width to height.
      flip: probability of a left-right flip.
      rand_augment: the RandAugment policy; None for none.
    """

    size: int = 224
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    rand_augment: RandAugment | None = field(default_factory=RandAugment)

    def __call__(self, image: Picture, rng: np.random.Generator) -> Values:
        """Crops, flips and augments."""
        image = random_resized_crop(image, self.size, self.scale, self.ratio, rng)
        if rng.random() < self.flip:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        if self.rand_augment is not None:
            if isinstance(image, Bands):
                raise DataError(
                    "RandAugment works on RGB images of 8 bits: choose data.augmentation light."
                )
            image = self.rand_augment(image, rng)
        return np.asarray(image)


@dataclass(frozen=True)
class EvalTransform:
    """The released evaluation protocol for one image.

    Attributes:
      size: height and width of the result, in pixels; one number for both.
      crop: the share of the resized image that is kept along its tighter side; 224/256 in the
        recipe.
      mean: subtracted from each channel, which runs from 0 to 1.
      std: what each channel is then divided by.
    """

    size: int | tuple[int, int] = 224
    crop: float = 224 / 256
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __call__(self, image: Picture, rng: np.random.Generator | None = None) -> Pixels:
        """Resizes to cover ``size / crop``, crops the centre and normalises."""
        return normalize(self._cropped(image), self.mean, self.std)

    def values(self, image: Picture, rng: np.random.Generator | None = None) -> Values:
        """The same less normalisation, which is left to the device."""
        return np.asarray(self._cropped(image))

    def _cropped(self, image: Picture) -> Picture:
        height, width = (self.size, self.size) if isinstance(self.size, int) else self.size
        image = resize_to_cover(image, int(height / self.crop), int(width / self.crop))
        return center_crop(image, height, width)

    @classmethod
    def of(cls, steps: Preprocessing) -> "EvalTransform":
        """The transform that a model's preprocessing describes."""
        return cls(steps.size, steps.crop, steps.mean, steps.std)


@dataclass(frozen=True)
class DigitsTransform:
    """Training transform for the digits: small shifts, turns and changes of scale, no flip.

    Attributes:
      shift: greatest shift along each axis, as a share of the size.
      degrees: greatest rotation either way.
      scale: greatest relative change of size either way.
    """

    shift: float = 0.06
    degrees: float = 10.0
    scale: float = 0.1

    def __call__(self, image: Picture, rng: np.random.Generator) -> Values:
        """Moves, turns and scales the image about its centre; black where nothing is left."""
        width, height = image.size
        dx, dy, turn, grow = rng.uniform(-1, 1, 4)
        angle, scale = math.radians(turn * self.degrees), 1 + grow * self.scale
        cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
        cx, cy = width / 2, height / 2
        x, y = cx + dx * self.shift * width, cy + dy * self.shift * height
        # Pillow wants the map from a pixel of the result to its place in the original.
        matrix = (cos, sin, cx - cos * x - sin * y, -sin, cos, cy + sin * x - cos * y)
        image = image.transform(
            image.size, Image.Transform.AFFINE, matrix, resample=Image.Resampling.BILINEAR
        )
        return np.asarray(image)


def random_resized_crop(
    image: Picture,
    size: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> Picture:
    """Cuts out a random rectangle and resizes it, bicubic, to ``size`` x ``size``.

    The area is uniform in ``scale`` and the aspect ratio log-uniform in ``ratio``; when ten draws
    do not fit, the largest centred rectangle of an allowed ratio is taken.

    Source: Szegedy et al., "Going Deeper with Convolutions", CVPR 2015, section 6.
    """
    left, top, width, height = _random_box(*image.size, scale, ratio, rng)
    # The box is cut out before the resize: the filter must not see pixels outside of it.
    image = image.crop((left, top, left + width, top + height))
    return image.resize((size, size), Image.Resampling.BICUBIC)


def _random_box(
    width: int,
    height: int,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[int, int, int, int]:
    """Left, top, width and height of the crop."""
    for _ in range(10):
        area = rng.uniform(*scale) * width * height
        aspect = math.exp(rng.uniform(math.log(ratio[0]), math.log(ratio[1])))
        w, h = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if 0 < w <= width and 0 < h <= height:
            top = int(rng.integers(0, height - h, endpoint=True))
            left = int(rng.integers(0, width - w, endpoint=True))
            return left, top, w, h
    # A very long or tiny image: the largest centred box of an allowed aspect ratio.
    w = max(1, min(width, round(height * ratio[1])))
    h = max(1, min(height, round(width / ratio[0])))
    return (width - w) // 2, (height - h) // 2, w, h


def resize_to_cover(image: Picture, height: int, width: int) -> Picture:
    """Resizes, bicubic, keeping the shape, to the smallest image that covers a size.

    For a square that brings the shorter side to its length.
    """
    own_width, own_height = image.size
    if width * own_height >= height * own_width:
        target = (width, max(height, int(width * own_height / own_width)))
    else:
        target = (max(width, int(height * own_width / own_height)), height)
    return image if target == image.size else image.resize(target, Image.Resampling.BICUBIC)


def center_crop(image: Picture, height: int, width: int) -> Picture:
    """Cuts out the centre of an image at least that large."""
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))


def normalize(image: Picture, mean: tuple[float, ...], std: tuple[float, ...]) -> Pixels:
    """To ``(H, W, C)`` float32, ``(value - mean) / std``, where bytes run from 0 to 1.

    Raises:
      ValueError: the image has not as many channels as ``mean`` has values.
    """
    scale, shift = scale_and_shift(255 if isinstance(image, Image.Image) else 1, mean, std)
    # Whole rows at a time: three channels are too short an inner loop for NumPy, ten times slower.
    width, height = image.size
    pixels = np.asarray(image)
    if pixels.size != height * width * len(mean):
        raise ValueError(f"an image of shape {pixels.shape} and {len(mean)} values of mean and std")
    pixels = pixels.reshape(height, width * len(mean)).astype(np.float32)
    pixels *= np.tile(scale, width)
    pixels -= np.tile(shift, width)
    return pixels.reshape(height, width, len(mean))
