"""Mask R-CNN on a VMamba: object detection and instance segmentation."""
