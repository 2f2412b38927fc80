"""What crosses HBM for the scan of a map, forward and back: needs libtpu (`jax[tpu]`), but no TPU.

    python benchmarks/tpu_compile.py

The kernels' bytes are counted from their block specs, those that XLA moves around them (to lay out
arrays, and to add up the weights' gradients) from the compiled module's text; beside the least
possible, inputs and outputs once each. How inputs and outputs lie is the compiler's choice, as it
is within the model.
"""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_WORKER_ID", "0")

import itertools
import time
from functools import partial

import jax
import jax.numpy as jnp
from _hbm import around_kernels, crossings
from _measure import report
from jax.experimental import topologies
from jax.experimental.layout import Format, Layout
from jax.sharding import SingleDeviceSharding

from vmamba_jax.ops import _pallas_tpu
from vmamba_jax.ops.scan_2d import _along_routes, _scan_route

CHIPS = ("v5e:2x2", "v6e:2x2", "v5p:2x2x1", "v4:2x2x1", "tpu7x:2x2x1")
# Side, channels, rank and states of stages 1 and 4 at 224 pixels: of s1l8, of the vanilla model.
MAPS = ((56, 96, 6, 1), (7, 768, 48, 1), (56, 192, 6, 16), (7, 1536, 48, 16))
BATCHES = (64, 16)


def main() -> None:
    """Compiles forward and backward of each and reports."""
    rows = []
    for topology in CHIPS:
        described = topologies.get_topology_desc(platform="tpu", topology_name=topology)
        with jax.default_device(described.devices[0]):
            for sizes, batch in itertools.product(MAPS, BATCHES):
                rows += of_map(described.devices[0], batch, *sizes)
    report("tpu_compile", rows, compiled_for="TPU, bfloat16, order cross2d")


def of_map(chip, batch: int, side: int, channels: int, rank: int, states: int) -> list[dict]:
    """Rows of one map on one chip."""
    routes, positions = 4, (batch, side, side)
    low, wide = (partial(jax.ShapeDtypeStruct, dtype=d) for d in (jnp.bfloat16, jnp.float32))
    numbers = rank + 2 * states
    rows = jax.eval_shape(_pallas_tpu.projection, low((routes, numbers, channels))).shape[0]
    maps = (low((*positions, channels)), low((*positions, rows)))
    weights = tuple(wide((routes, channels, *last)) for last in ((states,), (), ()))
    weights = (*weights, low((routes, channels, rank)))
    dy = wide((*positions, channels))
    # The rows of zeros are no part of the least.
    inputs = (maps[0], low((*positions, routes * numbers)), weights)

    def at_once(maps, weights):
        return _pallas_tpu.selective_scan_2d(*maps, *weights, order="cross2d")

    def by_route(maps, weights):
        x, projected = maps
        projected = projected[..., : routes * numbers].reshape(*positions, routes, numbers)
        return _along_routes(x, projected, "cross2d", partial(_scan_route, weights, False, ()))

    def one_route(maps, weights):
        x, projected = (a.reshape(batch, side * side, 1, -1) for a in maps)
        delta, b, c = jnp.split(projected[..., :numbers], (rank, rank + states), -1)
        a, *others = (w[:1] for w in weights)
        return _pallas_tpu.selective_scan(x, delta, a, b, c, *others, True, False)

    scan, counted, count = at_once, at_once, 1
    try:
        jax.eval_shape(at_once, maps, weights)
    except NotImplementedError:
        scan, counted, count = by_route, one_route, routes

    def gradient(function, dy, maps, weights):
        y, pull = jax.vjp(function, maps, weights)
        return pull(dy.reshape(y.shape).astype(y.dtype))

    automatic = Format(Layout.AUTO, SingleDeviceSharding(chip))
    table = []
    for mode, of, given, least in (
        ("forward", lambda f: f, (maps, weights), (inputs, dy)),
        ("backward", lambda f: partial(gradient, f), (dy, maps, weights), (dy, inputs, inputs)),
    ):
        start = time.perf_counter()
        compiled = (
            jax.jit(of(scan), in_shardings=automatic, out_shardings=automatic)
            .lower(*given)
            .compile()
        )
        taken = time.perf_counter() - start
        # Where the gradient needs no states of the forward pass, its own kernel alone is left.
        met = crossings(of(counted), *given)
        met = met[-1:] if count == 1 else met
        minimum = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(least))
        moved, tiled = (count * sum(of) for of in list(zip(*met, strict=True))[1:])
        table.append(
            {
                "chip": chip.device_kind,
                "batch": batch,
                "map": f"{side}x{side}x{channels}",
                "N": states,
                "mode": mode,
                "kernels": count * len(met),
                "least MB": minimum / 1e6,
                "kernels MB": moved / 1e6,
                "ratio": moved / minimum,
                "in tiles": tiled / minimum,
                "XLA MB": around_kernels(compiled.as_text()) / 1e6,
                "temporaries MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
                "compile s": taken,
            }
        )
        print(table[-1], flush=True)
    return table


if __name__ == "__main__":
    main()
