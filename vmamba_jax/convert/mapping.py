"""Weight names, both ways: PyTorch's state dict <-> our variables, and the architecture behind it.

Today's names only (``layers.0.blocks.0.op.x_proj_weight``); older ones are brought up to date
before they come here. The table of names is read off the model's own tree, so it can't miss one.
"""

import collections
import functools
import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np

from vmamba_jax.config import VMambaConfig
from vmamba_jax.models.parameters import variable_shapes
from vmamba_jax.typing import Variables

StateDict = Mapping[str, np.ndarray]

# BatchNorm's step counter, used by PyTorch only without a momentum; variables have none: 0.
_COUNTER = "num_batches_tracked"


# What the model's Python loops run over, which a few bytes in a file could make endless.
_MAX_STAGES = 8
_MAX_UNROLLED = 2048  # taps and states; the released models have 4 * (9 + 2 * 16)


class Weight(NamedTuple):
    """One parameter or statistic under both names.

    Attributes:
        key: PyTorch's name.
        shape: PyTorch's shape.
        path: ours, from the collection down, such as ``("params", "head", "kernel")``.
        to_torch: axes of our array in PyTorch's order; what remains is a reshape.
    """

    key: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    to_torch: tuple[int, ...]


@functools.lru_cache(maxsize=64)
def weight_table(config: VMambaConfig) -> tuple[Weight, ...]:
    """Every weight of a model under both names, in the order of our tree."""
    return tuple(_weight(path, shape, config) for path, shape in variable_shapes(config).items())


def from_torch(state_dict: StateDict, config: VMambaConfig) -> Variables:
    """PyTorch's weights as variables for ``VSSM(config).apply``.

    Args:
        state_dict: arrays under PyTorch's names and in its shapes, any float dtype.
        config: the architecture they belong to; `infer_config` finds it.

    Returns:
        float32 NumPy arrays in our tree (views where the dtype allows).

    Raises:
        ValueError: naming every key that is missing, unexpected, or of another shape.
    """
    table = weight_table(config)
    known = {weight.key for weight in table}
    problems = [f"missing {weight.key}" for weight in table if weight.key not in state_dict]
    problems += [
        f"unexpected {key}"
        for key in state_dict
        if key not in known and not (is_counter(key) and _statistic(key) in known)
    ]
    problems += [
        f"{weight.key} has shape {tuple(state_dict[weight.key].shape)}, expected {weight.shape}"
        for weight in table
        if weight.key in state_dict and state_dict[weight.key].shape != weight.shape
    ]
    _raise_all("the state dict does not fit this config", problems)
    flat = {
        weight.path: _from_torch_layout(
            np.asarray(state_dict[weight.key]).astype(np.float32, copy=False), weight, config
        )
        for weight in table
    }
    return flax.traverse_util.unflatten_dict(flat)


def to_torch(tree: Mapping[str, Any], config: VMambaConfig) -> dict[str, np.ndarray]:
    """Our variables (or gradients of them) under PyTorch's names and in its shapes.

    Args:
        tree: variable collections: ``{"params": ...}``, with or without ``"batch_stats"``.
        config: the architecture they belong to.

    Returns:
        NumPy arrays in the dtype of the leaves.

    Raises:
        ValueError: naming every leaf that is missing, unexpected, or of another shape.
    """
    flat = _flatten(tree)
    table = [weight for weight in weight_table(config) if weight.path[0] in tree]
    shapes = {weight.path: _our_shape(weight, config) for weight in table}
    problems = [f"missing {'/'.join(path)}" for path in shapes if path not in flat]
    problems += [f"unexpected {'/'.join(map(str, path))}" for path in flat if path not in shapes]
    problems += [
        f"{'/'.join(path)} has shape {flat[path].shape}, expected {shape}"
        for path, shape in shapes.items()
        if path in flat and flat[path].shape != shape
    ]
    if "params" not in tree:
        problems.append("missing the collection 'params'")
    _raise_all("the tree does not fit this config", problems)
    state_dict = {}
    for weight in table:
        array = np.asarray(flat[weight.path])
        state_dict[weight.key] = array.transpose(weight.to_torch).reshape(weight.shape)
        if weight.path[-1] == "var":
            state_dict[weight.key.replace("running_var", _COUNTER)] = np.zeros((), np.int64)
    return state_dict


def is_counter(key: str) -> bool:
    """Whether a key is of BatchNorm's step counter, which our variables have no place for."""
    return key.endswith(_COUNTER)


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


_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}
_PATCH_EMBED = {"conv": "0", "norm": "2", "conv1": "0", "norm1": "2", "conv2": "5", "norm2": "7"}
_DOWNSAMPLE = {"conv": "1", "norm": "3", "reduction": "reduction"}


def _weight(path: tuple[str, ...], shape: tuple[int, ...], config: VMambaConfig) -> Weight:
    _, *modules, leaf = path
    names = [_torch_module(modules[: i + 1], config) for i in range(len(modules))]
    key = ".".join([*names, _LEAVES.get(leaf, leaf)])
    axes = tuple(range(len(shape)))
    if leaf == "kernel":  # (in, out) -> (out, in); HWIO -> OIHW
        axes = (1, 0) if len(shape) == 2 else (3, 2, 0, 1)
    elif leaf == "pos_embed":  # NHWC -> NCHW
        axes = (0, 3, 1, 2)
    torch_shape = tuple(shape[axis] for axis in axes)
    if leaf in ("A_logs", "Ds") and not config.forward_type.startswith("m0"):
        torch_shape = (shape[0] * shape[1], *shape[2:])  # routes and channels in one axis
    return Weight(key, torch_shape, path, axes)


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


def _flatten(tree: Any) -> dict[tuple[str, ...], Any]:
    return flax.traverse_util.flatten_dict(dict(tree))  # pyright: ignore[reportReturnType]


def _our_shape(weight: Weight, config: VMambaConfig) -> tuple[int, ...]:
    return _from_torch_layout(np.broadcast_to(np.float32(0), weight.shape), weight, config).shape


def _from_torch_layout(array: np.ndarray, weight: Weight, config: VMambaConfig) -> np.ndarray:
    if len(weight.to_torch) > array.ndim:
        array = array.reshape(4, -1, *array.shape[1:])  # K
    return array.transpose(np.argsort(weight.to_torch))


def _statistic(counter: str) -> str:
    return counter.removesuffix(_COUNTER) + "running_var"


def _raise_all(what: str, problems: list[str]) -> None:
    if problems:
        shown = "; ".join(problems[:8])
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{what}: {shown}{more}")
