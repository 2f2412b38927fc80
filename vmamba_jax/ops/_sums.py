"""Sums of a gradient over a map, as matrix products on a CPU.

XLA's own reductions take up to 20 times as long there; elsewhere they fuse with what they read.
"""

import jax
import jax.numpy as jnp

from vmamba_jax.typing import Array, Float


def over_positions(a: Float[Array, "... C"]) -> Float[Array, "C"]:
    """The float32 sum over all but the channels."""
    rows = a.reshape(-1, a.shape[-1]).astype(jnp.float32)
    return jax.lax.platform_dependent(
        rows,
        cpu=lambda rows: jnp.ones_like(rows, shape=rows.shape[:1]) @ rows,
        default=lambda rows: rows.sum(axis=0),
    )


def over_channels(a: Float[Array, "... C"], weight: Float[Array, "C"]) -> Float[Array, "... 1"]:
    """The float32 weighted sum over the channels."""
    sums = jax.lax.platform_dependent(
        a.reshape(-1, a.shape[-1]).astype(jnp.float32),
        weight.astype(jnp.float32),
        cpu=lambda rows, weight: rows @ weight,
        default=lambda rows, weight: (rows * weight[None]).sum(axis=1),
    )
    return sums.reshape(*a.shape[:-1], 1)
