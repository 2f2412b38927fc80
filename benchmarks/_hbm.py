"""Bytes that cross HBM for Pallas kernels, from their block specs, and for what is around them."""

import math
import re
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
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
        jax.eval_shape(partial(function), *arguments)  # itself, it might be cached
    return met


def _bytes(spec: Any, array: Any, grid: Sequence[int]) -> tuple[int, int]:
    visited = [spec.index_map(*now) for now in np.ndindex(*grid)]
    moves = 1 + sum(before != now for before, now in pairwise(visited))
    block = [1 if size is None else size for size in spec.block_shape]
    size = moves * jnp.dtype(array.dtype).itemsize
    *outer, rows, lanes = block
    tiled = (*outer, -(-rows // 8) * 8, -(-lanes // 128) * 128)
    return size * math.prod(block), size * math.prod(tiled)


# Of a module's instructions, those that move nothing by themselves.
_FREE = {"parameter", "constant", "bitcast", "tuple", "get-tuple-element", "custom-call"}
_FREE |= {"copy-done", "slice-done"}
_ARRAY = re.compile(r"(pred|[a-z]+[0-9]+)\[([0-9,]*)\](?:\{([^}]*)\})?")


def around_kernels(module: str) -> int:
    """Bytes that a compiled module's other instructions read from HBM and write there.

    Args:
        module: its text. What lies in VMEM there, memory space ``S(1)``, does not count.
    """
    entry, _, _ = module[module.index("\nENTRY ") :].partition("\n}")
    sizes: dict[str, int] = {}
    moved = 0
    for line in entry.splitlines():
        found = re.match(r"\s+(?:ROOT )?(%\S+) = (.*?) ([a-z-]+)\((.*?)\)(?:,|$)", line)
        if found is None:
            continue
        name, result, kind, operands = found.groups()
        sizes[name] = sum(map(_in_hbm, _ARRAY.findall(result)))
        if kind.endswith("-start"):  # between HBM and VMEM: the second array of the result
            moved += _in_hbm((*_ARRAY.findall(result)[1][:2], ""))
        elif kind not in _FREE:
            moved += sizes[name] + sum(sizes[o] for o in re.findall(r"%[\w.\-]+", operands))
    return moved


def _in_hbm(array: tuple[str, str, str]) -> int:
    kind, dimensions, layout = array
    bits = 8 if kind == "pred" else int(re.sub(r"\D", "", kind))
    numbers = math.prod(int(size) for size in dimensions.split(",") if size)
    return 0 if "S(" in layout else numbers * bits // 8
