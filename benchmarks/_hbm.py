"""Bytes that cross HBM for a Pallas TPU kernel, counted from its grid and block specs."""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import pallas as pl


class Crossing(NamedTuple):
    """Bytes of one kernel's operands and results.

    Attributes:
        name: of the kernel.
        moved: what its blocks move: a block is fetched, or written, when its index changes.
        tiled: the same as it lies in HBM, in tiles of 8 x 128 numbers.
    """

    name: str
    moved: int
    tiled: int


def crossings(function: Callable[..., Any], *arguments: Any) -> list[Crossing]:
    """Of every kernel that tracing `function` meets, one compiled for the context's device."""
    met: list[Crossing] = []
    call = pl.pallas_call

    def recorded(kernel: Any, *, grid: Any, in_specs: Any, out_specs: Any, **more: Any) -> Any:
        run = call(kernel, grid=grid, in_specs=in_specs, out_specs=out_specs, **more)

        def record(*operands: Any) -> Any:
            specs, arrays = [*in_specs, *out_specs], [*operands, *more["out_shape"]]
            each = [_bytes(*pair, grid) for pair in zip(specs, arrays, strict=True)]
            met.append(Crossing(more["name"], *(sum(of) for of in zip(*each, strict=True))))
            return run(*operands)

        return record

    with mock.patch.object(pl, "pallas_call", recorded):
        jax.eval_shape(function, *arguments)
    return met


def _bytes(spec: Any, array: Any, grid: Sequence[int]) -> tuple[int, int]:
    visited = [spec.index_map(*now) for now in np.ndindex(*grid)]
    moves = 1 + sum(a != b for a, b in zip(visited, visited[1:], strict=False))
    block = [1 if size is None else size for size in spec.block_shape]
    size = moves * jnp.dtype(array.dtype).itemsize
    *outer, rows, lanes = block
    tiled = (*outer, -(-rows // 8) * 8, -(-lanes // 128) * 128)
    return size * math.prod(block), size * math.prod(tiled)
