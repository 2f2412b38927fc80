"""What pays on a CPU only: convolutions written so that their transposes are fast there.

A convolution is linear in its input and in its kernel, so that its derivative is a convolution, and
a gradient that one's transpose. XLA for CPU has no fast way for the transposed convolutions; these
transpose to products and to sums over rows that are still in a cache.
"""

from functools import partial, reduce
from operator import add

import jax
import jax.numpy as jnp

from vmamba_jax.ops._parts import largest_divisor
from vmamba_jax.typing import Array, FeatureMap, Float, ResampledMap

WINDOWS = 2**21
"""Values of the windows that are laid out at a time, 8 MB."""
ROWS = 14
"""Rows of the map that are convolved at a time."""


def strided_conv(
    x: FeatureMap, kernel: Float[Array, "S S C c"], stride: int, padding: int
) -> ResampledMap:
    """As `vmamba_jax.ops.strided_conv`: of all windows, as rows, the product with the kernel."""
    size, features = len(kernel), kernel.shape[-1]
    matrix = kernel.reshape(-1, features)
    height, width = ((side + 2 * padding - size) // stride + 1 for side in x.shape[1:3])
    # As many images at a time as fit a cache: all windows at once would be nine times the map.
    group = largest_divisor(x.shape[0], WINDOWS // max(1, height * width * len(matrix)))

    @partial(jax.checkpoint, prevent_cse=False)
    def convolve(x: FeatureMap) -> ResampledMap:
        rows = _windows(x, size, stride, padding).reshape(-1, len(matrix))
        return (rows @ matrix).reshape(x.shape[0], height, width, features)

    y = jax.lax.map(convolve, x.reshape(-1, group, *x.shape[1:]))
    return y.reshape(x.shape[0], height, width, features)


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


def depthwise_conv(
    padded: Float[Array, "B H W C"], kernel: Float[Array, "S S C"]
) -> Float[Array, "B P Q C"]:
    """As `vmamba_jax.ops.depthwise_conv` of a padded map, to be transposed by its kernel.

    The kernel's gradient adds up a few rows as they are multiplied, and the columns of all images
    at the end.
    """
    batch, height, width, channels = padded.shape
    size = len(kernel)
    height, width = height - size + 1, width - size + 1
    if batch == 0:
        return jnp.zeros_like(kernel, shape=(batch, height, width, channels))
    rows = largest_divisor(height, ROWS)
    count = height // rows
    taps = jnp.broadcast_to(kernel[:, :, None], (size, size, width, channels))

    @partial(jax.checkpoint, prevent_cse=False)
    def convolve(turn: Array) -> Float[Array, "rows Q C"]:
        corner = (turn // count, turn % count * rows, 0, 0)
        shape = (1, rows + size - 1, *padded.shape[2:])
        # All taps read it: XLA for CPU would cut it out anew for every row of each.
        x = jax.lax.optimization_barrier(jax.lax.dynamic_slice(padded, corner, shape)[0])
        x = x.astype(kernel.dtype)
        at = [(i, j) for i in range(size) for j in range(size)]
        return jnp.stack(
            [
                reduce(add, (x[row + i, j : j + width] * taps[i, j] for i, j in at))
                for row in range(rows)
            ]
        )

    y = jax.lax.map(convolve, jnp.arange(batch * count))
    return y.reshape(batch, height, width, channels)
