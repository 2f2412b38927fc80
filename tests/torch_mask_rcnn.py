"""Mask R-CNN on a VMamba in plain PyTorch, straight from mmdetection's names: the other side of a
comparison. One picture at a time.
"""

import math

import torch  # pyright: ignore[reportMissingImports]
from torch.nn.functional import (  # pyright: ignore[reportMissingImports]
    conv_transpose2d,
    interpolate,
    relu,
)
from torch_backbone import backbone, convolve, linear

STRIDES = (4, 8, 16, 32, 64)


def pyramid(state, maps):
    """The five levels of the feature pyramid."""
    laterals = [convolve(state, f"neck.lateral_convs.{i}.conv", x) for i, x in enumerate(maps)]
    for i in (2, 1, 0):
        laterals[i] = laterals[i] + interpolate(laterals[i + 1], size=laterals[i].shape[-2:])
    levels = [convolve(state, f"neck.fpn_convs.{i}.conv", x) for i, x in enumerate(laterals)]
    return [*levels, levels[-1][:, :, ::2, ::2]]


def decode(boxes, deltas, stds, size):
    """Corrected boxes, cut to the picture."""
    deltas = deltas * torch.tensor(stds)
    centre, sides = (boxes[..., :2] + boxes[..., 2:]) / 2, boxes[..., 2:] - boxes[..., :2]
    limit = abs(math.log(16 / 1000))
    centre = centre + sides * deltas[..., :2]
    half = sides * deltas[..., 2:].clamp(-limit, limit).exp() / 2
    corners = torch.cat([centre - half, centre + half], dim=-1)
    height, width = size
    return corners.clamp(min=0).minimum(torch.tensor([width, height] * 2, dtype=corners.dtype))


def suppress(boxes, scores, groups, threshold, count):
    """Indices of the boxes that no better one of their group overlaps."""
    if not len(boxes):
        return torch.zeros(0, dtype=torch.long)
    boxes = boxes + (groups.to(boxes) * (boxes.max() + 1))[:, None]
    left, kept = scores.argsort(descending=True, stable=True), []
    areas = (boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])
    while len(left) and len(kept) < count:
        best, left = left[0], left[1:]
        kept.append(best)
        low = torch.maximum(boxes[best, :2], boxes[left, :2])
        high = torch.minimum(boxes[best, 2:], boxes[left, 2:])
        shared = (high - low).clamp(min=0).prod(dim=1)
        left = left[~(shared / (areas[best] + areas[left] - shared) > threshold)]
    return torch.stack(kept)


def propose(state, levels, size):
    """The thousand regions that look most like objects."""
    boxes, scores, groups = [], [], []
    for i, (level, stride) in enumerate(zip(levels, STRIDES, strict=True)):
        hidden = relu(convolve(state, "rpn_head.rpn_conv", level))
        score = convolve(state, "rpn_head.rpn_cls", hidden)[0].permute(1, 2, 0).sigmoid()
        deltas = convolve(state, "rpn_head.rpn_reg", hidden)[0].permute(1, 2, 0).reshape(-1, 4)
        root = torch.tensor([0.5, 1, 2]).sqrt()
        half = torch.stack([8 * stride / root, 8 * stride * root], dim=-1) / 2
        y = torch.arange(level.shape[2]) * float(stride)
        x = torch.arange(level.shape[3]) * float(stride)
        centre = torch.stack(torch.meshgrid(x, y, indexing="xy"), dim=-1)[:, :, None]
        anchors = torch.cat([centre - half, centre + half], dim=-1).reshape(-1, 4)
        best = score.flatten().topk(min(1000, score.numel()))
        chosen = decode(anchors[best.indices], deltas[best.indices], (1, 1, 1, 1), size)
        boxes.append(chosen)
        scores.append(best.values)
        groups.append(torch.full_like(best.indices, i))
    boxes, scores, groups = torch.cat(boxes), torch.cat(scores), torch.cat(groups)
    some = (boxes[:, 2:] > boxes[:, :2]).all(dim=1)
    boxes, scores, groups = boxes[some], scores[some], groups[some]
    return boxes[suppress(boxes, scores, groups, 0.7, 1000)]


def bin_weights(start, end, length, bins):
    """Mean weight of each position in each bin along one axis, and the first position with any."""
    start, end = start - 0.5, end - 0.5
    size = (end - start) / bins
    samples = math.ceil(size)
    if not samples:
        return torch.zeros(bins, 1), 0
    first = int(min(max(start, 0), length - 1))
    last = int(min(max(end, 0), length - 1)) + 2
    at = start + (torch.arange(bins * samples, dtype=torch.float64) + 0.5) * size / samples
    inside = (at >= -1) & (at <= length)
    positions = torch.arange(first, min(last, length), dtype=torch.float64)
    weights = (1 - (at.clamp(0, length - 1)[:, None] - positions).abs()).clamp(min=0)
    weights = weights * inside[:, None]
    return weights.reshape(bins, samples, -1).mean(dim=1).float(), first


def align(levels, boxes, bins):
    """The features of regions (n, C, bins, bins), each from its level."""
    sides = ((boxes[:, 2] - boxes[:, 0]) * (boxes[:, 3] - boxes[:, 1])).sqrt()
    chosen = torch.floor(torch.log2(sides / 56 + 1e-6)).clamp(0, 3).int().tolist()
    regions = []
    for level, box in zip(chosen, boxes.tolist(), strict=True):
        source = levels[level][0]
        x1, y1, x2, y2 = (side / STRIDES[level] for side in box)
        rows, top = bin_weights(y1, y2, source.shape[1], bins)
        columns, left = bin_weights(x1, x2, source.shape[2], bins)
        part = source[:, top : top + rows.shape[1], left : left + columns.shape[1]]
        regions.append(rows @ part @ columns.T)
    return torch.stack(regions) if regions else boxes.new_zeros(0, levels[0].shape[1], bins, bins)


def detect(state, image, size):
    """Boxes, scores, labels and mask probabilities of what is in a padded image (1, 3, H, W)."""
    levels = pyramid(state, backbone(state, image))
    proposals = propose(state, levels, size)
    head = "roi_head.bbox_head"
    x = align(levels, proposals, 7).flatten(1)
    for i in (0, 1):
        x = relu(linear(state, f"{head}.shared_fcs.{i}", x))
    scores = linear(state, f"{head}.fc_cls", x).softmax(dim=-1)[:, :-1]
    deltas = linear(state, f"{head}.fc_reg", x).reshape(*scores.shape, 4)
    boxes = decode(proposals[:, None].expand_as(deltas), deltas, (0.1, 0.1, 0.2, 0.2), size)
    region, label = (scores > 0.05).nonzero(as_tuple=True)
    boxes, scores = boxes[region, label], scores[region, label]
    kept = suppress(boxes, scores, label, 0.5, 100)
    boxes, scores, label = boxes[kept], scores[kept], label[kept]
    head = "roi_head.mask_head"
    x = align(levels, boxes, 14)
    for i in range(4):
        x = relu(convolve(state, f"{head}.convs.{i}.conv", x))
    weight, bias = state[f"{head}.upsample.weight"], state[f"{head}.upsample.bias"]
    x = convolve(
        state,
        f"{head}.conv_logits",
        relu(conv_transpose2d(x, weight, bias, 2)),
    )
    return boxes, scores, label, x[torch.arange(len(label)), label].sigmoid()
