"""The linear layer as a product of rows, and its bias alone, with their derivatives written out."""

import jax

from vmamba_jax.ops._alike import alike
from vmamba_jax.ops._sums import over_positions
from vmamba_jax.ops.residuals import keep, together
from vmamba_jax.typing import Array, Float


def linear(
    x: Float[Array, "... C"], kernel: Float[Array, "C c"], bias: Float[Array, "c"] | None = None
) -> Float[Array, "... c"]:
    """``x @ kernel + bias`` at each position.

    Args:
        x: any float dtype.
        kernel: weights, of the dtype of `x`.
        bias: of the dtype of `x`; None adds nothing.
    """
    return _linear(*alike((x, kernel, bias)))


@jax.custom_vjp
def _linear(x: Array, kernel: Array, bias: Array | None) -> Array:
    return _product(x, kernel, bias)


def _product(x: Array, kernel: Array, bias: Array | None) -> Array:
    # A matrix of rows: XLA for CPU copies the operand of a fused product that has more axes.
    y = _rows(x) @ kernel
    if bias is not None:
        y = y + bias[None]
    return y.reshape(*x.shape[:-1], kernel.shape[1])


def _forward(x: Array, kernel: Array, bias: Array | None):
    # Not by `linear`: a gradient that is differentiated forward must meet plain operations.
    return keep(_product(x, kernel, bias)), (x, kernel, bias)


def _backward(residuals, dy: Array):
    x, kernel, bias = residuals
    dx = (_rows(dy) @ kernel.T).reshape(x.shape)
    dbias = None if bias is None else over_positions(dy).astype(bias.dtype)
    return together((dx, _kernel_gradient(_rows(x), _rows(dy)), dbias))


_linear.defvjp(_forward, _backward)


def add_bias(x: Float[Array, "... C"], bias: Float[Array, "C"]) -> Float[Array, "... C"]:
    """``x + bias`` at each position.

    Args:
        x: any float dtype.
        bias: of the dtype of `x`.
    """
    return _add_bias(*alike((x, bias)))


@jax.custom_vjp
def _add_bias(x: Array, bias: Array) -> Array:
    return x + bias.reshape((1,) * (x.ndim - 1) + bias.shape)


def _add_bias_forward(x: Array, bias: Array):
    return x + bias.reshape((1,) * (x.ndim - 1) + bias.shape), None


def _add_bias_backward(residuals: None, dy: Array):
    del residuals
    return together((dy, over_positions(dy).astype(dy.dtype)))


_add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def _kernel_gradient(x: Float[Array, "M C"], dy: Float[Array, "M c"]) -> Float[Array, "C c"]:
    if len(x) > 4 * x.shape[1] and x.shape[1] > dy.shape[1]:
        # Of many rows, XLA for CPU computes a wide result in two thirds of the time of a tall one.
        return together(dy.T @ x).T
    return x.T @ dy


def _rows(x: Float[Array, "... C"]) -> Float[Array, "M C"]:
    return x.reshape(-1, x.shape[-1])
