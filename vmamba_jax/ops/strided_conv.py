"""The strided convolution, with a gradient of matrix products on a CPU.

XLA's compiler for CPUs has no fast way for the dilated convolutions of this gradient within a loop:
with accumulated gradients they took half of VMamba-T's training step
(``benchmarks/results/strided.json``).
"""

from functools import partial

import jax
import jax.numpy as jnp

from vmamba_jax.ops._alike import alike
from vmamba_jax.ops._parts import largest_divisor
from vmamba_jax.typing import Array, FeatureMap, Float, ResampledMap

WINDOWS = 2**21
"""Values of the windows that are laid out at a time, 8 MB."""


def strided_conv(
    x: FeatureMap, kernel: Float[Array, "S S C c"], *, stride: int, padding: int
) -> ResampledMap:
    """Convolves a map with an S x S kernel at every `stride`-th position.

    Args:
        x: feature map.
        kernel: weights, of the dtype of `x`.
        stride: step between two windows, in positions, along both axes.
        padding: rows and columns of zeros on each side.

    Returns:
        ``(B, h, w, c)`` of the dtype of `x`, with ``h = (H + 2 * padding - S) // stride + 1``.
    """
    return _convolve(*alike((x, kernel)), stride, padding)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _convolve(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    return _by_xla(x, kernel, stride, padding)


def _by_xla(x: Array, kernel: Array, stride: int, padding: int) -> Array:
    return jax.lax.conv_general_dilated(
        x,
        kernel,
        (stride, stride),
        ((padding, padding),) * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )


def _forward(x: Array, kernel: Array, stride: int, padding: int):
    return _by_xla(x, kernel, stride, padding), (x, kernel)


def _backward(stride: int, padding: int, residuals: tuple[Array, Array], dy: Array):
    def by_products(x: Array, kernel: Array, dy: Array):
        return _gradient_by_products(x, kernel, dy, stride, padding)

    def by_convolutions(x: Array, kernel: Array, dy: Array):
        return _gradient_by_convolutions(x, kernel, dy, stride, padding)

    return jax.lax.platform_dependent(*residuals, dy, cpu=by_products, default=by_convolutions)


_convolve.defvjp(_forward, _backward)


def _gradient_by_convolutions(
    x: Array, kernel: Array, dy: Array, stride: int, padding: int
) -> tuple[Array, Array]:
    return jax.vjp(lambda x, kernel: _by_xla(x, kernel, stride, padding), x, kernel)[1](dy)


def _gradient_by_products(
    x: Array, kernel: Array, dy: Array, stride: int, padding: int
) -> tuple[Array, Array]:
    # As many images at a time as fit a cache: all windows at once would be nine times the map.
    batch, height, width, channels = dy.shape
    matrix = kernel.reshape(-1, channels)
    per_image = max(1, height * width) * len(matrix)
    group = largest_divisor(batch, WINDOWS // per_image)

    def add(dkernel: Array, images: tuple[Array, ...]) -> tuple[Array, Array]:
        x, dy = images
        windows, to_map = jax.vjp(lambda x: _windows(x, len(kernel), stride, padding), x)
        rows, dy = windows.reshape(-1, len(matrix)), dy.reshape(-1, channels)
        (dx,) = to_map((dy @ matrix.T).reshape(windows.shape))
        return dkernel + rows.T @ dy, dx

    groups = tuple(a.reshape(batch // group, group, *a.shape[1:]) for a in (x, dy))
    dkernel, dx = jax.lax.scan(add, jnp.zeros_like(matrix), groups)
    return dx.reshape(x.shape), dkernel.reshape(kernel.shape)


def _windows(
    x: Float[Array, "G H W C"], size: int, stride: int, padding: int
) -> Float[Array, "G h w SSC"]:
    """What each position of the output sees, ``S * S * C`` values, row by row."""
    x = jnp.pad(x, ((0, 0), (padding, padding), (padding, padding), (0, 0)))
    height, width = (side - size + 1 for side in x.shape[1:3])
    return jnp.concatenate(
        [
            x[:, row : row + height : stride, column : column + width : stride]
            for row in range(size)
            for column in range(size)
        ],
        axis=-1,
    )
