"""Where every array lives: a ("data", "fsdp") mesh and the shardings of state and batches.

The batch is split over both axes. Large parameters, their moments and their average are split over
"fsdp" (Zhao et al., "PyTorch FSDP", 2023; Rajbhandari et al., "ZeRO", 2020) and whole along "data".
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental.mesh_utils import create_device_mesh
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

PyTree = Any

_MIN_SHARDED_SIZE = 2**12
"""Leaves with fewer elements stay whole: gathering them would cost more than they weigh."""


@dataclasses.dataclass(frozen=True)
class MeshConfig:
    """The shape of the device mesh, and the processes that it spans.

    Attributes:
        data: devices along "data", each holding all parameters; -1 takes what is left.
        fsdp: devices along "fsdp", which share the parameters among them.
        coordinator: for a run of several processes, HOST:PORT of the first one, or ``auto`` to ask
            the cluster (Slurm, Open MPI, Kubernetes, Cloud TPU).
        process_count: how many processes there are; not needed with ``auto``.
        process_index: which of them this is, from 0; not needed with ``auto``.
    """

    data: int = -1
    fsdp: int = 1
    coordinator: str | None = None
    process_count: int | None = None
    process_index: int | None = None


def join_processes(config: MeshConfig) -> None:
    """Connects this process to the others of the run; must come before any other use of JAX.

    Raises:
        ValueError: if the address comes without the number of processes or this one's index.
    """
    if config.coordinator is None:
        return
    # It would take SIGTERM from `StopRequest`.
    jax.config.update("jax_enable_preemption_service", False)
    if config.coordinator == "auto":
        jax.distributed.initialize()
        return
    if config.process_count is None or config.process_index is None:
        raise ValueError(
            f"mesh.coordinator {config.coordinator} also needs mesh.process-count and "
            "mesh.process-index"
        )
    jax.distributed.initialize(config.coordinator, config.process_count, config.process_index)


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> Mesh:
    """A ("data", "fsdp") mesh over all devices, or over the given ones.

    Raises:
        ValueError: if the shape does not use every device.
    """
    count = len(devices) if devices is not None else jax.device_count()
    fsdp = config.fsdp
    data = config.data if config.data != -1 else count // max(fsdp, 1)
    if fsdp < 1 or data < 1 or data * fsdp != count:
        raise ValueError(
            f"a mesh of data={config.data} x fsdp={fsdp} does not use {count} devices exactly: "
            f"choose two numbers whose product is {count} (data=-1 takes what is left)"
        )
    # An axis of 16 may take a side of 8 and part of another, which `jax.make_mesh` refuses.
    placed = create_device_mesh((data, fsdp), devices, allow_split_physical_axes=True)
    return Mesh(placed, ("data", "fsdp"), axis_types=(AxisType.Auto,) * 2)


def replicated(mesh: Mesh) -> NamedSharding:
    """A whole copy on every device."""
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """The leading axis split over all devices."""
    return NamedSharding(mesh, PartitionSpec(("data", "fsdp")))


def state_sharding(state: PyTree, mesh: Mesh) -> PyTree:
    """A sharding for every leaf: its longest axis that divides goes over "fsdp".

    Args:
        state: any tree of arrays or `jax.ShapeDtypeStruct`.
        mesh: from `make_mesh`.
    """
    parts = mesh.shape["fsdp"]

    def leaf_sharding(leaf: Any) -> NamedSharding:
        axes = [axis for axis, size in enumerate(leaf.shape) if size % parts == 0]
        if parts == 1 or not axes or np.prod(leaf.shape) < _MIN_SHARDED_SIZE:
            return replicated(mesh)
        axis = max(axes, key=lambda axis: leaf.shape[axis])
        return NamedSharding(mesh, PartitionSpec(*[None] * axis, "fsdp"))

    return jax.tree.map(leaf_sharding, state)


def check_batch_size(batch_size: int, mesh: Mesh, accumulation_steps: int = 1) -> None:
    """Refuses a batch that can't be split evenly.

    Raises:
        ValueError: if `batch_size` is no multiple of devices times accumulation steps.
    """
    parts = mesh.size * accumulation_steps
    if batch_size < 1 or batch_size % parts:
        lower = batch_size // parts * parts
        nearest = " or ".join(str(size) for size in (lower, lower + parts) if size)
        raise ValueError(
            f"a batch of {batch_size} images can't be split over {mesh.size} devices"
            + (f" in {accumulation_steps} accumulation steps" if accumulation_steps > 1 else "")
            + f": use a multiple of {parts}, such as {nearest}"
        )


def put_batch(batch: dict[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """Turns this process's part of a batch into global arrays split over all devices.

    Args:
        batch: arrays whose leading axis holds this process's images, equally many everywhere.
        mesh: from `make_mesh`.
    """
    sharding = batch_sharding(mesh)
    return {
        name: jax.make_array_from_process_local_data(sharding, array)
        for name, array in batch.items()
    }
