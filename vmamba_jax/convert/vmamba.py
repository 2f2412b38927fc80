"""VMamba's weights under both names, and the architecture behind a state dict of them.

Today's names only (``layers.0.blocks.0.op.x_proj_weight``); older ones are brought up to date
before they come here. The table of names is read off the model's own tree, so it can't miss one.
"""

import collections
import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import flax.linen as nn
import numpy as np

from vmamba_jax.config import VMambaConfig
from vmamba_jax.convert.weight import StateDict, Weight, make_weight
from vmamba_jax.models import VSSM
from vmamba_jax.models.parameters import network_shapes

# What the model's Python loops run over, which a few bytes in a file could make endless.
_MAX_STAGES = 8
_MAX_UNROLLED = 2048  # taps and states; the released models have 4 * (9 + 2 * 16)

BACKBONE = "backbone."
"""What a VMamba's names begin with in the files of networks that have it for their backbone."""

_PATCH_EMBED = {"conv": "0", "norm": "2", "conv1": "0", "norm1": "2", "conv2": "5", "norm2": "7"}
_DOWNSAMPLE = {"conv": "1", "norm": "3", "reduction": "reduction"}


def vmamba_weights(config: VMambaConfig) -> tuple[Weight, ...]:
    """Every weight of a `VSSM`, in the order of its tree."""
    return tabulate(VSSM, config, partial(vmamba_weight, config=config))


def tabulate(
    network: Callable[[VMambaConfig], nn.Module],
    config: VMambaConfig,
    weight: Callable[[tuple[str, ...], tuple[int, ...]], Weight],
) -> tuple[Weight, ...]:
    """Every weight of a network that holds one VMamba, in the order of its tree.

    Args:
        network: builds it around a VMamba.
        config: that VMamba.
        weight: makes a weight of our path and shape.
    """
    shapes = network_shapes(network, config)
    return tuple(weight(path, shape) for path, shape in shapes.items())


def vmamba_weight(
    path: tuple[str, ...], shape: tuple[int, ...], config: VMambaConfig, inside: Sequence[str] = ()
) -> Weight:
    """One weight of a VMamba.

    Args:
        path: ours, from the collection down.
        shape: ours.
        config: the architecture.
        inside: the modules that hold the VMamba; PyTorch's have the same names.
    """
    modules = list(path[1 + len(inside) : -1])
    names = [_torch_module(modules[: i + 1], config) for i in range(len(modules))]
    # Routes and channels in one axis.
    merged = path[-1] in ("A_logs", "Ds") and not config.forward_type.startswith("m0")
    return make_weight(path, shape, ".".join([*inside, *names]), merged=merged)


def infer_config(state_dict: StateDict) -> VMambaConfig:
    """The architecture behind a state dict, from its names and shapes alone.

    What leaves no trace there takes the released models' value: activations (SiLU inside SS2D,
    GELU for ``"m0"`` and in the MLP), the traversal order (``"cross2d"``), ``"_onnone"`` among the
    output norms without weights, pre-norm, and the training-only fields (drop rates, `ssm_init`).
    A gated model with v0's convolution, merging and no MLP is taken for ``"v0"``; it is the same
    mathematics as ``"v05"``.

    Raises:
        ValueError: if a key that every VMamba has is missing, or shapes contradict each other.
    """

    def shape(key: str, rank: int) -> tuple[int, ...]:
        if key not in state_dict:
            raise ValueError(f"this is no VMamba state dict: {key} is missing")
        found = tuple(state_dict[key].shape)
        # Without elements a shape may claim any size.
        if len(found) != rank or 0 in found:
            raise ValueError(f"this is no VMamba state dict: {key} has shape {found}")
        return found

    pattern = re.compile(r"layers\.(\d{1,3})\.blocks\.(\d{1,3})\.")
    blocks = {tuple(map(int, m.groups())) for m in map(pattern.match, state_dict) if m}
    count = collections.Counter(stage for stage, _ in blocks)
    stages = len(count)
    if set(count) != set(range(stages)) or not 0 < stages <= _MAX_STAGES:
        raise ValueError(
            "this is no VMamba state dict: its blocks layers.I.blocks.J are not of stages I = 0, "
            f"1, ... up to {_MAX_STAGES - 1}"
        )
    depths = tuple(count[stage] for stage in range(stages))
    first = "layers.0.blocks.0."
    has_ssm, has_mlp = f"{first}norm.weight" in state_dict, f"{first}norm2.weight" in state_dict
    some_norm = "norm" if has_ssm else "norm2"
    dims = tuple(shape(f"layers.{i}.blocks.0.{some_norm}.weight", 1)[0] for i in range(stages))

    fields: dict[str, Any] = {"depths": depths, "dims": dims, "drop_path_rate": 0.0}
    overlapping = "patch_embed.5.weight" in state_dict
    stem = shape("patch_embed.0.weight", 4)
    fields |= {
        "patchembed_version": "v2" if overlapping else "v1",
        "patch_size": 2 * (stem[-1] - 1) if overlapping else stem[-1],
        "in_chans": stem[1],
        "patch_norm": "patch_embed.2.weight" in state_dict,
        "norm_layer": "bn" if f"{first}{some_norm}.running_mean" in state_dict else "ln2d",
        "num_classes": shape("classifier.head.weight", 2)[0]
        if "classifier.head.weight" in state_dict
        else 0,
    }
    if "layers.0.downsample.reduction.weight" in state_dict:
        fields["downsample_version"] = "v1"
    elif "layers.0.downsample.1.weight" in state_dict:
        fields["downsample_version"] = f"v{shape('layers.0.downsample.1.weight', 4)[-1]}"
    else:
        fields["downsample_version"] = "v3" if stages == 1 else "none"
    if "pos_embed" in state_dict:
        height, width = shape("pos_embed", 4)[2:]
        patch = fields["patch_size"]
        fields |= {"posembed": True, "imgsize": (height * patch, width * patch)}

    fields["mlp_ratio"] = 0.0
    if has_mlp:
        hidden = shape(f"{first}mlp.fc2.weight", 2)[1]
        fields["mlp_ratio"] = hidden / dims[0]
        fields["gmlp"] = shape(f"{first}mlp.fc1.weight", 2)[0] == 2 * hidden
    fields["ssm_ratio"] = 0.0
    if has_ssm:
        fields |= _infer_ssm(shape, state_dict, dims)
        vanilla = (
            fields["forward_type"] == "v05"
            and fields["downsample_version"] == "v1"
            and (fields["ssm_conv"], fields["ssm_conv_bias"], has_mlp) == (3, True, False)
        )
        fields["forward_type"] = "v0" if vanilla else fields["forward_type"]
    return VMambaConfig(**fields)


