"""LayerNorm with its derivative written out.

Derived automatically it keeps more than the input, and on a CPU XLA repeats the gradient of the
residual stream in every block: VMamba-T's training step took an eighth more time.
"""

import jax
import jax.numpy as jnp

from vmamba_jax.ops._alike import alike
from vmamba_jax.ops._sums import over_channels, over_positions
from vmamba_jax.ops.residuals import keep, together
from vmamba_jax.typing import Array, Float

EPSILON = 1e-5  # PyTorch's


def layer_norm(
    x: Float[Array, "... C"], scale: Float[Array, "C"], bias: Float[Array, "C"]
) -> Float[Array, "... C"]:
    """Normalises each position over its channels (Ba, Kiros and Hinton, 2016).

    ``y = (x - mean) / sqrt(variance + 1e-5) * scale + bias``, with the biased variance, taken in
    a second pass: the fast way cancels when the mean is large.

    Args:
        x: any float dtype.
        scale: of each channel.
        bias: of each channel.

    Returns:
        y in float32.
    """
    return _layer_norm(*alike((x, scale, bias)))


@jax.custom_vjp
def _layer_norm(x: Array, scale: Array, bias: Array) -> Array:
    return _forward(x, scale, bias)[0]


def _forward(x: Array, scale: Array, bias: Array):
    wide = x.astype(jnp.float32)
    mean = wide.mean(axis=-1, keepdims=True)
    variance = jnp.square(wide - mean).mean(axis=-1, keepdims=True)
    mean, inverse = keep((mean, jax.lax.rsqrt(variance + EPSILON)))
    y = (wide - mean) * inverse * _over(scale, x) + _over(bias, x)
    return y, (x, mean, inverse, scale, bias)


def _backward(residuals, dy: Array):
    *residuals, dy = together((*residuals, dy))
    x, mean, inverse, scale, bias = residuals
    standard = (x.astype(jnp.float32) - mean) * inverse
    along = dy * standard
    # By y = standard * scale + bias, of which mean and variance take two directions away.
    lost = over_channels(dy, scale) + standard * over_channels(along, scale)
    dx = (dy * _over(scale, x) - lost / x.shape[-1]) * inverse
    dscale, dbias = over_positions(along), over_positions(dy)
    return together((dx.astype(x.dtype), dscale.astype(scale.dtype), dbias.astype(bias.dtype)))


def _over(weight: Float[Array, "C"], x: Float[Array, "... C"]) -> Array:
    return weight.astype(jnp.float32).reshape((1,) * (x.ndim - 1) + weight.shape)


_layer_norm.defvjp(_forward, _backward)
