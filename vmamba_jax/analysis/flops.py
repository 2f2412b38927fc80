"""Parameters and operations of a model, counted from its architecture.

The convention is fvcore's, in which the published figures are given: a multiply-add of a
convolution or a matrix product counts once, a LayerNorm 5 and a BatchNorm 2 per element,
activations, additions and rearrangements nothing. The selective scan counts
``9 * B * L * D * N + B * D * L`` with D = K * C (Mamba's own estimate, state-spaces/mamba issue
110); a compiler's cost analysis would count the body of its loop once.
"""

from typing import NamedTuple

import numpy as np

from vmamba_jax.config import VMambaConfig, parse_forward_type
from vmamba_jax.models.parameters import variable_shapes

_ROUTES = 4  # K
_NORM_COST = {"ln": 5, "ln2d": 5, "bn": 2}


class Part(NamedTuple):
    """One part of a model.

    Attributes:
        name: such as ``"stage 3 (9 blocks)"``.
        output_shape: of one image: ``(H, W, C)``, or ``(classes,)`` for the classifier.
        params: number of parameters.
        flops: operations for one image, see the module's convention.
    """

    name: str
    output_shape: tuple[int, ...]
    params: int
    flops: int


def summarize(config: VMambaConfig, image_size: int = 224) -> list[Part]:
    """The parts of a model in the order of the forward pass; their sums are the model's totals.

    Args:
        config: the architecture.
        image_size: side of the image, in pixels.

    Raises:
        ValueError: if the image is too small for the model.
    """
    stages = len(config.depths)
    if min(config.feature_size(image_size, image_size)) < 1:
        raise ValueError(f"images of {image_size}x{image_size} are too small for {stages} stages")
    params, dims = _params(config), config.stage_dims
    height, width = config.feature_size(image_size, image_size, 0)
    parts = [
        Part(
            "patch embedding",
            (height, width, dims[0]),
            params["patch_embed"] + params.get("pos_embed", 0),
            _patch_embed(config, image_size),
        )
    ]
    for stage, depth in enumerate(config.depths):
        height, width = config.feature_size(image_size, image_size, stage)
        parts.append(
            Part(
                f"stage {stage + 1} ({depth} block{'s' if depth > 1 else ''})",
                (height, width, dims[stage]),
                depth * params[f"layers_{stage}_blocks_0"],
                depth * _block(config, stage, height * width),
            )
        )
        if stage + 1 < stages and config.downsample_version != "none":
            height, width = config.feature_size(image_size, image_size, stage + 1)
            parts.append(
                Part(
                    f"downsampling {stage + 1}",
                    (height, width, dims[stage + 1]),
                    params[f"layers_{stage}_downsample"],
                    _downsample(config, stage, height * width),
                )
            )
    pooled = height * width * dims[-1] * (1 + _NORM_COST[config.norm_layer])
    parts.append(
        Part(
            "classifier",
            (config.num_classes or dims[-1],),
            params["classifier_norm"] + params.get("head", 0),
            pooled + dims[-1] * config.num_classes,
        )
    )
    return parts


def _params(config: VMambaConfig) -> dict[str, int]:
    """Parameters of each module, with one block a stage: all blocks of a stage are alike."""
    one_each = config.replace(depths=(1,) * len(config.depths), drop_path_rate=0.0)
    params: dict[str, int] = {}
    for (collection, module, *_), shape in variable_shapes(one_each).items():
        if collection == "params":
            params[module] = params.get(module, 0) + int(np.prod(shape))
    return params


def _patch_embed(config: VMambaConfig, image_size: int) -> int:
    height, width = config.feature_size(image_size, image_size, 0)
    positions, dim = height * width, config.stage_dims[0]
    norm = _NORM_COST[config.norm_layer] * config.patch_norm
    if config.patchembed_version == "v1":
        return positions * dim * (config.patch_size**2 * config.in_chans + norm)
    stride = config.patch_size // 2
    between = ((image_size + 1 - stride) // stride + 1) ** 2
    kernel = (stride + 1) ** 2
    first = between * (dim // 2) * (kernel * config.in_chans + norm)
    return first + positions * dim * (kernel * (dim // 2) + norm)


def _downsample(config: VMambaConfig, stage: int, positions: int) -> int:
    dim, out = config.stage_dims[stage : stage + 2]
    norm = _NORM_COST[config.norm_layer]
    if config.downsample_version == "v1":
        return positions * 4 * dim * (norm + out)
    kernel = {"v2": 4, "v3": 9}[config.downsample_version]
    return positions * out * (kernel * dim + norm)


def _block(config: VMambaConfig, stage: int, positions: int) -> int:
    dim, norm = config.stage_dims[stage], _NORM_COST[config.norm_layer]
    per_position = 0
    if config.ssm_ratio > 0:
        per_position += norm * dim + _ss2d(config, stage)
    if config.mlp_ratio > 0:
        hidden = int(dim * config.mlp_ratio)
        per_position += norm * dim + dim * hidden * (3 if config.gmlp else 2)
    return positions * per_position


def _ss2d(config: VMambaConfig, stage: int) -> int:
    forward = parse_forward_type(config.forward_type)
    dim, inner = config.stage_dims[stage], config.inner_dim(stage)
    rank, state = config.dt_rank(stage), config.ssm_d_state
    projections = dim * inner * (3 if forward.gate else 2)
    conv = inner * config.ssm_conv**2 if config.ssm_conv > 1 else 0
    deltas = 0 if forward.operator == "m0" else inner * rank
    scan = 9 * inner * state + inner
    out_norm = {"layernorm": 5, "dwconv3": 9, "cnorm": 14}.get(forward.out_norm, 0) * inner
    routes = _ROUTES * (inner * (rank + 2 * state) + deltas + scan)
    return projections + conv + routes + out_norm
