"""The selective scan as a parallel prefix (`lax.associative_scan`) in chunks, for GPU and TPU.

Two steps h -> a1 h + b1 and h -> a2 h + b2 compose to h -> (a2 a1) h + (a2 b1 + b2), which is
associative (Blelloch, "Prefix sums and their applications", 1990). A prefix over the whole
sequence would hold a (B, L, K, C, N) array; over one chunk at a time it holds L / CHUNK of that,
and the backward pass recomputes it.
"""

import jax
import jax.numpy as jnp

from vmamba_jax.ops._discretise import step_size
from vmamba_jax.typing import Array, Float

CHUNK = 64


def _compose(first: tuple[Array, Array], second: tuple[Array, Array]) -> tuple[Array, Array]:
    (a1, b1), (a2, b2) = first, second
    return a2 * a1, a2 * b1 + b2


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
    A = A.astype(jnp.float32)[None, None]
    batch, length, routes, channels = u.shape
    chunk = min(CHUNK, length)
    padding = -length % chunk

    def in_chunks(a: Array) -> Array:  # (B, L, ...) -> (L / chunk, B, chunk, ...)
        # A step of size zero neither decays nor drives the state, so zeros pad either end.
        before_after = (padding, 0) if reverse else (0, padding)
        a = jnp.pad(a, [(0, 0), before_after] + [(0, 0)] * (a.ndim - 2))
        return jnp.moveaxis(a.reshape(batch, -1, chunk, *a.shape[2:]), 1, 0)

    @jax.checkpoint
    def advance(h: Array, now: tuple[Array, ...]) -> tuple[Array, Array]:
        step, drive, B, C = now
        decay = jnp.exp(step[..., None] * A)
        drive = drive[..., None] * B[:, :, :, None]
        product, states = jax.lax.associative_scan(
            _compose, (decay, drive), axis=1, reverse=reverse
        )
        states = product * h[:, None] + states
        return states[:, 0 if reverse else -1], jnp.einsum("blkcn,blkn->blkc", states, C)

    inputs = (step, step * x, B.astype(jnp.float32), C.astype(jnp.float32))
    start = jnp.zeros((batch, routes, channels, A.shape[-1]), jnp.float32)
    _, y = jax.lax.scan(advance, start, tuple(map(in_chunks, inputs)), reverse=reverse)
    y = jnp.moveaxis(y, 0, 1).reshape(batch, length + padding, routes, channels)
    y = y[:, padding:] if reverse else y[:, :length]
    if D is not None:
        y = y + D.astype(jnp.float32)[None, None] * x
    return y.astype(u.dtype)
