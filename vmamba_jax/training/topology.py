"""Whether a run fits a TPU, found out without one: its training step, compiled for the topology.

The compiler is the real one (libtpu, of the `tpu` extra); it needs a description of the chips, not
the chips. What it says about memory is what the run will use.
"""

import collections
import dataclasses
import json
import math
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import jax
from rich.console import Console
from rich.table import Table
from tyro.constructors import PrimitiveConstructorSpec

from vmamba_jax.training.buffers import held_at_peak
from vmamba_jax.training.chips import SLICES, TopologyError, describe, memory_of
from vmamba_jax.training.config import RunConfig, to_json
from vmamba_jax.training.fit import (
    DoesNotFitError,
    bytes_of,
    choices,
    compile_step,
    lower_step,
)
from vmamba_jax.training.setup import build_learner
from vmamba_jax.training.sharding import check_batch_size, make_mesh
from vmamba_jax.training.start import architecture_of

_GIB = 2**30
_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")
_SHOWN = 30
"""Entries of what is held at the peak that are printed; the report has all."""

_Slice = PrimitiveConstructorSpec(
    nargs=1,
    metavar="KIND:SHAPE",
    instance_from_str=lambda words: words[0],
    is_instance=lambda value: isinstance(value, str),
    str_from_instance=lambda value: [value],
    choices=SLICES,
)
"""On the command line the topologies are a list, which completes and validates."""


@dataclasses.dataclass(frozen=True)
class CompileConfig(RunConfig):
    """A training run to compile for a TPU.

    Attributes:
        topology: kind and arrangement of the chips, such as ``v5e:4x4`` or ``v4:4x4x4``; the kinds
            are v4, v5e, v5p, v6e and tpu7x.
        num_classes: classes of the head; the data set is not opened.
        output: also write the report here, as JSON.
        explain: also list what a device holds at the peak of its memory, by layer and operation.
    """

    topology: Annotated[str, _Slice] = "v5e:4x4"
    num_classes: int = 1000
    output: Path | None = None
    explain: bool = False


def compile_for_topology(config: CompileConfig, console: Console | None = None) -> dict[str, Any]:
    """Compiles the exact training step of a run for a TPU topology, and reports what it needs.

    Args:
        config: the run and the topology.
        console: where the report is printed; standard output by default.

    Returns:
        The report: parameters, bytes per device, collectives, compile time, versions; and, to
        `explain`, what is held at the peak.

    Raises:
        TopologyError: if libtpu is missing, the topology is unknown, or the step does not fit.
        ValueError: if the batch does not divide by the devices.
    """
    console = console or Console()
    devices = describe(config.topology)
    mesh = make_mesh(config.mesh, devices)
    check_batch_size(config.data.batch_size, mesh, config.optimizer.accumulation_steps)
    available = memory_of(devices[0])
    console.print(f"compiling for {mesh.size} devices of {config.topology}: takes some minutes")
    refusal = None
    for choice in choices(config):
        start = time.perf_counter()
        # The kinds of device say how to scan.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            learner = build_learner(
                choice, architecture_of(choice), num_classes=choice.num_classes, mesh=mesh
            )
        lowered = lower_step(choice, learner, mesh)
        lowered_after = time.perf_counter() - start
        try:
            compiled = compile_step(lowered, available)
        except DoesNotFitError as error:
            refusal = error
            console.print(f"with model.recompute {choice.model.recompute} it does not fit")
        else:
            break
    else:
        raise TopologyError(
            f"the training step does not fit the memory of a device of {config.topology}: use "
            "more chips, a smaller data.batch-size, optimizer.accumulation-steps, "
            "model.scan-blocks, model.recompute or mesh.fsdp. The compiler says: "
            + (str(refusal) if config.explain else str(refusal)[:600])
        ) from refusal
    seconds = time.perf_counter() - start

    program = str(compiled.as_text())
    per_device = bytes_of(compiled)
    total = sum(per_device.values())
    report = {
        "topology": config.topology,
        "devices": mesh.size,
        "chips": len({tuple(device.coords) for device in devices}),
        "mesh": dict(mesh.shape),
        "model": config.model_name,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(learner.params)),
        "recompute": choice.model.recompute,
        "global_batch": choice.data.batch_size,
        "images_per_device": choice.data.batch_size // mesh.size,
        "bytes_per_device": per_device | {"total": total},
        "memory_of_a_device": available,
        "fits": available is None or total <= available,
        "collectives": _collectives(program),
        "lowering_seconds": round(lowered_after, 1),
        "compile_seconds": round(seconds - lowered_after, 1),
        "versions": {name: version(name) for name in ("jax", "libtpu", "flax", "optax")},
        "config": to_json(dataclasses.replace(config, output=None)),
    }
    if config.explain:
        try:
            report["held_at_peak"] = [held._asdict() for held in held_at_peak(program)]
        except ValueError as error:  # all else that was found in these minutes is still told
            console.print(f"what is held at the peak can't be told: {error}")
    _print(report, console)
    if config.output is not None:
        config.output.write_text(json.dumps(report, indent=2) + "\n")
    return report


def _collectives(hlo: str) -> dict[str, int]:
    """How often each collective occurs in a compiled program; a loop's body counts once."""
    found = re.findall(rf"\s({'|'.join(_COLLECTIVES)})(?:-start)?\(", hlo)
    return dict(sorted(collections.Counter(found).items()))


def _print(report: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{report['model']} on {report['topology']}", show_header=False)
    table.add_row("parameters", f"{report['parameters']:,}")
    table.add_row("chips", f"{report['chips']} ({report['devices']} devices)")
    table.add_row("computed again", report["recompute"])
    table.add_row("images", f"{report['global_batch']} ({report['images_per_device']} a device)")
    for name, size in report["bytes_per_device"].items():
        table.add_row(f"{name.replace('_', ' ')} a device", f"{size / _GIB:.2f} GiB")
    if report["memory_of_a_device"] is not None:
        table.add_row("memory of a device", f"{report['memory_of_a_device'] / _GIB:.2f} GiB")
    table.add_row("fits", "yes" if report["fits"] else "NO")
    for name, count in report["collectives"].items():
        table.add_row(name, str(count))
    table.add_row("compile time", f"{report['compile_seconds']:.0f} s")
    console.print(table)
    if "held_at_peak" in report:
        _print_held(report["held_at_peak"], console)


def _print_held(held: list[dict[str, Any]], console: Console) -> None:
    """The largest entries, and the sum of the others."""
    total = sum(entry["size"] for entry in held)
    table = Table(title=f"held at the peak, on a device: {total / _GIB:.2f} GiB")
    for name in ("layer", "made by", "array"):
        table.add_column(name, overflow="fold")
    for name in ("number", "MiB", "share"):
        table.add_column(name, justify="right")

    def add(layer: str, kind: str, array: str, entries: list[dict[str, Any]]) -> None:
        number, size = (sum(entry[name] for entry in entries) for name in ("number", "size"))
        table.add_row(layer, kind, array, str(number), f"{size / 2**20:.1f}", f"{size / total:.1%}")

    arguments = [entry for entry in held if entry["kind"] == "argument"]
    others = [entry for entry in held if entry["kind"] != "argument"]
    add("parameters, optimizer, batch", "argument", "", arguments)
    for entry in others[:_SHOWN]:
        add(entry["layer"], entry["kind"], entry["array"], [entry])
    add(f"{len(others[_SHOWN:])} others", "", "", others[_SHOWN:])
    console.print(table)
