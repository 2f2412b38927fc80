"""RandAugment as the released models were trained with it: ``rand-m9-mstd0.5-inc1``.

Source: Cubuk et al., "RandAugment: Practical automated data augmentation with a reduced search
space", NeurIPS 2020; operations, ranges and noise on the magnitude are those of timm's
"increasing" set, in which a greater magnitude always means a stronger change.
"""

from collections.abc import Callable
from dataclasses import dataclass
from types import MappingProxyType

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MAX_MAGNITUDE = 10.0

_FILL = (124, 116, 104)  # ImageNet's mean colour


@dataclass(frozen=True)
class RandAugment:
    """Applies randomly chosen operations, each with probability one half, at a noisy magnitude.

    Attributes:
      magnitude: mean strength, from 0 to 10.
      magnitude_std: standard deviation of the strength, drawn anew for every operation.
      num_layers: operations drawn for an image, with replacement.
      probability: of applying an operation that was drawn.
    """

    magnitude: float = 9.0
    magnitude_std: float = 0.5
    num_layers: int = 2
    probability: float = 0.5

    def __call__(self, image: Image.Image, rng: np.random.Generator) -> Image.Image:
        """Augments one RGB image."""
        for index in rng.integers(len(_NAMES), size=self.num_layers):
            if rng.random() >= self.probability:
                continue
            name = _NAMES[index]
            magnitude = rng.normal(self.magnitude, self.magnitude_std)
            magnitude = min(max(0.0, magnitude), MAX_MAGNITUDE)
            sign = -1.0 if rng.random() < 0.5 else 1.0
            image = apply_operation(name, image, operation_argument(name, magnitude, sign))
        return image


def operation_argument(name: str, magnitude: float, sign: float = 1.0) -> float:
    """What an operation at this magnitude is called with.

    Args:
      name: a key of :data:`OPERATIONS`.
      magnitude: from 0 to 10.
      sign: 1.0, or -1.0 for the opposite direction where the operation has one.

    Returns:
      Degrees, bits, a threshold, a factor, a slope or a share of the size; 0.0 for the operations
      that take no argument.
    """
    return float(OPERATIONS[name].argument(magnitude / MAX_MAGNITUDE, sign))


def apply_operation(name: str, image: Image.Image, argument: float) -> Image.Image:
    """Applies one operation to an RGB image.

    Args:
      name: a key of :data:`OPERATIONS`.
      image: the image, left as it is.
      argument: from :func:`operation_argument`.
    """
    return OPERATIONS[name].apply(image, argument)


@dataclass(frozen=True)
class _Operation:
    apply: Callable[[Image.Image, float], Image.Image]
    argument: Callable[[float, float], float]  # from a level in 0..1 and a sign


def _no_argument(level: float, sign: float) -> float:
    return 0.0


def _signed(maximum: float) -> Callable[[float, float], float]:
    return lambda level, sign: sign * level * maximum


def _enhancement(level: float, sign: float) -> float:
    return max(0.1, 1.0 + sign * level * 0.9)


def _enhance(
    enhancer: Callable[[Image.Image], ImageEnhance._Enhance],
) -> Callable[[Image.Image, float], Image.Image]:
    return lambda image, factor: enhancer(image).enhance(factor)


def _affine(
    matrix: Callable[[Image.Image, float], tuple[float, ...]],
) -> Callable[[Image.Image, float], Image.Image]:
    """An operation from the map that takes a pixel of the result to its place in the original."""
    return lambda image, argument: image.transform(
        image.size,
        Image.Transform.AFFINE,
        matrix(image, argument),
        resample=Image.Resampling.BICUBIC,
        fillcolor=_FILL,
    )


def _rotate(image: Image.Image, degrees: float) -> Image.Image:
    return image.rotate(degrees, resample=Image.Resampling.BICUBIC, fillcolor=_FILL)


def _posterize(image: Image.Image, bits: float) -> Image.Image:
    # Keeping no bit leaves black; Pillow did that up to version 12 and now refuses.
    return ImageOps.posterize(image, int(bits)) if bits else Image.new("RGB", image.size)


def _solarize_add(image: Image.Image, add: float) -> Image.Image:
    table = [min(255, value + int(add)) if value < 128 else value for value in range(256)]
    return image.point(table * 3)


OPERATIONS: MappingProxyType[str, _Operation] = MappingProxyType(
    {
        "AutoContrast": _Operation(lambda image, _: ImageOps.autocontrast(image), _no_argument),
        "Equalize": _Operation(lambda image, _: ImageOps.equalize(image), _no_argument),
        "Invert": _Operation(lambda image, _: ImageOps.invert(image), _no_argument),
        "Rotate": _Operation(_rotate, _signed(30.0)),
        "PosterizeIncreasing": _Operation(_posterize, lambda level, _: 4 - int(level * 4)),
        "SolarizeIncreasing": _Operation(
            lambda image, threshold: ImageOps.solarize(image, int(threshold)),
            lambda level, _: 256 - int(level * 256),
        ),
        "SolarizeAdd": _Operation(_solarize_add, lambda level, _: int(level * 110)),
        "ColorIncreasing": _Operation(_enhance(ImageEnhance.Color), _enhancement),
        "ContrastIncreasing": _Operation(_enhance(ImageEnhance.Contrast), _enhancement),
        "BrightnessIncreasing": _Operation(_enhance(ImageEnhance.Brightness), _enhancement),
        "SharpnessIncreasing": _Operation(_enhance(ImageEnhance.Sharpness), _enhancement),
        "ShearX": _Operation(_affine(lambda _, slope: (1, slope, 0, 0, 1, 0)), _signed(0.3)),
        "ShearY": _Operation(_affine(lambda _, slope: (1, 0, 0, slope, 1, 0)), _signed(0.3)),
        "TranslateXRel": _Operation(
            _affine(lambda image, share: (1, 0, share * image.width, 0, 1, 0)), _signed(0.45)
        ),
        "TranslateYRel": _Operation(
            _affine(lambda image, share: (1, 0, 0, 0, 1, share * image.height)), _signed(0.45)
        ),
    }
)
"""The operations by timm's names: what each does, and its argument as a function of the level."""

_NAMES = tuple(OPERATIONS)
