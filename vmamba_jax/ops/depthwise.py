"""The depthwise convolution as shifted multiply-adds.

On a CPU, XLA's grouped convolution takes over fifteen times as long, forward and backward
(``benchmarks/results/depthwise.json``). The derivative is written out for the same reason.
"""

from functools import reduce
from operator import add

import jax
import jax.numpy as jnp

from vmamba_jax.ops._parts import largest_divisor
from vmamba_jax.ops._sums import over_positions
from vmamba_jax.ops.residuals import keep, together
from vmamba_jax.typing import Array, FeatureMap, Float

GROUP = 5 * 2**17
"""Values of the images that the kernel's gradient sums over at a time, 2.5 MB."""
ROWS = 7
"""Map rows that it adds up elementwise: the matrix product that sums the rest has as much less to
read."""


@jax.custom_vjp
def depthwise_conv(x: FeatureMap, kernel: Float[Array, "S S C"]) -> Float[Array, "B P Q C"]:
    """Convolves each channel with its own kernel, padded by ``(S - 1) // 2`` zeros.

    Args:
        x: feature map.
        kernel: S x S weights a channel; an odd S keeps the size of the map.

    Returns:
        The convolved map in float32.
    """
    return _forward(x, kernel)[0]


def _forward(x: Array, kernel: Array):
    padded = keep(_pad(x, (kernel.shape[0] - 1) // 2))
    return keep(_correlate(padded, kernel)), (padded, kernel)


def _backward(residuals, dy: Array):
    padded, kernel = residuals
    after = kernel.shape[0] // 2
    dx = _correlate(_pad(dy, after), kernel[::-1, ::-1])
    # On a CPU a few images at a time stay in the cache. Elsewhere a loop would idle the device, and
    # gather a batch that is split over several.
    dkernel = jax.lax.platform_dependent(
        padded, dy, cpu=_kernel_gradient_by_group, default=_kernel_gradient
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


def _kernel_gradient_by_group(padded: Array, dy: Array) -> Array:
    batch, height, width, channels = dy.shape
    size = padded.shape[1] - height + 1
    group = largest_divisor(batch, GROUP // max(1, height * width * channels))
    rows = largest_divisor(height, ROWS)

    def split(a: Float[Array, "G H WC"]) -> tuple[Float[Array, "G h WC"], ...]:
        return jnp.unstack(a.reshape(group, height // rows, rows, width * channels), axis=2)

    def add_group(total: Array, images: tuple[Array, Array]) -> tuple[Array, None]:
        padded, dy = (
            a.astype(jnp.float32).reshape(*a.shape[:2], a.shape[2] * channels) for a in images
        )

        def tap(i: int, j: int) -> Float[Array, "C"]:
            seen = padded[:, i : i + height, j * channels : (j + width) * channels]
            added = reduce(add, (a * b for a, b in zip(split(seen), split(dy), strict=True)))
            return over_positions(added.reshape(*added.shape[:2], width, channels))

        taps = [[tap(i, j) for j in range(size)] for i in range(size)]
        return total + jnp.asarray(taps), None

    start = jnp.zeros((size, size, channels), jnp.float32)
    groups = jax.tree.map(lambda a: a.reshape(batch // group, group, *a.shape[1:]), (padded, dy))
    return jax.lax.scan(add_group, start, groups)[0]


depthwise_conv.defvjp(_forward, _backward)


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
