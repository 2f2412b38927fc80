"""Mask R-CNN on a VMamba: object detection and instance segmentation."""

from vmamba_jax.detection.config import InferenceConfig, MaskRCNNConfig
from vmamba_jax.detection.create import create_detector
from vmamba_jax.detection.mask_rcnn import Detections, MaskRCNN

__all__ = ["Detections", "InferenceConfig", "MaskRCNN", "MaskRCNNConfig", "create_detector"]
