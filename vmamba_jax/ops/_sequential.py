"""The selective scan one step after another: best on a CPU."""

from functools import partial

import jax
import jax.numpy as jnp

from vmamba_jax.ops._chunked import Coefficients, Plan, chunked_scan
from vmamba_jax.ops._parts import largest_divisor
from vmamba_jax.typing import Array, Float, Size

STEP = 2**10
"""States that a step advances at once, if there are images enough: what a step costs for its own
sake, a few tenths of a microsecond, counts for less then."""
CHUNK = 5 * 2**16
"""States of a chunk, 1.3 MB: half a dozen arrays of that size stay in a cache. And the fewer chunks
the less is copied to cut them out: an image's whole sequence at VMamba-T's first stage is one."""


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


def _recurrence(
    coefficients: Coefficients, arrays: tuple[Array, ...], start: Array, reverse: bool
) -> Array:
    group, steps = arrays[0].shape[:2]
    # Indices that may be negative would cost a tenth of a step.
    at = {"axis": 1, "allow_negative_indices": False}
    get = partial(jax.lax.dynamic_index_in_dim, keepdims=False, **at)
    put = partial(jax.lax.dynamic_update_index_in_dim, **at)

    def advance(i: Array, states: Array) -> Array:
        t = steps - 1 - i if reverse else i
        before, after = (t + 1, t) if reverse else (t, t + 1)
        decay, drive = coefficients(tuple(get(a, t) for a in arrays))
        return put(states, decay * get(states, before) + drive, after)

    states = jnp.zeros_like(start, shape=(group, steps + 1, *start.shape[1:]))
    states = put(states, start, steps if reverse else 0)
    return jax.lax.fori_loop(0, steps, advance, states)


def _block(batch: Size, states: int) -> tuple[Size, int]:
    group = largest_divisor(batch, STEP // states)
    return group, max(8, CHUNK // (group * states))


PLAN = Plan(_recurrence, _block)
