"""Where the time of a training step goes on a CPU, beside that of a forward pass.

    python benchmarks/breakdown.py

Of VMamba-T[s1l8] without the scan, whose loops' events would overflow the profiler's memory:
something as cheap as can be stands in its place. Milliseconds of each kind of operation in the
forward pass alone, and in the step going forward, computing again, and going back.
"""

import gzip
import json
import re
import tempfile
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tyro
from _measure import report

from vmamba_jax import create_model
from vmamba_jax.ops import scan_2d

# The kind of an operation, by the first part of the model's name for it that is here.
KINDS = {
    r"^$": "sums of gradients, as products with ones",  # XLA leaves these without a name
    r"conv2d": "depthwise convolution",
    r"conv\d?/|patch_embed/conv": "strided convolution",
    r"norm": "LayerNorm, and convolutions fused with it",
    r"op\._scan": "what surrounds the scan",
    r"fc1/(?!.*dot_general)": "GELU",  # with the bias of the layer before it
    r"fc\d/|(in|out)_proj/|head/": "linear layer",
    r"op/": "SiLU",
    r"blocks_\d+/": "residual sums, stochastic depth",
}


@dataclass
class Options:
    """What to run."""

    batch: int = 8
    """Images at a time."""
    rounds: int = 4
    """Times each runs."""
    output: str = "breakdown"
    """Name of the result file."""


def main(options: Options) -> None:
    """Profiles both and reports."""
    scan_2d.selective_scan = _in_place_of_the_scan
    model, variables = create_model("vmamba_tiny_s1l8")
    images = np.random.default_rng(0).normal(size=(options.batch, 224, 224, 3))
    images = jnp.asarray(images, jnp.float32)

    def loss(variables, images):
        logits = model.apply(variables, images, train=True, rngs={"dropout": jax.random.key(0)})
        return -jax.nn.log_softmax(jnp.asarray(logits))[:, 0].mean()

    programs = {"forward": model.apply, "step": jax.grad(loss)}
    compiled = {
        name: jax.jit(program).lower(variables, images).compile()
        for name, program in programs.items()
    }
    names = {name: _names(program.as_text()) for name, program in compiled.items()}
    totals = {name: Counter() for name in programs}
    for _ in range(options.rounds):
        for name, program in compiled.items():
            jax.block_until_ready(program(variables, images))
            events = _profiled(lambda program=program: program(variables, images))
            for operation, milliseconds in events:
                path = names[name].get(operation, "")
                totals[name][_phase(path), _kind(path)] += milliseconds / options.rounds
    columns = {
        "forward pass": ("forward", "forward"),
        **{f"step, {phase}": ("step", phase) for phase in ("forward", "again", "backward")},
    }
    rows = [
        {"kind": kind, **{c: totals[name][phase, kind] for c, (name, phase) in columns.items()}}
        for kind in (*dict.fromkeys(KINDS.values()), "other")
    ]
    rows.append({"kind": "sum", **{c: sum(row[c] for row in rows) for c in columns}})
    report(options.output, rows, options={"batch": options.batch, "rounds": options.rounds})


def _in_place_of_the_scan(u, dt, a, b, c, skip, bias, *, delta_proj, **_):
    del a, bias, delta_proj
    return u * skip[None, None] + (dt[..., :1] + b * c)


def _names(program: str) -> dict[str, str]:
    """HLO instruction -> what the model calls it."""
    pattern = r'^\s*(?:ROOT )?%([\w.\-]+) = .*op_name="([^"]*)"'
    return dict(re.findall(pattern, program, re.MULTILINE))


def _profiled(run: Callable[[], object]) -> list[tuple[str, float]]:
    """HLO instructions and their milliseconds."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        (path,) = Path(folder).rglob("*.trace.json.gz")
        trace: dict[str, Any] = json.loads(gzip.decompress(path.read_bytes()))
    events = (e for e in trace["traceEvents"] if "hlo_op" in e.get("args", {}))
    return [(e["args"]["hlo_op"], e["dur"] / 1e3) for e in events]


def _phase(path: str) -> str:
    if "rematted_computation" in path:
        return "again"
    return "backward" if "transpose(" in path or not path else "forward"


def _kind(path: str) -> str:
    return next((kind for part, kind in KINDS.items() if re.search(part, path)), "other")


if __name__ == "__main__":
    main(tyro.cli(Options, description=__doc__))
