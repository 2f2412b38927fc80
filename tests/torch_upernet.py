"""UPerNet on a VMamba in plain PyTorch, straight from mmsegmentation's names: the other side of a
comparison. One picture at a time.
"""

import torch  # pyright: ignore[reportMissingImports]
from torch.nn.functional import (  # pyright: ignore[reportMissingImports]
    adaptive_avg_pool2d,
    batch_norm,
    conv2d,
    interpolate,
    relu,
)
from torch_backbone import backbone

SCALES = (1, 2, 3, 6)


def module(state, key, x):
    """The convolution, BatchNorm and ReLU of this name."""
    weight = state[f"{key}.conv.weight"]
    x = conv2d(x, weight, padding=weight.shape[-1] // 2)
    names = ("running_mean", "running_var", "weight", "bias")
    return relu(batch_norm(x, *(state[f"{key}.bn.{name}"] for name in names)))


def enlarge(x, like):
    """The map at the size of another."""
    return interpolate(x, size=like.shape[-2:], mode="bilinear", align_corners=False)


def segment(state, image):
    """Logits (1, classes, H, W) of an image (1, 3, H, W), at its size."""
    head = "decode_head"
    *lower, top = backbone(state, image)
    pooled = [
        enlarge(module(state, f"{head}.psp_modules.{i}.1", adaptive_avg_pool2d(top, side)), top)
        for i, side in enumerate(SCALES)
    ]
    top = module(state, f"{head}.bottleneck", torch.cat([top, *pooled], dim=1))
    maps = [module(state, f"{head}.lateral_convs.{i}", x) for i, x in enumerate(lower)] + [top]
    for i in reversed(range(len(lower))):
        maps[i] = maps[i] + enlarge(maps[i + 1], maps[i])
    maps[:-1] = [module(state, f"{head}.fpn_convs.{i}", x) for i, x in enumerate(maps[:-1])]
    x = torch.cat([enlarge(x, maps[0]) for x in maps], dim=1)
    x = module(state, f"{head}.fpn_bottleneck", x)
    x = conv2d(x, state[f"{head}.conv_seg.weight"], state[f"{head}.conv_seg.bias"])
    return enlarge(x, image)
