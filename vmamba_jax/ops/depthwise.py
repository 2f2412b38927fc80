"""The depthwise convolution as shifted multiply-adds.

On a CPU, XLA's grouped convolution takes over fifteen times as long, forward and backward
(``benchmarks/results/depthwise.json``). The derivative is written out for the same reason.
"""

from functools import reduce
from operator import add

import jax
import jax.numpy as jnp

from vmamba_jax.ops._sums import over_positions
from vmamba_jax.ops.residuals import keep, together
from vmamba_jax.typing import Array, FeatureMap, Float


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
    # On a CPU one image at a time stays in the cache. Elsewhere a loop would idle the device, and
    # gather a batch that is split over several.
    dkernel = jax.lax.platform_dependent(
        padded, dy, cpu=_kernel_gradient_by_image, default=_kernel_gradient
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


def _kernel_gradient_by_image(padded: Array, dy: Array) -> Array:
    def add(total: Array, image: tuple[Array, Array]) -> tuple[Array, None]:
        return total + _kernel_gradient(image[0][None], image[1][None]), None

    size = padded.shape[1] - dy.shape[1] + 1
    start = jnp.zeros((size, size, dy.shape[-1]), jnp.float32)
    return jax.lax.scan(add, start, (padded, dy))[0]


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
