"""Axis letters used in every shape annotation and docstring, and the array types built on them.

========  ==================================================================
letter    axis
========  ==================================================================
``B``     batch
``H W``   height and width of the image or feature map, in pixels or patches
``L``     sequence length of a scan, ``L = H * W``
``K``     scan directions (routes)
``G``     distinct layouts among the K routes (the rest are those, reversed)
``C``     channels
``N``     size of the hidden state of each channel
``R``     rank of the projection that yields delta; heads in the Mamba-2 form
``P``     channels of one head in the Mamba-2 form, ``C = R * P``
``E``     what SS2D projects each position to: delta, B and C, ``E = R + 2 * N``
========  ==================================================================

Feature maps are channels-last everywhere: ``(B, H, W, C)``.
"""

from typing import Any, TypeAlias

import jax
from jaxtyping import Array, Bool, Float, Int, Num, UInt8

FeatureMap: TypeAlias = Float[Array, "B H W C"]
ResampledMap: TypeAlias = Float[Array, "B h w c"]
"""A feature map of another size and other channels than the FeatureMap beside it."""
Images: TypeAlias = Num[Array, "B image_H image_W image_C"]
Variables: TypeAlias = dict[str, Any]
"""Flax variable collections: ``{"params": {...}}`` and, with BatchNorm, ``"batch_stats"``."""
Size: TypeAlias = Any
"""Of an axis: an int, or a symbol that is reckoned with as with one, in a program that `jax.export`
makes for any batch or image."""
Dtype: TypeAlias = jax.typing.DTypeLike
Precision: TypeAlias = jax.lax.PrecisionLike

__all__ = [
    "Array",
    "Bool",
    "Dtype",
    "FeatureMap",
    "Float",
    "Images",
    "Int",
    "Num",
    "Precision",
    "ResampledMap",
    "Size",
    "UInt8",
    "Variables",
]
