"""Semantic segmentation: UPerNet on a VMamba.

The loss is in `vmamba_jax.segmentation.loss`, photographs of any size in
`vmamba_jax.segmentation.inference`: they load optax and Pillow, the network does not.
"""

from vmamba_jax.segmentation.config import Inference, UPerNetConfig
from vmamba_jax.segmentation.create import create_segmenter
from vmamba_jax.segmentation.upernet import SegmenterLogits, UPerNet

__all__ = [
    "Inference",
    "SegmenterLogits",
    "UPerNet",
    "UPerNetConfig",
    "create_segmenter",
]
