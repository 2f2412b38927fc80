"""The depthwise convolution as shifted multiply-adds.

On a CPU, XLA's grouped convolution takes over fifteen times as long, forward and backward
(``benchmarks/results/depthwise.json``).
"""

from functools import partial, reduce
from operator import add

import jax
import jax.numpy as jnp
from jax.custom_derivatives import SymbolicZero

from vmamba_jax.ops import _cpu
from vmamba_jax.ops.per_device import per_device
from vmamba_jax.ops.residuals import keep_scan_input
from vmamba_jax.ops.wide import wide
from vmamba_jax.typing import Array, FeatureMap, Float


def depthwise_conv(x: FeatureMap, kernel: Float[Array, "S S C"]) -> Float[Array, "B P Q C"]:
    """Convolves each channel with its own kernel, padded by ``(S - 1) // 2`` zeros.

    Args:
        x: feature map.
        kernel: S x S weights a channel; an odd S keeps the size of the map.

    Returns:
        The convolved map in float32, or wider if `x` is.
    """
    by = (len(kernel) - 1) // 2
    padded = keep_scan_input(jnp.pad(x, ((0, 0), (by, by), (by, by), (0, 0))))
    return keep_scan_input(_correlate(padded, kernel.astype(wide(x.dtype))))


def _gather(
    padded: Float[Array, "B H W C"], kernel: Float[Array, "S S C"]
) -> Float[Array, "B P Q C"]:
    """Each output adds up what its window sees."""
    size = len(kernel)
    padded = padded.astype(kernel.dtype)
    height, width = (side - size + 1 for side in padded.shape[1:3])
    taps = kernel[:, :, None, None, None]
    # Each kernel row sums over whole map rows first, which are then shifted against each other.
    rows = [
        reduce(add, (padded[:, i : i + height, j : j + width] * taps[i, j] for j in range(size)))
        for i in range(size)
    ]
    return reduce(add, rows)


def _scatter(
    padded: Float[Array, "B H W C"], kernel: Float[Array, "S S C"]
) -> Float[Array, "B P Q C"]:
    """The same, as each input adds to the windows that see it: its transpose gathers."""
    last = len(kernel) - 1
    padded = padded.astype(kernel.dtype)
    taps = kernel[:, :, None, None, None]

    def shifted(i: int, j: int) -> Array:
        return jnp.pad(padded * taps[i, j], ((0, 0), (last - i, i), (last - j, j), (0, 0)))

    rows = [reduce(add, (shifted(i, j) for j in range(last + 1))) for i in range(last + 1)]
    height, width = padded.shape[1:3]
    return reduce(add, rows)[:, last:height, last:width]


_correlate = jax.custom_jvp(_gather)


def _derivative(primals, tangents):
    (padded, kernel), (dpadded, dkernel) = primals, tangents
    y = _correlate(padded, kernel)
    terms = []
    if not isinstance(dpadded, SymbolicZero):
        terms.append(_scatter(dpadded, kernel))
    if not isinstance(dkernel, SymbolicZero):
        convolve = partial(jax.lax.platform_dependent, cpu=_cpu.depthwise_conv, default=_gather)
        terms.append(per_device(convolve, padded, dkernel))
    return y, sum(terms[1:], terms[0])


_correlate.defjvp(_derivative, symbolic_zeros=True)