def backbone_of(state_dict: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What lies below ``backbone.``, under its names there."""
    return {
        key.removeprefix(BACKBONE): array
        for key, array in state_dict.items()
        if key.startswith(BACKBONE)
    }


def _infer_ssm(shape: Any, state_dict: StateDict, dims: tuple[int, ...]) -> dict[str, Any]:
    op = "layers.0.blocks.0.op."
    inner = shape(f"{op}out_proj.weight", 2)[1]
    mamba2 = f"{op}dt_projs_weight" not in state_dict
    last, rank = ("A_logs", 2) if mamba2 else ("dt_projs_weight", 3)
    ranks = [shape(f"layers.{i}.blocks.0.op.{last}", rank)[-1] for i in range(len(dims))]
    automatic = ranks == [math.ceil(dim / 16) for dim in dims]
    if not automatic and len(set(ranks)) > 1:
        raise ValueError(f"the ranks of the delta projections contradict each other: {ranks}")
    with_conv = f"{op}conv2d{'.1' if mamba2 else ''}.weight"
    kernel = shape(with_conv, 4)[-1] if with_conv in state_dict else -1
    d_state = (shape(f"{op}x_proj_weight", 3)[1] - ranks[0]) // 2
    if len(dims) * (kernel**2 + 2 * d_state) > _MAX_UNROLLED:
        raise ValueError(
            f"{kernel}x{kernel} convolutions and {d_state} states in {len(dims)} stages are more "
            "than this package builds"
        )
    if f"{op}out_norm.0.weight" in state_dict:
        out_norm = "_oncnorm"
    elif f"{op}out_norm.1.weight" in state_dict:
        out_norm = "_ondwconv3"
    else:
        out_norm = "" if f"{op}out_norm.weight" in state_dict else "_onnone"
    gate = "" if shape(f"{op}in_proj.weight", 2)[0] == 2 * inner else "_noz"
    return {
        "ssm_ratio": inner / dims[0],
        "ssm_d_state": d_state,
        "ssm_dt_rank": "auto" if automatic else ranks[0],
        "ssm_conv": kernel,
        "ssm_conv_bias": with_conv.replace("weight", "bias") in state_dict,
        "ssm_act_layer": "gelu" if mamba2 else "silu",
        "ssm_init": "v2" if mamba2 else "v0",
        "forward_type": ("m0" if mamba2 else "v05") + out_norm + gate,
    }


def _torch_module(modules: list[str], config: VMambaConfig) -> str:
    """PyTorch's name of the last module of a path."""
    *parents, name = modules
    parent = parents[-1] if parents else ""
    if parent == "patch_embed":
        return _PATCH_EMBED[name]
    if parent.endswith("_downsample"):
        return name if config.downsample_version == "v1" else _DOWNSAMPLE[name]
    if parent == "op":
        if name == "conv2d" and config.forward_type.startswith("m0"):
            return "conv2d.1"
        if name == "out_norm_conv":
            return "out_norm.2" if "_oncnorm" in config.forward_type else "out_norm.1"
        if name == "out_norm" and "_oncnorm" in config.forward_type:
            return "out_norm.0"
        return name
    if parent:
        return name
    name = re.sub(r"^layers_(\d+)_blocks_(\d+)$", r"layers.\1.blocks.\2", name)
    name = re.sub(r"^layers_(\d+)_downsample$", r"layers.\1.downsample", name)
    return {"classifier_norm": "classifier.norm", "head": "classifier.head"}.get(name, name)
