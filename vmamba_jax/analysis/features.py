"""The maps of the stages, and two ways to look at maps of many channels."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from vmamba_jax.models import VSSM
from vmamba_jax.typing import Array, Float, Variables


def stage_maps(
    model: VSSM, variables: Variables, images: Float[np.ndarray, "B H W C"] | Array
) -> list[np.ndarray]:
    """The map of every stage, after its blocks and before its downsampling.

    Args:
        model: the model.
        variables: its weights.
        images: normalised, of any size.

    Returns:
        float32 maps (B, h, w, C), first stage first.
    """
    maps = _stage_maps(model, variables, jnp.asarray(images))
    return [np.asarray(stage) for stage in maps]


def map_norm(features: Float[np.ndarray, "*B h w C"]) -> Float[np.ndarray, "*B h w"]:
    """The Euclidean norm over the channels: where a map is active."""
    return np.linalg.norm(features, axis=-1)


def map_colors(features: Float[np.ndarray, "*B h w C"]) -> Float[np.ndarray, "*B h w 3"]:
    """A map's three principal components as red, green and blue: what it holds to be alike.

    The components are those of all positions of all images together (Oquab et al., "DINOv2", 2024,
    figure 1), each scaled to run from 0 to 1; its sign is chosen so that its largest weight is
    positive. Components that the map does not have are 0.
    """
    channels = features.shape[-1]
    flat = features.reshape(-1, channels).astype(np.float64)
    flat = flat - flat.mean(axis=0)
    # Eigenvectors of the covariance: a map has more positions than channels.
    _, vectors = np.linalg.eigh(flat.T @ flat)
    vectors = vectors[:, ::-1][:, :3]
    largest = np.take_along_axis(vectors, np.abs(vectors).argmax(axis=0)[None], axis=0)
    parts = flat @ (vectors * np.sign(largest))
    spread = np.ptp(parts, axis=0)
    colors = np.zeros((len(flat), 3), np.float32)
    shown = spread > 1e-9 * max(float(np.abs(parts).max(initial=0)), 1e-30)
    colors[:, : parts.shape[1]] = np.where(
        shown, (parts - parts.min(axis=0)) / np.where(shown, spread, 1), 0
    )
    return colors.reshape(*features.shape[:-1], 3)


@partial(jax.jit, static_argnames=("model",))
def _stage_maps(model: VSSM, variables: Variables, images: Array) -> list[Array]:
    stages = tuple(range(len(model.config.depths)))
    maps = model.apply(variables, images, out_indices=stages, method="features")
    return [jnp.asarray(stage, jnp.float32) for stage in maps]
