"""Fits a state dict to another number of classes or to other images."""

from collections.abc import Mapping

import numpy as np

from vmamba_jax.convert.naming import Change
from vmamba_jax.errors import CheckpointError

_HEAD = "classifier.head.weight", "classifier.head.bias"


def replace_head(
    state_dict: dict[str, np.ndarray], num_classes: int, seed: int = 0
) -> tuple[dict[str, np.ndarray], list[Change]]:
    """Gives a state dict a new classification head, if it has not `num_classes` already.

    Args:
        state_dict: arrays under PyTorch's names; not changed.
        num_classes: classes of the new head; 0 removes it.
        seed: of the new weights, normal with deviation 0.02 as the models initialise theirs.

    Returns:
        The new state dict, and what changed.
    """
    weight, bias = _HEAD
    held = state_dict[weight].shape[0] if weight in state_dict else 0
    if held == num_classes:
        return state_dict, []
    state_dict = {key: array for key, array in state_dict.items() if key not in _HEAD}
    if num_classes == 0:
        return state_dict, [Change(key, "", "left out", "no classes asked for") for key in _HEAD]
    if "classifier.norm.weight" not in state_dict:
        raise CheckpointError("it has no final norm, so there is nothing to put a head on")
    features = state_dict["classifier.norm.weight"].shape[0]
    normal = np.random.default_rng(seed).standard_normal((num_classes, features), np.float32)
    state_dict[weight] = 0.02 * normal
    state_dict[bias] = np.zeros(num_classes, np.float32)
    why = f"a new head of {num_classes} classes in place of {held}"
    return state_dict, [Change("", key, "initialised", why) for key in _HEAD]


def replace_input_channels(
    state_dict: dict[str, np.ndarray], channels: int, start: str = ""
) -> tuple[dict[str, np.ndarray], list[Change]]:
    """Fits the first convolution to images of other channels than RGB, as timm does.

    Args:
        state_dict: arrays under PyTorch's names; not changed.
        channels: of the images. One takes the sum of the three kernels; more take them in turn,
            scaled by 3 / channels, so that the response to equal channels stays.
        start: what the names of the VMamba begin with.

    Returns:
        The new state dict, and what changed.

    Raises:
        CheckpointError: it is for images of other channels, and not of three.
    """
    key = f"{start}patch_embed.0.weight"
    kernel = state_dict[key]
    held = kernel.shape[1]
    if held == channels:
        return state_dict, []
    if held != 3:
        raise CheckpointError(
            f"it is for images of {held} channels: only weights for RGB can be fitted to {channels}"
        )
    wide = kernel.astype(np.float32)
    if channels == 1:
        new, why = wide.sum(axis=1, keepdims=True), "the sum over R, G and B, for 1 channel"
    else:
        new = wide[:, np.arange(channels) % 3] * np.float32(3 / channels)
        why = f"R, G and B in turn for {channels} channels, times 3/{channels}"
    return {**state_dict, key: new.astype(kernel.dtype)}, [Change(key, key, "adapted", why)]


def replace_last_layers(
    state_dict: dict[str, np.ndarray], layers: Mapping[str, int], seed: int = 0
) -> tuple[dict[str, np.ndarray], list[Change]]:
    """Gives the heads of a segmenter or detector new last layers, where the outputs are others.

    Args:
        state_dict: arrays under PyTorch's names; not changed.
        layers: names of the last layers, and the outputs asked for. One that is not there stays
            away.
        seed: of the new weights, normal with deviation 0.01 as the models initialise theirs.

    Returns:
        The new state dict, and what changed.
    """
    state_dict, changes, draw = dict(state_dict), [], np.random.default_rng(seed)
    for layer, outputs in layers.items():
        weight, bias = f"{layer}.weight", f"{layer}.bias"
        if weight not in state_dict or state_dict[weight].shape[0] == outputs:
            continue
        held, *rest = state_dict[weight].shape
        state_dict[weight] = np.float32(0.01) * draw.standard_normal((outputs, *rest), "f4")
        state_dict[bias] = np.zeros(outputs, np.float32)
        why = f"a new layer of {outputs} outputs in place of {held}"
        changes += [Change("", key, "initialised", why) for key in (weight, bias)]
    return state_dict, changes


def resize_position_embedding(
    state_dict: dict[str, np.ndarray], height: int, width: int
) -> tuple[dict[str, np.ndarray], list[Change]]:
    """Resamples a position embedding to a map of `height` x `width` patches, if there is one.

    Bicubic with the kernel of PyTorch's ``interpolate`` (a = -0.75, half-pixel centres, no
    antialiasing, edges repeated).

    Args:
        state_dict: arrays under PyTorch's names; not changed.
        height: patches along the new map's height.
        width: patches along its width.

    Returns:
        The new state dict, and what changed.
    """
    key = "pos_embed"
    if key not in state_dict or state_dict[key].shape[2:] == (height, width):
        return state_dict, []
    old = state_dict[key]
    rows = _bicubic_weights(old.shape[2], height)
    columns = _bicubic_weights(old.shape[3], width)
    new = np.einsum("yh,bchw,xw->bcyx", rows, old.astype(np.float32), columns).astype(np.float32)
    why = f"{old.shape[2]}x{old.shape[3]} to {height}x{width} patches"
    return {**state_dict, key: new}, [Change(key, key, "resized", why)]


def _bicubic_weights(length: int, new_length: int) -> np.ndarray:
    """Matrix (new_length, length) that resamples one axis (Keys, 1981, with a = -0.75)."""
    a = -0.75
    # float32 as in PyTorch: the position's rounding decides the taps' weights.
    scale = np.float32(length / new_length)
    position = (np.arange(new_length, dtype=np.float32) + np.float32(0.5)) * scale - np.float32(0.5)
    first = np.floor(position).astype(int)
    weights = np.zeros((new_length, length), np.float32)
    for tap in range(-1, 3):
        distance = np.abs(position - (first + tap))
        near = (a + 2) * distance**3 - (a + 3) * distance**2 + 1
        far = a * (distance**3 - 5 * distance**2 + 8 * distance - 4)
        index = np.clip(first + tap, 0, length - 1)
        np.add.at(weights, (np.arange(new_length), index), np.where(distance <= 1, near, far))
    return weights
