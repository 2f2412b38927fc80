"""LayerNorm over the channels."""

from functools import partial

import jax
import jax.numpy as jnp

from vmamba_jax.ops.residuals import keep
from vmamba_jax.ops.wide import wide
from vmamba_jax.typing import Array, Dtype, Float

EPSILON = 1e-5  # PyTorch's


def layer_norm(
    x: Float[Array, "... C"],
    scale: Float[Array, "C"],
    bias: Float[Array, "C"],
    dtype: Dtype | None = None,
) -> Float[Array, "... C"]:
    """Normalises each position over its channels (Ba, Kiros and Hinton, 2016).

    ``y = (x - mean) / sqrt(variance + 1e-5) * scale + bias``, with the biased variance, taken in
    a second pass: the fast way cancels when the mean is large.

    Args:
        x: any float dtype.
        scale: of each channel.
        bias: of each channel.
        dtype: what the quotient is rounded to. Of a narrower one than that of `x` a gradient keeps
            the quotient and the deviation in place of `x`, which may be twice as large.

    Returns:
        y in float32, or wider if `x` is.
    """
    if dtype is None or jnp.dtype(dtype).itemsize >= x.dtype.itemsize:
        return _keeps_x(x, scale, bias)
    return _keeps_quotient(x, *_like(x, scale, bias), jnp.dtype(dtype))


def _like(x: Array, *weights: Array) -> tuple[Array, ...]:
    """Weights of each channel, of the rank of `x`."""
    return tuple(w.astype(wide(x.dtype)).reshape((1,) * (x.ndim - 1) + w.shape) for w in weights)


def _quotient(x: Array) -> tuple[Array, Array]:
    """``(x - mean) / deviation``, and ``1 / deviation`` (..., 1)."""
    centred = x.astype(wide(x.dtype))
    centred = centred - centred.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    inverse = jax.lax.rsqrt(variance + EPSILON)
    return centred * inverse, inverse


@jax.checkpoint  # a gradient keeps the input, and no normalised copy of it
def _keeps_x(x: Array, scale: Array, bias: Array) -> Array:
    quotient, _ = _quotient(x)
    scale, bias = _like(x, scale, bias)
    return quotient * scale + bias


@partial(jax.custom_jvp, nondiff_argnums=(3,))
def _keeps_quotient(x: Array, scale: Array, bias: Array, dtype: jnp.dtype) -> Array:
    quotient, _ = _quotient(x)
    return quotient.astype(dtype).astype(quotient.dtype) * scale + bias


@_keeps_quotient.defjvp
def _keeps_quotient_jvp(dtype: jnp.dtype, primals, tangents):
    (x, scale, bias), (dx, dscale, dbias) = primals, tangents
    quotient, inverse = _quotient(x)
    # Behind the barrier XLA can't make it again from a wider map, and keep that one until then.
    kept = keep(jax.lax.optimization_barrier(quotient.astype(dtype)))
    quotient = kept.astype(quotient.dtype)
    inverse = keep(inverse[..., 0])[..., None]
    dx = dx.astype(quotient.dtype)
    along = (dx * quotient).mean(axis=-1, keepdims=True)
    dquotient = (dx - dx.mean(axis=-1, keepdims=True) - quotient * along) * inverse
    return quotient * scale + bias, dquotient * scale + quotient * dscale + dbias
