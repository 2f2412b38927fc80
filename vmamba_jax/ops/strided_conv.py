"""The strided convolution."""

from functools import partial
from typing import Any

import jax
from jax.custom_derivatives import SymbolicZero

from vmamba_jax.ops import _cpu
from vmamba_jax.ops.per_device import per_device
from vmamba_jax.typing import Array, FeatureMap, Float, Precision, ResampledMap


def strided_conv(
    x: FeatureMap,
    kernel: Float[Array, "S S C c"],
    *,
    stride: int,
    padding: int,
    precision: Precision = None,
) -> ResampledMap:
    """Convolves a map with an S x S kernel at every `stride`-th position.

    Args:
        x: feature map.
        kernel: weights, of the dtype of `x`.
        stride: step between two windows, in positions, along both axes.
        padding: rows and columns of zeros on each side.
        precision: of the products, see `jax.lax.Precision`.

    Returns:
        ``(B, h, w, c)`` of the dtype of `x`, with ``h = (H + 2 * padding - S) // stride + 1``.
    """
    return _convolve(x, kernel, stride, padding, precision)


def _by_xla(x: Array, kernel: Array, stride: int, padding: int, precision: Precision) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        precision=precision,
    )


_convolve = jax.custom_jvp(_by_xla, nondiff_argnums=(2, 3, 4))


def _derivative(stride: int, padding: int, precision: Precision, primals, tangents):
    """Of the first factor and of the second, each as the convolution itself."""
    at = {"stride": stride, "padding": padding}
    convolve: Any = partial(
        jax.lax.platform_dependent,
        cpu=partial(_cpu.strided_conv, **at),
        default=partial(_by_xla, precision=precision, **at),
    )
    (x, kernel), (dx, dkernel) = primals, tangents
    y = _convolve(x, kernel, stride, padding, precision)
    terms: list[Array] = [
        per_device(convolve, *factors)
        for factors, tangent in (((dx, kernel), dx), ((x, dkernel), dkernel))
        if not isinstance(tangent, SymbolicZero)
    ]
    return y, sum(terms[1:], terms[0])


_convolve.defjvp(_derivative, symbolic_zeros=True)
