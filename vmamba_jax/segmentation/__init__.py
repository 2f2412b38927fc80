"""Semantic segmentation: UPerNet on a VMamba, its loss, inference on whole photographs."""

from vmamba_jax.segmentation.config import UPerNetConfig
from vmamba_jax.segmentation.create import create_segmenter
from vmamba_jax.segmentation.loss import IGNORED, segmentation_loss
from vmamba_jax.segmentation.upernet import SegmenterLogits, UPerNet

__all__ = [
    "IGNORED",
    "SegmenterLogits",
    "UPerNet",
    "UPerNetConfig",
    "create_segmenter",
    "segmentation_loss",
]
