"""The Mamba-2 form of the selective scan: one decay a head, computed with matrix products."""

import jax
import jax.numpy as jnp
from jax.export import is_symbolic_dim

from vmamba_jax.ops._discretise import step_size
from vmamba_jax.ops._exact import einsum
from vmamba_jax.ops.wide import widened
from vmamba_jax.typing import Array, Float

CHUNK = 64


def ssd(
    x: Float[Array, "B L K R P"],
    delta: Float[Array, "B L K R"],
    A: Float[Array, "K R"],
    B: Float[Array, "B L K N"],
    C: Float[Array, "B L K N"],
    D: Float[Array, "K R P"] | None = None,
    delta_bias: Float[Array, "K R"] | None = None,
    delta_softplus: bool = True,
    *,
    reverse: bool = False,
    chunk: int = CHUNK,
) -> Float[Array, "B L K R P"]:
    """State space duality in chunks (Dao and Gu, "Transformers are SSMs", 2024, section 6).

    The recurrence is that of `selective_scan` with one decay rate for all P channels of a head.
    Inside a chunk it is a masked attention matrix; between chunks the (N, P) states are passed
    on one after another.

    Args:
        x: input, R heads of P channels on each of K routes.
        delta: step sizes before bias and softplus, one a head.
        A: decay rates, negative.
        B: input weights, shared by the heads of a route.
        C: output weights, shared by the heads of a route.
        D: skip weights; None leaves the skip out.
        delta_bias: added to `delta`; None adds nothing.
        delta_softplus: whether softplus makes the step sizes positive.
        reverse: run from the last element to the first (the output stays in input order).
        chunk: elements a chunk; trades the quadratic part against the passing of states.

    Returns:
        y, in the dtype of `x`; float32 inside, or wider if `x` is.
    """
    if reverse:
        x, delta, B, C = (jnp.flip(a, axis=1) for a in (x, delta, B, C))
    batch, length, routes, heads, width = x.shape
    states = B.shape[-1]
    chunk = chunk if is_symbolic_dim(length) else min(chunk, length)
    padding = -(-length // chunk) * chunk - length
    u = widened(x)
    step = step_size(delta.astype(u.dtype), delta_bias, delta_softplus)
    drive = u * step[..., None]
    log_decay = step * A.astype(u.dtype)[None, None]

    def in_chunks(a: Array) -> Array:  # (B, L, ...) -> (B, L / chunk, chunk, ...)
        # Zeros drive nothing and, as a logarithm, decay nothing.
        a = jnp.pad(a, [(0, 0), (0, padding)] + [(0, 0)] * (a.ndim - 2))
        return a.reshape(batch, -1, chunk, *a.shape[2:])

    drive, log_decay, b, c = map(
        in_chunks, (drive, log_decay, B.astype(u.dtype), C.astype(u.dtype))
    )
    total = jnp.cumsum(log_decay, axis=2)  # (B, Z, chunk, K, R), from the chunk's start

    # Inside each chunk: y[l] = sum over s <= l of <C[l], B[s]> decay(s -> l) drive[s].
    since = total[:, :, :, None] - total[:, :, None]  # (B, Z, l, s, K, R)
    causal = jnp.tril(jnp.ones((chunk, chunk), bool))[None, None, :, :, None, None]
    # Masked before the exponential: above the diagonal it would overflow, and its gradient too.
    weights = jnp.exp(jnp.where(causal, since, -jnp.inf))
    scores = einsum("bzlkn,bzskn->bzlsk", c, b)
    y = einsum("bzlsk,bzlskr,bzskrp->bzlkrp", scores, weights, drive)

    # Each chunk's own contribution to the state at its end, then the states passed on.
    to_end = jnp.exp(total[:, :, -1:] - total)
    local = einsum("bzskn,bzskr,bzskrp->bzkrnp", b, to_end, drive)
    across = jnp.exp(total[:, :, -1])

    def pass_on(h: Array, now: tuple[Array, Array]) -> tuple[Array, Array]:
        decay, local = now
        return decay[..., None, None] * h + local, h

    start = jnp.zeros((batch, routes, heads, states, width), u.dtype)
    _, entering = jax.lax.scan(
        pass_on, start, (jnp.moveaxis(across, 1, 0), jnp.moveaxis(local, 1, 0))
    )
    y = y + einsum("bzlkn,bzlkr,zbkrnp->bzlkrp", c, jnp.exp(total), entering)

    y = y.reshape(batch, -1, routes, heads, width)[:, :length]
    if D is not None:
        y = y + D.astype(u.dtype)[None, None] * u
    y = y.astype(x.dtype)
    return jnp.flip(y, axis=1) if reverse else y
