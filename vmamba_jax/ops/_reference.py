"""The selective scan as its formula reads: what the other implementations must equal.

Materialises the (B, L, K, C, N) decay and drive, so it is for small inputs.
"""

import jax
import jax.numpy as jnp

from vmamba_jax.ops._discretise import lift, step_size
from vmamba_jax.ops._exact import einsum
from vmamba_jax.ops.wide import widened
from vmamba_jax.typing import Array, Float


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
    x = widened(u)
    step = step_size(lift(delta.astype(x.dtype), delta_proj), delta_bias, delta_softplus)
    decay = jnp.exp(einsum("blkc,kcn->blkcn", step, A.astype(x.dtype)))
    drive = einsum("blkc,blkn->blkcn", step * x, B.astype(x.dtype))

    def advance(h: Array, at_step: tuple[Array, Array]) -> tuple[Array, Array]:
        h = at_step[0] * h + at_step[1]
        return h, h

    time_major = (jnp.moveaxis(decay, 1, 0), jnp.moveaxis(drive, 1, 0))
    _, states = jax.lax.scan(advance, jnp.zeros_like(decay[:, 0]), time_major, reverse=reverse)
    y = einsum("lbkcn,blkn->blkc", states, C.astype(x.dtype))
    if D is not None:
        y = y + D.astype(x.dtype)[None, None] * x
    return y.astype(u.dtype)
