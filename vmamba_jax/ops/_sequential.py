"""The selective scan one step after another (`lax.scan`): best on a CPU."""

import jax

from vmamba_jax.ops._chunked import Plan, chunked_scan
from vmamba_jax.typing import Array, Float


def selective_scan(
    u: Float[Array, "B L K C"],
    delta: Float[Array, "B L K C"],
    A: Float[Array, "K C N"],
    B: Float[Array, "B L K N"],
    C: Float[Array, "B L K N"],
    D: Float[Array, "K C"] | None,
    delta_bias: Float[Array, "K C"] | None,
    delta_softplus: bool,
    reverse: bool,
) -> Float[Array, "B L K C"]:
    """See `vmamba_jax.ops.selective_scan`."""
    return chunked_scan(u, delta, A, B, C, D, delta_bias, delta_softplus, reverse, PLAN)


def _recurrence(decay: Array, drive: Array, start: Array, reverse: bool) -> Array:
    def advance(h: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        h = now[0] * h + now[1]
        return h, h

    return jax.lax.scan(advance, start, (decay, drive), reverse=reverse)[1]


def _one_at_a_time(function):
    return lambda *arrays: jax.lax.map(lambda now: function(*now), arrays)


# One image at a time, and half a million states (2 MB) of it, stay in a core's cache.
PLAN = Plan(_recurrence, _one_at_a_time, chunk=lambda states: 2**19 // states)
