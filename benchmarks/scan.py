"""Time, memory and bytes of the selective scan, beside the copy bandwidth of the same run.

    python benchmarks/scan.py
    python benchmarks/scan.py --stages tiny1 tiny4 --states 1 --implementations sequential

"share of copy" is the bytes that a scan must move at least (its arguments and results, once each)
over its time, against what a copy of `u` reaches, whose result is new memory as the scan's is.
"share of in place" is against the same over memory already held.
"""

import itertools
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _measure import compile_timed, copy_run, in_place_run, interleaved, report

from vmamba_jax.ops import IMPLEMENTATIONS, selective_scan

# (L, C) of each stage at 224 pixels, ssm_ratio 1; K = 4.
STAGES = {
    f"{size}{stage + 1}": ((56 >> stage) ** 2, dim << stage)
    for size, dim in (("tiny", 96), ("base", 128))
    for stage in range(4)
}
ROUTES = 4


@dataclass
class Options:
    """Which scans to time."""

    stages: tuple[str, ...] = tuple(STAGES)
    """Keys of STAGES."""
    states: tuple[int, ...] = (1, 16)
    """State sizes N."""
    batch: int = 8
    """Images at a time."""
    implementations: tuple[str, ...] = tuple(
        name for name in IMPLEMENTATIONS if name != "pallas_tpu" or jax.default_backend() == "tpu"
    )
    """Keys of vmamba_jax.ops.IMPLEMENTATIONS."""
    rounds: int = 5
    """Times each case runs."""
    output: str = "scan"
    """Name of the result file."""


def main(options: Options) -> None:
    """Times every case and reports."""
    rows = []
    cases = itertools.product(options.stages, options.states, options.implementations)
    for stage, states, implementation in cases:
        rows.extend(_case(stage, states, implementation, options))
    report(options.output, rows, options=asdict(options))


def _case(stage: str, states: int, implementation: str, options: Options) -> list[dict[str, Any]]:
    length, channels = STAGES[stage]
    arguments = _arguments(options.batch, length, channels, states)
    scan = partial(selective_scan, implementation=implementation)

    def gradient(dy, *arguments):
        return jax.vjp(scan, *arguments)[1](dy)

    dy = jnp.ones_like(arguments[0])
    forward, forward_compile = compile_timed(scan, *arguments)
    both, both_compile = compile_timed(gradient, dy, *arguments)
    copy, copied = copy_run(dy)
    in_place, _ = in_place_run(dy)
    runs = {
        "in place": in_place,
        "copy": copy,
        "forward": lambda: forward(*arguments),
        "both": lambda: both(dy, *arguments),
    }
    times = interleaved(runs, options.rounds)
    times["backward"] = times["both"] - times["forward"]
    inputs = sum(a.nbytes for a in arguments)
    fresh, held = copied / times["copy"], copied / times["in place"]  # of each round
    rows = []
    for mode, compiled, seconds, moved in (
        ("forward", forward, forward_compile, inputs + dy.nbytes),
        ("backward", both, both_compile, 2 * inputs + dy.nbytes),
    ):
        memory = compiled.memory_analysis()
        rows.append(
            {
                "stage": stage,
                "shape": [options.batch, length, ROUTES, channels],
                "N": states,
                "implementation": implementation,
                "mode": mode,
                "ms": 1e3 * float(np.median(times[mode])),
                "times forward": float(np.median(times[mode] / times["forward"])),
                "MB moved": moved / 1e6,
                "share of copy": float(np.median(moved / times[mode] / fresh)),
                "share of in place": float(np.median(moved / times[mode] / held)),
                "memory / inputs": (memory.temp_size_in_bytes + memory.output_size_in_bytes)
                / inputs,
                "compile s": seconds,
                "copy GB/s": float(np.median(fresh)) / 1e9,
                "in place GB/s": float(np.median(held)) / 1e9,
            }
        )
    return rows


def _arguments(batch: int, length: int, channels: int, states: int) -> tuple[jax.Array, ...]:
    rng = np.random.default_rng(0)

    def normal(*shape: int) -> jax.Array:
        return jnp.asarray(rng.normal(size=shape), jnp.float32)

    wide, narrow = (batch, length, ROUTES, channels), (batch, length, ROUTES, states)
    weight = (ROUTES, channels)
    return (
        normal(*wide),
        normal(*wide) - 1,
        -jnp.exp(normal(*weight, states)),
        normal(*narrow),
        normal(*narrow),
        normal(*weight),
        normal(*weight),
    )


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
