"""A segmenter's weights under both names, and the architecture behind a state dict of them.

The names are mmsegmentation's (``decode_head.psp_modules.0.1.conv.weight``), the backbone's below
``backbone.`` are VMamba's of today.
"""

import re

from vmamba_jax.convert.vmamba import backbone_of, infer_config, tabulate, vmamba_weight
from vmamba_jax.convert.weight import StateDict, Weight, make_weight
from vmamba_jax.segmentation.config import UPerNetConfig
from vmamba_jax.segmentation.upernet import UPerNet

_PUBLISHED_SCALES = (1, 2, 3, 6)


def upernet_weights(config: UPerNetConfig) -> tuple[Weight, ...]:
    """Every weight of a `UPerNet`, in the order of its tree."""

    def weight(path: tuple[str, ...], shape: tuple[int, ...]) -> Weight:
        if path[1] == "backbone":
            return vmamba_weight(path, shape, config.backbone, inside=("backbone",))
        modules = [_torch_module(name) for name in path[1:-1]]
        return make_weight(path, shape, ".".join(modules))

    backbone = config.backbone.replace(posembed=False)
    return tabulate(lambda vmamba: UPerNet(config.replace(backbone=vmamba)), backbone, weight)


def infer_upernet(state_dict: StateDict) -> UPerNetConfig:
    """The architecture behind a segmenter's state dict, from its names and shapes alone.

    What leaves no trace there takes the published segmenters' value: the pool scales (1, 2, 3, 6)
    and the rate of dropout; and in the backbone what `vmamba.infer_config` says.

    Raises:
        ValueError: if a key that every UPerNet has is missing or has an impossible shape.
    """

    def features(key: str) -> int:
        shape = state_dict[key].shape if key in state_dict else None
        if shape is None or len(shape) != 4 or 0 in shape:
            found = "is missing" if shape is None else f"has shape {tuple(shape)}"
            raise ValueError(f"this is no UPerNet state dict: {key} {found}")
        return shape[0]

    pattern = re.compile(r"decode_head\.psp_modules\.(\d+)\.")
    pooled = len({m[1] for m in map(pattern.match, state_dict) if m})
    if pooled != len(_PUBLISHED_SCALES):
        raise ValueError(f"its {pooled} pooled maps are not the four of scales {_PUBLISHED_SCALES}")
    auxiliary = "auxiliary_head.convs.0.conv.weight"
    has_auxiliary = any(key.startswith("auxiliary_head.") for key in state_dict)
    return UPerNetConfig(
        backbone=infer_config(backbone_of(state_dict)),
        num_classes=features("decode_head.conv_seg.weight"),
        channels=features("decode_head.bottleneck.conv.weight"),
        auxiliary_channels=features(auxiliary) if has_auxiliary else 0,
        pool_scales=_PUBLISHED_SCALES,
    )


def _torch_module(name: str) -> str:
    # What sits beside the pooling in PyTorch's Sequential is its second module.
    name = re.sub(r"^psp_modules_(\d+)$", r"psp_modules.\1.1", name)
    return re.sub(r"_(\d+)$", r".\1", name)
