"""The depthwise convolution as shifted multiply-adds.

On a CPU, XLA's grouped convolution takes over fifteen times as long, forward and backward
(``benchmarks/results/depthwise.json``). The derivative is written out for the same reason.
"""

from functools import reduce
from operator import add

import jax
import jax.numpy as jnp

from vmamba_jax.ops._alike import alike
from vmamba_jax.ops._parts import largest_divisor
from vmamba_jax.ops._sums import over_positions
from vmamba_jax.ops.residuals import keep, together
from vmamba_jax.typing import Array, FeatureMap, Float

ROWS = 14
"""Rows of the map whose part of the kernel's gradient is computed at once on a CPU."""


def depthwise_conv(x: FeatureMap, kernel: Float[Array, "S S C"]) -> Float[Array, "B P Q C"]:
    """Convolves each channel with its own kernel, padded by ``(S - 1) // 2`` zeros.

    Args:
        x: feature map.
        kernel: S x S weights a channel; an odd S keeps the size of the map.

    Returns:
        The convolved map in float32.
    """
    return _convolve(*alike((x, kernel)))


@jax.custom_vjp
def _convolve(x: Array, kernel: Array) -> Array:
    return _forward(x, kernel)[0]


def _forward(x: Array, kernel: Array):
    padded = keep(_pad(x, (kernel.shape[0] - 1) // 2))
    return keep(_correlate(padded, kernel)), (padded, kernel)


def _backward(residuals, dy: Array):
    padded, kernel = residuals
    after = kernel.shape[0] // 2
    dx = _correlate(_pad(dy, after), kernel[::-1, ::-1])
    # On a CPU a few rows at a time stay in the cache. Elsewhere a loop would idle the device, and
    # gather a batch that is split over several.
    dkernel = jax.lax.platform_dependent(
        padded, dy, cpu=_kernel_gradient_by_rows, default=_kernel_gradient
    )
    return together((dx.astype(padded.dtype), dkernel.astype(kernel.dtype)))


def _kernel_gradient(padded: Array, dy: Array) -> Array:
    height, width = dy.shape[1:3]
    size = padded.shape[1] - height + 1
    padded, dy = padded.astype(jnp.float32), dy.astype(jnp.float32)
    rows = [
        [over_positions(padded[:, i : i + height, j : j + width] * dy) for j in range(size)]
        for i in range(size)
    ]
    return jnp.asarray(rows)


def _kernel_gradient_by_rows(padded: Array, dy: Array) -> Array:
    # Rows are added up as they are multiplied, and the columns of all images at the end.
    batch, height, width, channels = dy.shape
    size = padded.shape[1] - height + 1
    if dy.size == 0:
        return jnp.zeros((size, size, channels), jnp.float32)
    rows = largest_divisor(height, ROWS)
    count = height // rows

    def cut(a: Array, turn: Array, rows_of_a: int) -> Array:
        corner = (turn // count, turn % count * rows, 0, 0)
        return jax.lax.dynamic_slice(a, corner, (1, rows_of_a, *a.shape[2:]))[0].astype(jnp.float32)

    def add_rows(turn: Array, totals: list[Array]) -> list[Array]:
        # Each is read by all taps: XLA for CPU would cut it out anew for every row of each.
        x, now = together((cut(padded, turn, rows + size - 1), cut(dy, turn, rows)))

        def tap(i: int, j: int) -> Float[Array, "W C"]:
            return reduce(add, (x[i + row, j : j + width] * now[row] for row in range(rows)))

        return [
            total + jnp.stack([tap(i, j) for j in range(size)]) for i, total in enumerate(totals)
        ]

    start = [jnp.zeros_like(dy, jnp.float32, shape=(size, width, channels))] * size
    totals = jax.lax.fori_loop(0, batch * count, add_rows, start)
    sums = [[over_positions(columns) for columns in total] for total in totals]
    return jnp.asarray(sums)


_convolve.defvjp(_forward, _backward)


def _correlate(padded: Array, kernel: Array) -> Array:
    size = kernel.shape[0]
    taps = kernel.astype(jnp.float32)[:, :, None, None, None]
    padded = padded.astype(jnp.float32)
    height, width = (side - size + 1 for side in padded.shape[1:3])
    # Each kernel row sums over whole map rows first, which are then shifted against each other.
    rows = [
        reduce(add, (padded[:, i : i + height, j : j + width] * taps[i, j] for j in range(size)))
        for i in range(size)
    ]
    return reduce(add, rows)


def _pad(x: Array, by: int) -> Array:
    return jnp.pad(x, ((0, 0), (by, by), (by, by), (0, 0)))
