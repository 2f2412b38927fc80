"""Whether a run fits a TPU, found out without one: its training step, compiled for the topology.

The compiler is the real one (libtpu, of the `tpu` extra); it needs a description of the chips, not
the chips. What it says about memory is what the run will use.
"""

import collections
import dataclasses
import json
import math
import os
import re
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from rich.console import Console
from rich.table import Table

from vmamba_jax.training.config import RunConfig, to_json
from vmamba_jax.training.setup import build_learner
from vmamba_jax.training.sharding import batch_sharding, check_batch_size, make_mesh, replicated
from vmamba_jax.training.start import architecture_of
from vmamba_jax.training.state import abstract_state

_GIB = 2**30
# Memory of one chip in GiB, https://cloud.google.com/tpu/docs/system-architecture-tpu-vm
_HBM = {"v4": 32, "v5e": 16, "v5p": 95, "v6e": 32}
_COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute", "reduce-scatter")


@dataclasses.dataclass(frozen=True)
class CompileConfig(RunConfig):
    """A training run to compile for a TPU.

    Attributes:
        topology: kind and arrangement of the chips, such as ``v5e:4x4`` or ``v4:4x4x4``.
        num_classes: classes of the head; the data set is not opened.
        output: also write the report here, as JSON.
    """

    topology: str = "v5e:4x4"
    num_classes: int = 1000
    output: Path | None = None


class TopologyError(RuntimeError):
    """A topology that can't be compiled for here; the message says why and what to do."""


def compile_for_topology(config: CompileConfig, console: Console | None = None) -> dict[str, Any]:
    """Compiles the exact training step of a run for a TPU topology, and reports what it needs.

    Args:
        config: the run and the topology.
        console: where the report is printed; standard output by default.

    Returns:
        The report: parameters, bytes per device, collectives, compile time, versions.

    Raises:
        TopologyError: if libtpu is missing, the topology is unknown, or the step does not fit.
        ValueError: if the batch does not divide by the devices.
    """
    console = console or Console()
    kind = config.topology.split(":")[0]
    if kind not in _HBM:
        raise TopologyError(
            f"unknown kind of TPU {kind!r} in topology {config.topology!r}: "
            f"use one of {', '.join(_HBM)}, such as v5e:4x4"
        )
    mesh = make_mesh(config.mesh, _devices(config.topology))
    check_batch_size(config.data.batch_size, mesh, config.optimizer.accumulation_steps)
    # The kinds of device say how to scan; the devices themselves can't hold as much as a constant.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        learner = build_learner(
            config, architecture_of(config), num_classes=config.num_classes, mesh=mesh
        )
        state = abstract_state(learner.init, mesh)
    size, batch_size = config.data.image_size, config.data.batch_size

    def split(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))

    batch = {
        "image": split(
            (batch_size, size, size, config.data.channels),
            jnp.uint8 if config.data.channels == 3 else jnp.float32,
        ),
        "label": split((batch_size,), jnp.int32),
    }
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=replicated(mesh))
    console.print(f"compiling for {mesh.size} chips of {config.topology}: takes some minutes")
    start = time.perf_counter()
    with jax.set_mesh(mesh):
        train_step: Any = learner.train_step
        lowered = train_step.lower(state, batch, rate)
        lowered_after = time.perf_counter() - start
        try:
            compiled = lowered.compile()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise TopologyError(
                f"the training step does not fit {_HBM[kind]} GiB a chip of {config.topology}: use "
                "more chips, a smaller data.batch-size, optimizer.accumulation-steps, "
                f"model.use-checkpoint or mesh.fsdp. The compiler says: {str(error)[:600]}"
            ) from error
    seconds = time.perf_counter() - start

    memory = compiled.memory_analysis()
    per_device = {
        "arguments": memory.argument_size_in_bytes,
        "outputs_not_aliased": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }
    total = sum(per_device.values())
    report = {
        "topology": config.topology,
        "chips": mesh.size,
        "mesh": dict(mesh.shape),
        "model": config.model_name,
        "parameters": sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(learner.params)),
        "global_batch": batch_size,
        "images_per_chip": batch_size // mesh.size,
        "bytes_per_chip": per_device | {"total": total},
        "hbm_bytes_per_chip": _HBM[kind] * _GIB,
        "fits": total <= _HBM[kind] * _GIB,
        "collectives": _collectives(compiled.as_text()),
        "lowering_seconds": round(lowered_after, 1),
        "compile_seconds": round(seconds - lowered_after, 1),
        "versions": {name: version(name) for name in ("jax", "libtpu", "flax", "optax")},
        "config": to_json(dataclasses.replace(config, output=None)),
    }
    _print(report, console)
    if config.output is not None:
        config.output.write_text(json.dumps(report, indent=2) + "\n")
    return report


def _devices(topology: str) -> list[Any]:
    """Descriptions of the chips of a topology."""
    # libtpu looks for the machine that it runs on; these values say that there is none to ask.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }.items():
        os.environ.setdefault(name, value)
    try:
        return topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except (RuntimeError, ValueError, NotImplementedError) as error:
        raise TopologyError(
            f"can't describe the topology {topology!r}: {str(error).splitlines()[0]}. It needs "
            "libtpu (pip install 'vmamba-jax[tpu]') and a topology that exists, such as v5e:4x4"
        ) from error


def _collectives(hlo: str) -> dict[str, int]:
    """How often each collective occurs in a compiled program; a loop's body counts once."""
    found = re.findall(rf"\s({'|'.join(_COLLECTIVES)})(?:-start)?\(", hlo)
    return dict(sorted(collections.Counter(found).items()))


def _print(report: dict[str, Any], console: Console) -> None:
    table = Table(title=f"{report['model']} on {report['topology']}", show_header=False)
    sizes = report["bytes_per_chip"]
    table.add_row("parameters", f"{report['parameters']:,}")
    table.add_row("images", f"{report['global_batch']} ({report['images_per_chip']} a chip)")
    for name, size in sizes.items():
        table.add_row(f"{name.replace('_', ' ')} a chip", f"{size / _GIB:.2f} GiB")
    table.add_row("memory of a chip", f"{report['hbm_bytes_per_chip'] / _GIB:.0f} GiB")
    table.add_row("fits", "yes" if report["fits"] else "NO")
    for name, count in report["collectives"].items():
        table.add_row(name, str(count))
    table.add_row("compile time", f"{report['compile_seconds']:.0f} s")
    console.print(table)
