"""LayerNorm over the channels."""

import jax
import jax.numpy as jnp

from vmamba_jax.ops._wide import wide
from vmamba_jax.typing import Array, Float

EPSILON = 1e-5  # PyTorch's


@jax.checkpoint  # a gradient keeps the input, and no normalised copy of it
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
        y in float32, or wider if `x` is.
    """
    centred = x.astype(wide(x.dtype))
    centred = centred - centred.mean(axis=-1, keepdims=True)
    variance = jnp.square(centred).mean(axis=-1, keepdims=True)
    standard = centred * jax.lax.rsqrt(variance + EPSILON)
    scale, bias = (
        w.astype(centred.dtype).reshape((1,) * (x.ndim - 1) + w.shape) for w in (scale, bias)
    )
    return standard * scale + bias
