"""What the benchmarks share: interleaved timing, this machine's ceilings, results as JSON."""

import json
import os
import platform
import subprocess
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from rich.console import Console
from rich.table import Table

RESULTS = Path(__file__).parent / "results"


def interleaved(runs: Mapping[str, Callable[[], object]], rounds: int) -> dict[str, np.ndarray]:
    """Seconds of each run, (rounds,); every round runs each once, so that drift hits all alike.

    A run may return the seconds it took itself (another process's clock). Compare two runs by the
    median over the rounds of their ratio: neighbours in time share the machine's mood.
    """
    times: dict[str, list[float]] = {name: [] for name in runs}
    for now in range(rounds + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            result = run()
            taken = result if isinstance(result, float) else None
            if taken is None:
                jax.block_until_ready(result)
                taken = time.perf_counter() - start
            if now:  # the first round warms up
                times[name].append(taken)
    return {name: np.array(seconds) for name, seconds in times.items()}


def matmul_run(side: int = 2048) -> tuple[Callable[[], object], float]:
    """A square float32 matrix product and its floating-point operations."""
    a = jnp.ones((side, side), jnp.float32) / side
    product = jax.jit(jnp.matmul)
    return lambda: product(a, a), 2.0 * side**3


def copy_run(like: jax.Array) -> tuple[Callable[[], object], float]:
    """A copy of an array into fresh memory, and the bytes it moves."""
    copy = jax.jit(lambda a: a + 1)
    return lambda: copy(like), 2.0 * like.nbytes


def in_place_run(like: jax.Array) -> tuple[Callable[[], object], float]:
    """The same within memory that is already held: no new pages, which on a CPU cost most."""
    add = jax.jit(lambda a: a + 1, donate_argnums=0)
    held = [like.copy()]

    def run() -> object:
        held[0] = add(held[0])
        return held[0]

    return run, 2.0 * like.nbytes


def compile_timed(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """The compiled function and the seconds that tracing and compiling took."""
    start = time.perf_counter()
    compiled = jax.jit(function).lower(*arguments).compile()
    return compiled, time.perf_counter() - start


def environment() -> dict[str, Any]:
    """Device, versions, commit, and what the C library is told about memory."""
    described = subprocess.run(
        ["git", "describe", "--always", "--dirty"],
        capture_output=True,
        text=True,
        check=False,
        cwd=RESULTS.parent,
    )
    return {
        "device": jax.devices()[0].device_kind,
        "processor": platform.processor() or platform.machine(),
        "devices": jax.device_count(),
        "versions": {name: version(name) for name in ("jax", "jaxlib", "flax")},
        "python": platform.python_version(),
        "commit": described.stdout.strip(),
        "GLIBC_TUNABLES": os.environ.get("GLIBC_TUNABLES", ""),
    }


def report(name: str, rows: list[dict[str, Any]], **more: Any) -> None:
    """Prints the rows as a table and writes them to ``results/{name}.json``."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = Table(*columns)
    for row in rows:
        table.add_row(*(_short(row.get(key, "")) for key in columns))
    Console(width=200).print(table)
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**environment(), **more, "rows": rows}, indent=1) + "\n")
    print(f"wrote {path}")


def _short(value: object) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
