"""One weight under PyTorch's name and under ours, and arrays moved between the two."""

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import flax.traverse_util
import numpy as np

from vmamba_jax.typing import Variables

StateDict = Mapping[str, np.ndarray]

# BatchNorm's step counter, used by PyTorch only without a momentum; variables have none: 0.
_COUNTER = "num_batches_tracked"
_LEAVES = {"kernel": "weight", "scale": "weight", "mean": "running_mean", "var": "running_var"}


class Weight(NamedTuple):
    """One parameter or statistic under both names.

    Attributes:
        key: PyTorch's name.
        shape: PyTorch's shape.
        path: ours, from the collection down, such as ``("params", "head", "kernel")``.
        our_shape: ours.
        to_torch: axes of our array in PyTorch's order; what remains is a reshape.
    """

    key: str
    shape: tuple[int, ...]
    path: tuple[str, ...]
    our_shape: tuple[int, ...]
    to_torch: tuple[int, ...]


def make_weight(
    path: tuple[str, ...], shape: tuple[int, ...], torch_module: str, *, merged: bool = False
) -> Weight:
    """A weight from our side of it.

    Args:
        path: ours, from the collection down.
        shape: ours.
        torch_module: PyTorch's name of the module that holds it.
        merged: whether PyTorch has the first two axes in one.
    """
    axes = tuple(range(len(shape)))
    if path[-1] == "kernel":  # (in, out) -> (out, in); HWIO -> OIHW
        axes = (1, 0) if len(shape) == 2 else (3, 2, 0, 1)
    elif path[-1] == "pos_embed":  # NHWC -> NCHW
        axes = (0, 3, 1, 2)
    torch_shape = tuple(shape[axis] for axis in axes)
    if merged:
        torch_shape = (shape[0] * shape[1], *shape[2:])
    key = ".".join(filter(None, [torch_module, _LEAVES.get(path[-1], path[-1])]))
    return Weight(key, torch_shape, path, shape, axes)


def variables_of(state_dict: StateDict, table: Sequence[Weight]) -> Variables:
    """PyTorch's weights in our tree: float32 NumPy arrays, views where the dtype allows.

    Raises:
        ValueError: naming every key that is missing, unexpected, or of another shape.
    """
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
            np.asarray(state_dict[weight.key]).astype(np.float32, copy=False), weight
        )
        for weight in table
    }
    return flax.traverse_util.unflatten_dict(flat)


def state_dict_of(tree: Mapping[str, Any], table: Sequence[Weight]) -> dict[str, np.ndarray]:
    """Our variables (or gradients of them) under PyTorch's names, in the dtype of the leaves.

    Raises:
        ValueError: naming every leaf that is missing, unexpected, or of another shape.
    """
    flat = flatten(tree)
    table = [weight for weight in table if weight.path[0] in tree]
    shapes = {weight.path: weight.our_shape for weight in table}
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


def flatten(tree: Any) -> dict[tuple[str, ...], Any]:
    """A tree's leaves by their paths."""
    return flax.traverse_util.flatten_dict(dict(tree))  # pyright: ignore[reportReturnType]


def _from_torch_layout(array: np.ndarray, weight: Weight) -> np.ndarray:
    unmerged = [weight.our_shape[axis] for axis in weight.to_torch]
    return array.reshape(unmerged).transpose(np.argsort(weight.to_torch))


def _statistic(counter: str) -> str:
    return counter.removesuffix(_COUNTER) + "running_var"


def _raise_all(what: str, problems: list[str]) -> None:
    if problems:
        shown = "; ".join(problems[:8])
        more = f"; and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise ValueError(f"{what}: {shown}{more}")
