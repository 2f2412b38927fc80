"""Deterministic weights and inputs behind the golden files in this folder.

A golden file does not store a model's weights: both sides rebuild them here from the
PyTorch key and shape of each tensor, so a whole VMamba-B fits in a few kilobytes.
Only NumPy's frozen legacy generator is used, so the numbers never change.
"""

import zlib

import numpy as np


def _rng(name: str, seed: int) -> np.random.RandomState:
    return np.random.RandomState(zlib.crc32(f"{seed}/{name}".encode()))


def normal(name: str, shape, seed: int) -> np.ndarray:
    """Standard normal float32 array, a pure function of (name, shape, seed)."""
    return _rng(name, seed).standard_normal(tuple(shape)).astype(np.float32)


def weight(key: str, shape, seed: int) -> np.ndarray:
    """Weight for one PyTorch state-dict key (today's names, as in layers.0.blocks.0.op.Ds)."""
    shape = tuple(shape)
    z = normal(key, shape, seed)
    leaf = key.rsplit(".", 1)[-1]
    if leaf == "A_logs":  # (K*C, N): around log(1..N); (K, R) for the Mamba-2 form
        n = shape[-1]
        base = (
            np.log(np.arange(1, n + 1, dtype=np.float32))
            if len(shape) == 2 and shape[0] != 4
            else 0.0
        )
        return (base + 0.1 * z).astype(np.float32)
    if leaf == "Ds":
        return 1.0 + 0.1 * z
    if leaf == "dt_projs_bias":  # softplus(bias) spread over about 0.03 .. 0.5
        return (-2.0 + 1.5 * np.tanh(z)).astype(np.float32)
    if leaf == "running_mean":
        return 0.1 * z
    if leaf == "running_var":
        return (1.0 + 0.2 * np.tanh(z)).astype(np.float32)
    if leaf == "num_batches_tracked":
        return np.asarray(1, np.int64)
    if leaf == "pos_embed":
        return 0.2 * z
    if leaf == "bias":
        return 0.1 * z
    if len(shape) == 1:  # a norm's scale
        return 1.0 + 0.1 * z
    stacked = leaf in ("dt_projs_weight", "x_proj_weight")  # (K, C, R), (K, R+2N, C)
    fan_in = shape[-1] if stacked else int(np.prod(shape[1:]))  # else (out, in, *kernel)
    return (z / np.sqrt(fan_in)).astype(np.float32)


def state_dict(shapes: dict, seed: int) -> dict:
    """{key: float32 array} for {key: shape}."""
    return {k: weight(k, s, seed) for k, s in shapes.items()}


def images(shape_nchw, seed: int) -> np.ndarray:
    """Input batch, (B, 3, H, W) float32, standard normal, already 'normalised'."""
    return normal("images", shape_nchw, seed)


def cotangent(shape, seed: int) -> np.ndarray:
    """The vector that the logits are dotted with to get a scalar loss for the gradients."""
    return normal("cotangent", shape, seed)


def probe(key: str, shape, seed: int) -> np.ndarray:
    """The vector that one parameter's gradient is dotted with: grad_dot in a golden file."""
    return normal("probe/" + key, shape, seed)
