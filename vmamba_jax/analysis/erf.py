"""The effective receptive field: which pixels a position of a stage's map depends on, and how much.

Luo et al., "Understanding the Effective Receptive Field in Deep Convolutional Neural Networks",
2016: the gradient of one output position with respect to the image. As in Ding et al., "Scaling Up
Your Kernels to 31x31", 2022, and the VMamba paper (arXiv 2401.10166), only the positive part of the
features and of the gradient counts, and it is averaged over images.
"""

from collections.abc import Iterable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vmamba_jax.analysis.capture import resolve_stage
from vmamba_jax.models import VSSM
from vmamba_jax.typing import Array, Float, Int, Variables


def effective_receptive_field(
    model: VSSM,
    variables: Variables,
    batches: Iterable[np.ndarray | Array],
    *,
    stage: int = -1,
    position: tuple[int, int] | None = None,
) -> Float[np.ndarray, "H W"]:
    """Measures the effective receptive field of one position of a stage's map.

    For an image x and the stage's map f before normalisation and downsampling::

        contribution = sum over colours of max(0, d/dx sum over channels of max(0, f[position]))

    Args:
        model: the model.
        variables: its weights.
        batches: normalised images (B, H, W, 3) of one size, which need not be square.
        stage: which stage; -1 is the last.
        position: row and column on the stage's map; None is its centre, (h // 2, w // 2).

    Returns:
        The contribution of each pixel, the mean over the images; not scaled.

    Raises:
        ValueError: if there are no images, if their sizes differ, for a stage or a position that
            the model lacks, or if a gradient is not finite.
    """
    stage = resolve_stage(model.config, stage)
    total, count = np.zeros((0, 0)), 0
    for images in batches:
        height, width = images.shape[1:3]
        if count and total.shape != (height, width):
            raise ValueError(
                f"images of one size are needed: {height}x{width} follows "
                f"{total.shape[0]}x{total.shape[1]}"
            )
        rows, columns = model.config.feature_size(height, width, stage)
        row, column = (rows // 2, columns // 2) if position is None else position
        if not (0 <= row < rows and 0 <= column < columns):
            raise ValueError(
                f"position {row}, {column} is not on the map of stage {stage}, which is "
                f"{rows}x{columns} for images of {height}x{width}"
            )
        at = jnp.asarray((row, column), jnp.int32)
        part = _contributions(model, variables, jnp.asarray(images), at, stage)
        added = np.asarray(part, np.float64).sum(axis=0)
        total = total + added if count else added
        count += len(images)
    if not count:
        raise ValueError("the effective receptive field is a mean over images, and there is none")
    if not np.isfinite(total).all():
        raise ValueError("a gradient is infinite or not a number: are the weights finite?")
    return (total / count).astype(np.float32)


def contribution_area(
    field: Float[np.ndarray, "H W"], share: float, centre: tuple[int, int] | None = None
) -> float:
    """How much of the image it takes to hold a share of all contributions (Ding et al.).

    The area is that of the smallest square around the centre, cut off at the image's edges.

    Args:
        field: of `effective_receptive_field`.
        share: of the sum over the field, between 0 and 1.
        centre: row and column in pixels; None is the middle of the image.

    Returns:
        The square's area over the image's.

    Raises:
        ValueError: if nothing contributes, or for a share outside (0, 1].
    """
    if not 0 < share <= 1:
        raise ValueError(f"a share lies between 0 and 1, got {share}")
    height, width = field.shape
    row, column = centre or ((height - 1) / 2, (width - 1) / 2)
    away = [np.abs(np.arange(n) - at) for n, at in ((height, row), (width, column))]
    reach = np.maximum(away[0][:, None], away[1][None]).ravel()
    order = np.argsort(reach, kind="stable")
    held = np.cumsum(field.ravel()[order], dtype=np.float64)
    if held[-1] <= 0:
        raise ValueError("no pixel contributes: the field is zero everywhere")
    # Rounding of the sum must not ask for more than all of it.
    first = min(int(np.searchsorted(held, share * held[-1])), held.size - 1)
    return float(np.mean(reach <= reach[order[first]]))


@partial(jax.jit, static_argnames=("model", "stage"))
def _contributions(
    model: VSSM, variables: Variables, images: Array, at: Int[Array, "2"], stage: int
) -> Float[Array, "B H W"]:
    """What each pixel of each image contributes to a position."""

    def seen(images: Array) -> Array:
        features: Any = model.apply(variables, images, out_indices=(stage,), method="features")[0]
        return jax.nn.relu(features[:, at[0], at[1]]).sum()

    return jax.nn.relu(jax.grad(seen)(images)).sum(axis=-1)
