"""A detector's weights under both names, and the architecture behind a state dict of them.

The names are mmdetection's (``roi_head.bbox_head.fc_cls.weight``), the backbone's below
``backbone.`` are VMamba's of today.
"""

import re
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from vmamba_jax.convert.backbone import backbone_weights
from vmamba_jax.convert.vmamba import BACKBONE, backbone_of, infer_config
from vmamba_jax.convert.weight import StateDict, Weight, flatten, make_weight
from vmamba_jax.detection.box_head import BoxHead
from vmamba_jax.detection.config import MaskRCNNConfig
from vmamba_jax.detection.fpn import FPN
from vmamba_jax.detection.mask_head import MaskHead
from vmamba_jax.detection.mask_rcnn import BOX_BINS, MASK_BINS
from vmamba_jax.detection.rpn import RPNHead

_MAX_CONVS = 16  # of a mask head that this package builds

# Our name of a module -> PyTorch's, from the front.
_RENAMED = (
    (re.compile(r"^(bbox_head|mask_head)\b"), r"roi_head.\1"),
    (re.compile(r"\b(lateral_convs|fpn_convs|convs)_(\d+)$"), r"\1.\2.conv"),
    (re.compile(r"\bshared_fcs_(\d+)$"), r"shared_fcs.\1"),
)


def mask_rcnn_weights(config: MaskRCNNConfig) -> tuple[Weight, ...]:
    """Every weight of a `MaskRCNN` under both names."""
    stages = len(config.depths)
    table = [
        weight._replace(
            key=BACKBONE + weight.key, path=(weight.path[0], "backbone", *weight.path[1:])
        )
        for weight in backbone_weights(config.backbone, range(stages))
    ]

    def add(name: str, module: nn.Module, inputs: Any) -> None:
        tree = jax.eval_shape(module.init, jax.random.key(0), inputs)
        for (collection, *path), leaf in flatten(tree).items():
            table.append(_weight((collection, name, *path), leaf.shape))

    def regions(bins: int) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct((1, bins, bins, config.fpn_channels), jnp.float32)

    classes = config.num_classes
    maps = [jax.ShapeDtypeStruct((1, 1, 1, c), jnp.float32) for c in config.backbone.stage_dims]
    rpn = RPNHead(config.rpn_channels, len(config.anchor_ratios))
    add("neck", FPN(config.fpn_channels), maps)
    add("rpn_head", rpn, [regions(1)])
    add("bbox_head", BoxHead(classes, config.box_channels), regions(BOX_BINS))
    mask_head = MaskHead(classes, config.mask_channels, config.mask_convs)
    add("mask_head", mask_head, regions(MASK_BINS))
    return tuple(table)


def _weight(path: tuple[str, ...], shape: tuple[int, ...]) -> Weight:
    module = ".".join(path[1:-1])
    for ours, theirs in _RENAMED:
        module = ours.sub(theirs, module)
    weight = make_weight(path, shape, module)
    if path[-2:] == ("shared_fcs_0", "kernel"):  # PyTorch has the region's three axes in one
        out, *region = weight.shape
        return weight._replace(shape=(out, int(np.prod(region))))
    if path[-2:] == ("upsample", "kernel"):  # a transposed convolution: (in, out, height, width)
        axes = (2, 3, 0, 1)
        return weight._replace(shape=tuple(shape[axis] for axis in axes), to_torch=axes)
    return weight


def infer_mask_rcnn(state_dict: StateDict) -> MaskRCNNConfig:
    """The architecture behind a detector's state dict, from its names and shapes alone.

    What leaves no trace there takes the released models' value: the sizes of the anchors, and what
    `vmamba.infer_config` says of the backbone.

    Raises:
        ValueError: if a key that every such detector has is missing, or shapes contradict each
            other.
    """

    def outputs(key: str) -> int:
        found = tuple(state_dict[key].shape) if key in state_dict else ()
        if len(found) < 2 or 0 in found:
            what = f"has shape {found}" if key in state_dict else "is missing"
            raise ValueError(f"this is no Mask R-CNN's state dict: {key} {what}")
        return found[0]

    convs = {
        match[1]
        for match in map(re.compile(r"roi_head\.mask_head\.convs\.(\d+)\.").match, state_dict)
        if match
    }
    if not 0 < len(convs) <= _MAX_CONVS:
        raise ValueError(
            f"this is no Mask R-CNN's state dict: {len(convs)} convolutions in its mask head"
        )
    config = MaskRCNNConfig(
        infer_config(backbone_of(state_dict)).replace(num_classes=0),
        num_classes=outputs("roi_head.mask_head.conv_logits.weight"),
        fpn_channels=outputs("neck.lateral_convs.0.conv.weight"),
        rpn_channels=outputs("rpn_head.rpn_conv.weight"),
        box_channels=outputs("roi_head.bbox_head.shared_fcs.0.weight"),
        mask_channels=outputs("roi_head.mask_head.convs.0.conv.weight"),
        mask_convs=len(convs),
    )
    anchors = outputs("rpn_head.rpn_cls.weight")
    if anchors != len(config.anchor_ratios):
        raise ValueError(
            f"it has {anchors} anchors at each position; only the three of ratios "
            f"{', '.join(map(str, config.anchor_ratios))} are supported"
        )
    return config
