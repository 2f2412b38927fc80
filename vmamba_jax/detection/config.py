"""A Mask R-CNN detector as a value: its architecture, and how its outputs become detections."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from vmamba_jax.config import VMambaConfig


@dataclasses.dataclass(frozen=True)
class MaskRCNNConfig:
    """The architecture; the defaults are the released detectors'.

    Attributes:
        backbone: the VMamba underneath; its classes don't matter.
        num_classes: of objects; the background comes on top.
        fpn_channels: of each level of the feature pyramid.
        rpn_channels: of the region proposal network's hidden layer.
        box_channels: of the box head's two hidden layers.
        mask_channels: of the mask head's hidden layers.
        mask_convs: how many 3x3 convolutions the mask head has.
        anchor_scale: side of a square anchor, in strides of its level.
        anchor_ratios: heights over widths of the anchors at each position.
    """

    backbone: VMambaConfig
    num_classes: int = 80
    fpn_channels: int = 256
    rpn_channels: int = 256
    box_channels: int = 1024
    mask_channels: int = 256
    mask_convs: int = 4
    anchor_scale: float = 8.0
    anchor_ratios: Sequence[float] = (0.5, 1.0, 2.0)

    def __post_init__(self) -> None:
        object.__setattr__(self, "anchor_ratios", tuple(self.anchor_ratios))  # a list in JSON
        sizes = {
            field.name: getattr(self, field.name)
            for field in dataclasses.fields(self)
            if field.type is int
        }
        wrong = [f"{name}={value}" for name, value in sizes.items() if value < 1]
        if wrong:
            raise ValueError(f"must be positive: {', '.join(wrong)}")

    def replace(self, **changes: Any) -> "MaskRCNNConfig":
        """A copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def depths(self) -> tuple[int, ...]:
        """Blocks in each stage of the backbone."""
        return tuple(self.backbone.depths)

    @property
    def strides(self) -> tuple[int, ...]:
        """Pixels a position of each level of the pyramid: the stages', and one coarser level."""
        return tuple(self.backbone.patch_size * 2**i for i in range(len(self.depths) + 1))


@dataclasses.dataclass(frozen=True)
class InferenceConfig:
    """How outputs become detections; the defaults are the released detectors'.

    Attributes:
        level_proposals: candidates that each level of the pyramid puts forward.
        max_proposals: regions that the heads look at.
        proposal_iou: overlap above which the better of two candidates suppresses the other.
        score_threshold: probability that a detection exceeds.
        iou_threshold: overlap above which the better of two detections of a class suppresses the
            other.
        max_detections: of a picture.
    """

    level_proposals: int = 1000
    max_proposals: int = 1000
    proposal_iou: float = 0.7
    score_threshold: float = 0.05
    iou_threshold: float = 0.5
    max_detections: int = 100

    def __post_init__(self) -> None:
        for name in ("level_proposals", "max_proposals", "max_detections"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("proposal_iou", "score_threshold", "iou_threshold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name} must be between 0 and 1, got {getattr(self, name)}")
