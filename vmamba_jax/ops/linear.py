"""The linear layer, and its bias alone."""

import jax.numpy as jnp

from vmamba_jax.ops.residuals import keep
from vmamba_jax.ops.wide import wide
from vmamba_jax.typing import Array, Float, Precision


def linear(
    x: Float[Array, "... C"],
    kernel: Float[Array, "C c"],
    bias: Float[Array, "c"] | None = None,
    *,
    precision: Precision = None,
) -> Float[Array, "... c"]:
    """``x @ kernel + bias`` at each position.

    Args:
        x: any float dtype.
        kernel: weights, of the dtype of `x`.
        bias: of the dtype of `x`; None adds nothing.
        precision: of the product, see `jax.lax.Precision`.
    """
    y = product(x, kernel, precision=precision)
    return keep(y if bias is None else add_bias(y, bias))


def product(
    x: Float[Array, "... C"], kernel: Float[Array, "C c"], *, precision: Precision = None
) -> Float[Array, "... c"]:
    """``x @ kernel`` at each position; what a gradient keeps of it is left to the caller."""
    # A matrix of rows: XLA for CPU copies the operand of a fused product that has more axes.
    y = jnp.matmul(x.reshape(-1, x.shape[-1]), kernel, precision=precision)
    return y.reshape(*x.shape[:-1], kernel.shape[1])


def add_bias(x: Float[Array, "... C"], bias: Float[Array, "C"]) -> Float[Array, "... C"]:
    """``x + bias`` at each position.

    Args:
        x: any float dtype.
        bias: of the dtype of `x`; its gradient is summed in float32.
    """
    bias = bias.astype(wide(x.dtype)).reshape((1,) * (x.ndim - 1) + bias.shape)
    return (x.astype(bias.dtype) + bias).astype(x.dtype)
