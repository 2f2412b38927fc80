"""Mask R-CNN on a VMamba: object detection and instance segmentation."""

from vmamba_jax.detection.config import InferenceConfig, MaskRCNNConfig
from vmamba_jax.detection.create import create_detector
from vmamba_jax.detection.detect import Found, Instance, coco_classes, detect
from vmamba_jax.detection.mask_rcnn import Detections, MaskRCNN
from vmamba_jax.detection.preprocess import prepare

__all__ = [
    "Detections",
    "Found",
    "InferenceConfig",
    "Instance",
    "MaskRCNN",
    "MaskRCNNConfig",
    "coco_classes",
    "create_detector",
    "detect",
    "prepare",
]
