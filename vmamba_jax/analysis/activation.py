"""Activation maps: with what weight the scan at one position reads every other.

VMamba paper (arXiv 2401.10166); the formula is told in `vmamba_jax.analysis.scan_weights`.
"""

from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from vmamba_jax.analysis.capture import block_weights, resolve_block, scan_input
from vmamba_jax.analysis.scan_weights import scan_weights
from vmamba_jax.models import VSSM
from vmamba_jax.typing import Array, Float, Variables


class ActivationMaps(NamedTuple):
    """Activation maps of Q query positions.

    Attributes:
        routes: mean over the channels of the weights' magnitude, route by route (Q, K, h, w).
        merged: the same of the merged output (Q, h, w).
    """

    routes: Float[Array, "Q K h w"]
    merged: Float[Array, "Q h w"]


def activation_maps(
    model: VSSM,
    variables: Variables,
    image: Float[Any, "H W 3"],
    queries: Sequence[tuple[int, int]],
    *,
    stage: int = -1,
    block: int = -1,
) -> ActivationMaps:
    """Activation maps of a block's scan for some positions of its map.

    Args:
        model: the model.
        variables: its weights.
        image: normalised.
        queries: rows and columns on the stage's map.
        stage: which stage; -1 is the last.
        block: which of its blocks; -1 is the last.

    Returns:
        Maps as large as the stage's; one query is computed after the other, so that many cost no
        more memory than one.

    Raises:
        ValueError: for a stage, a block or a position that the model lacks, or no query.
    """
    stage, block = resolve_block(model.config, stage, block)
    height, width, _ = image.shape
    rows, columns = model.config.feature_size(height, width, stage)
    wrong = [q for q in queries if not (0 <= q[0] < rows and 0 <= q[1] < columns)]
    if wrong or not queries:
        raise ValueError(
            f"queries must be positions of the map of stage {stage}, which is {rows}x{columns}, "
            f"got {list(queries)}"
        )
    positions = jnp.asarray(queries, jnp.int32)
    return _activation_maps(model, variables, jnp.asarray(image), positions, stage, block)


@partial(jax.jit, static_argnames=("model", "stage", "block"))
def _activation_maps(
    model: VSSM, variables: Variables, image: Array, queries: Array, stage: int, block: int
) -> ActivationMaps:
    x = scan_input(model, variables, image[None], stage=stage, block=block)
    weights, forward_type = block_weights(variables, stage, block), model.config.forward_type

    def maps(query: Array) -> ActivationMaps:
        routes, merged, _ = scan_weights(x, weights, forward_type, query)
        return ActivationMaps(jnp.abs(routes).mean(axis=-1), jnp.abs(merged).mean(axis=-1))

    return jax.lax.map(maps, queries)
