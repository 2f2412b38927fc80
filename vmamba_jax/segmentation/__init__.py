"""Semantic segmentation: UPerNet on a VMamba, its loss, inference on whole photographs."""

from vmamba_jax.segmentation.config import UPerNetConfig
from vmamba_jax.segmentation.create import create_segmenter
from vmamba_jax.segmentation.inference import Inference, segment
from vmamba_jax.segmentation.loss import segmentation_loss
from vmamba_jax.segmentation.upernet import SegmenterLogits, UPerNet

__all__ = [
    "Inference",
    "SegmenterLogits",
    "UPerNet",
    "UPerNetConfig",
    "create_segmenter",
    "segment",
    "segmentation_loss",
]
