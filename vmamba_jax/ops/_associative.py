"""The selective scan as a parallel prefix (`lax.associative_scan`) in chunks, for GPU and TPU.

Two steps h -> a1 h + b1 and h -> a2 h + b2 compose to h -> (a2 a1) h + (a2 b1 + b2), which is
associative (Blelloch, "Prefix sums and their applications", 1990).
"""

import jax
import jax.numpy as jnp

from vmamba_jax.ops._chunked import Coefficients, Plan, chunked_scan
from vmamba_jax.typing import Array, Float, Size


def selective_scan(
    u: Float[Array, "B L K C"],
    delta: Float[Array, "B L K C_or_R"],
    A: Float[Array, "K C N"],
    B: Float[Array, "B L K N"],
    C: Float[Array, "B L K N"],
    D: Float[Array, "K C"] | None,
    delta_bias: Float[Array, "K C"] | None,
    delta_proj: Float[Array, "K C R"] | None,
    delta_softplus: bool,
    reverse: bool,
) -> Float[Array, "B L K C"]:
    """See `vmamba_jax.ops.selective_scan`."""
    return chunked_scan(u, delta, A, B, C, D, delta_bias, delta_proj, delta_softplus, reverse, PLAN)


def _compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    (a1, b1), (a2, b2) = first, second
    return a2 * a1, a2 * b1 + b2


def _recurrence(
    coefficients: Coefficients, arrays: tuple[Array, ...], start: Array, reverse: bool
) -> Array:
    group, steps = arrays[0].shape[:2]
    lines = (-1, start.shape[-1])  # TPUs pad the second to last axis, which may be of length one
    each = jax.vmap(coefficients, in_axes=1, out_axes=1)(arrays)
    each = tuple(a.reshape(group, steps, *lines) for a in each)
    product, after = jax.lax.associative_scan(_compose, each, reverse=reverse, axis=1)
    shape = (group, steps, *start.shape[1:])
    start = start[:, None]
    states = product.reshape(shape) * start + after.reshape(shape)
    return jnp.concatenate([states, start] if reverse else [start, states], axis=1)


def _block(batch: Size, states: int) -> tuple[Size, int]:
    """All images at once, as a GPU wants them; of a wide state few steps, 2 MB an image."""
    return max(batch, 1), min(64, max(8, 2**19 // states))


PLAN = Plan(_recurrence, _block)
