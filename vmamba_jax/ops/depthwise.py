"""The depthwise convolution as shifted multiply-adds.

On a CPU, XLA's grouped convolution takes over fifteen times as long, forward and backward
(``benchmarks/results/depthwise.json``). The derivative is written out for the same reason.
"""

from functools import reduce
from operator import add

import jax
import jax.numpy as jnp

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
    return _correlate(x, kernel, (kernel.shape[0] - 1) // 2)


def _forward(x: Array, kernel: Array):
    return depthwise_conv(x, kernel), (x, kernel)


def _backward(residuals, dy: Array):
    x, kernel = residuals
    size = kernel.shape[0]
    before = (size - 1) // 2
    dx = _correlate(dy, kernel[::-1, ::-1], size - 1 - before)
    # On a CPU one image at a time stays in the cache; all at once, XLA writes out every shifted
    # copy. Elsewhere a loop would idle the device, and gather a batch that is split over several.
    dkernel = jax.lax.platform_dependent(
        _pad(x, before),
        dy.astype(jnp.float32),
        cpu=_kernel_gradient_by_image,
        default=_kernel_gradient,
    )
    return dx.astype(x.dtype), dkernel.astype(kernel.dtype)


def _kernel_gradient(padded: Array, dy: Array) -> Array:
    height, width = dy.shape[1:3]
    size = padded.shape[1] - height + 1
    rows = [
        [(padded[:, i : i + height, j : j + width] * dy).sum((0, 1, 2)) for j in range(size)]
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


def _correlate(x: Array, kernel: Array, padding: int) -> Array:
    size = kernel.shape[0]
    taps = kernel.astype(jnp.float32)[:, :, None, None, None]
    padded = _pad(x, padding)
    height, width = (side - size + 1 for side in padded.shape[1:3])
    # Each kernel row sums over whole map rows first, which are then shifted against each other.
    rows = [
        reduce(add, (padded[:, i : i + height, j : j + width] * taps[i, j] for j in range(size)))
        for i in range(size)
    ]
    return reduce(add, rows)


def _pad(x: Array, by: int) -> Array:
    return jnp.pad(x.astype(jnp.float32), ((0, 0), (by, by), (by, by), (0, 0)))
