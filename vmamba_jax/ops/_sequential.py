"""The selective scan one step after another (`lax.scan`): least memory, best on a CPU."""

import jax
import jax.numpy as jnp

from vmamba_jax.ops._discretise import step_size
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
    x = u.astype(jnp.float32)
    step = step_size(delta, delta_bias, delta_softplus)
    A = A.astype(jnp.float32)[None]

    def advance(h: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
        step, drive, B, C = now
        h = jnp.exp(step[..., None] * A) * h + drive[..., None] * B[:, :, None]
        return h, (h * C[:, :, None]).sum(-1)

    inputs = (step, step * x, B.astype(jnp.float32), C.astype(jnp.float32))
    batch, _, routes, channels = u.shape
    start = jnp.zeros((batch, routes, channels, A.shape[-1]), jnp.float32)
    time_major = tuple(jnp.moveaxis(a, 1, 0) for a in inputs)
    _, y = jax.lax.scan(advance, start, time_major, reverse=reverse)
    y = jnp.moveaxis(y, 0, 1)
    if D is not None:
        y = y + D.astype(jnp.float32)[None, None] * x
    return y.astype(u.dtype)
