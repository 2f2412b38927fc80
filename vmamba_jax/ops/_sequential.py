"""The selective scan one step after another (`lax.scan`): best on a CPU."""

from collections.abc import Callable
from functools import partial
from typing import Any

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


def _end_to_end(scan: Callable[..., Any]) -> Callable[..., Any]:
    def over_batch(*arrays: Array) -> Any:
        batch = arrays[0].shape[0]
        if batch == 0:  # there is nothing to lay end to end
            return jax.vmap(partial(scan, sequences=1))(*arrays)
        flat = (a.reshape(-1, *a.shape[2:]) for a in arrays)
        results, total = scan(*flat, sequences=batch)
        results = tuple(a.reshape(batch, -1, *a.shape[1:]) for a in results)
        return results, jax.tree.map(lambda a: a[None], total)

    return over_batch


# One image at a time, and half a million states (2 MB) of it, stay in a core's cache.
PLAN = Plan(_recurrence, _end_to_end, chunk=lambda states: 2**19 // states)
