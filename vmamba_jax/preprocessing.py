"""What is done to an image in evaluation before a model sees it; kept beside the weights."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, TypeVar

import jax.numpy as jnp
import numpy as np

from vmamba_jax.typing import Array, Float, Images

Value = TypeVar("Value")

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
_LARGEST = 1 << 14  # pixels along a side


@dataclasses.dataclass(frozen=True)
class Preprocessing:
    """Resize, centre crop and normalisation, as the weights were evaluated with them.

    Attributes:
        image_size: height and width of the crop, in pixels; one number for both.
        crop: the share of the resized image that the crop keeps along its tighter side.
        mean: subtracted from each channel, whose values run from 0 to 1.
        std: what each channel is then divided by.

    Raises:
        ValueError: for a value that no image can be brought to.
    """

    image_size: int | tuple[int, int] = 224
    crop: float = 224 / 256
    mean: tuple[float, ...] = IMAGENET_MEAN
    std: tuple[float, ...] = IMAGENET_STD

    def __post_init__(self) -> None:
        sides = (self.image_size,) * 2 if isinstance(self.image_size, int) else self.image_size
        object.__setattr__(self, "image_size", tuple(sides))
        if len(self.size) != 2 or any(
            type(side) is not int or not 0 < side <= _LARGEST for side in self.size
        ):
            raise ValueError(
                f"image_size must be a height and a width of 1 to {_LARGEST} pixels, got {sides}"
            )
        if not 0 < self.crop <= 1:
            raise ValueError(f"crop must lie in (0, 1], got {self.crop}")
        if len(self.mean) != len(self.std) or not self.std:
            raise ValueError("mean and std need one value a channel")
        if not all(map(math.isfinite, self.mean + self.std)) or min(self.std) <= 0:
            raise ValueError("mean and std must be finite, and std positive")

    @property
    def size(self) -> tuple[int, int]:
        """Height and width (`image_size`, for the type checker: always a pair by now)."""
        assert isinstance(self.image_size, tuple)
        return self.image_size

    def replace(self, **changes: Any) -> "Preprocessing":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)


def scale_and_shift(
    white: int, mean: tuple[float, ...], std: tuple[float, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """``(value / white - mean) / std`` as ``value * scale - shift``, float32, one a channel."""
    deviation = np.array(std, np.float32)
    return 1 / (white * deviation), np.array(mean, np.float32) / deviation


def normalize_images(
    images: Images, mean: tuple[float, ...], std: tuple[float, ...]
) -> Float[Array, "B image_H image_W image_C"]:
    """``(value - mean) / std`` in float32, on the device.

    Args:
        images: bytes, which run from 0 to 1 then, or floating-point values as they are.
        mean: subtracted from each channel.
        std: what each channel is then divided by.
    """
    scale, shift = scale_and_shift(255 if images.dtype == jnp.uint8 else 1, mean, std)
    one = (1, 1, 1, len(std))
    return images.astype(jnp.float32) * scale.reshape(one) - shift.reshape(one)


def from_json(kind: type[Value], values: Mapping[str, Any]) -> Value:
    """Rebuilds what images go through, of either type, from its fields as JSON types.

    Raises:
        ValueError, TypeError: for values that it can't have.
    """
    return kind(**{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()})


def imagenet_preprocessing(
    image_size: int | tuple[int, int], channels: int, crop: float = 224 / 256
) -> Preprocessing:
    """What images go through for weights that say nothing of it; arguments of `Preprocessing`."""
    mean, std = (for_channels(values, channels) for values in (IMAGENET_MEAN, IMAGENET_STD))
    return Preprocessing(image_size, crop, mean, std)


def for_channels(values: tuple[float, ...], channels: int) -> tuple[float, ...]:
    """A mean or deviation of RGB images for images of other channels, as kernels are fitted.

    Args:
        values: one a channel, or those of R, G and B.
        channels: of the images: one takes the mean of the three, more take them in turn.

    Raises:
        ValueError: another number of values than three or `channels`.
    """
    if len(values) == channels:
        return values
    if len(values) != 3:
        raise ValueError(f"{len(values)} values of mean or std for images of {channels} channels")
    if channels == 1:
        return (sum(values) / 3,)
    return tuple(values[i % 3] for i in range(channels))
