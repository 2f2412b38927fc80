"""What TPU's compiler makes of each implementation: needs libtpu (`jax[tpu]`), but no TPU.

    python benchmarks/tpu_compile.py

Memory and bytes are those of the compiled program for one v5e chip; they decide the default.
"""

import os

os.environ.setdefault("TPU_SKIP_MDS_QUERY", "1")
os.environ.setdefault("TPU_ACCELERATOR_TYPE", "v5litepod-4")
os.environ.setdefault("TPU_WORKER_HOSTNAMES", "localhost")
os.environ.setdefault("TPU_WORKER_ID", "0")

import time

import jax
import jax.numpy as jnp
from _measure import report
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from vmamba_jax.ops import selective_scan

# One direction pair of SS2D: stage 1 of s1l8 and of the vanilla model, stage 4 of s1l8.
SHAPES = ((8, 3136, 2, 96, 1), (8, 3136, 2, 192, 16), (8, 49, 2, 768, 1))


def main() -> None:
    """Compiles forward and backward of each and reports."""
    chip = topologies.get_topology_desc(platform="tpu", topology_name="v5e:2x2").devices[0]
    sharding = SingleDeviceSharding(chip)
    rows = []
    for shape in SHAPES:
        for implementation in ("pallas_tpu", "associative"):
            batch, length, routes, channels, states = shape

            def array(*shape, dtype=jnp.bfloat16):
                return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

            wide, narrow = (batch, length, routes, channels), (batch, length, routes, states)
            weight = array(routes, channels, dtype=jnp.float32)
            decay = array(routes, channels, states, dtype=jnp.float32)
            arguments = (array(*wide), array(*wide), decay, array(*narrow), array(*narrow))
            arguments = (*arguments, weight, weight)

            def forward(*arguments, implementation=implementation):
                return selective_scan(*arguments, implementation=implementation)

            def backward(dy, *arguments, forward=forward):
                return jax.vjp(forward, *arguments)[1](dy)

            for mode, function, given in (
                ("forward", forward, arguments),
                ("forward and backward", backward, (array(*wide), *arguments)),
            ):
                start = time.perf_counter()
                with jax.default_device(chip):
                    compiled = jax.jit(function).lower(*given).compile()
                rows.append(
                    {
                        "shape": list(shape),
                        "implementation": implementation,
                        "mode": mode,
                        "temporaries MB": compiled.memory_analysis().temp_size_in_bytes / 1e6,
                        "MB accessed": compiled.cost_analysis()["bytes accessed"] / 1e6,
                        "compile s": time.perf_counter() - start,
                    }
                )
    report("tpu_compile", rows, compiled_for="TPU v5e, bfloat16")


if __name__ == "__main__":
    main()
