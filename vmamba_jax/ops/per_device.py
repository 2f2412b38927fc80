"""Loops over a batch that is split over devices: each device loops over its own part.

Under Explicit axes of a mesh an array's type says how it is split. XLA would gather what a loop
cuts images out of, and JAX refuses to guess; under Auto axes nothing is known here.
"""

from collections.abc import Callable
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from vmamba_jax.typing import Array

T = TypeVar("T")


def per_device(function: Callable[[Any, Any], T], batched: Any, shared: Any) -> T:
    """``function(batched, shared)``, on each device by itself if a mesh's axes are Explicit.

    Args:
        function: of the two trees; returns a tree of arrays (B, ...).
        batched: arrays (B, ...), all of them split alike.
        shared: arrays that are the same for all images.

    Raises:
        ValueError: see `batch_axes`.
    """
    first = jax.tree.leaves(batched)[0]
    explicit = _explicit_axes(first)
    if not explicit:
        return function(batched, shared)
    mesh = jax.typeof(first).sharding.mesh
    split, whole = PartitionSpec(batch_axes(first)), PartitionSpec()
    shared = jax.sharding.reshard(shared, NamedSharding(mesh, whole))
    mapped = jax.shard_map(
        function, mesh=mesh, in_specs=(split, whole), out_specs=split, axis_names=explicit
    )
    return mapped(batched, shared)


def batch_axes(x: Array) -> Any:
    """The Explicit axes of a mesh that split the batch of an array (B, ...).

    Raises:
        ValueError: if they split more than the batch.
    """
    spec = jax.typeof(x).sharding.spec
    if any(spec[1:]):
        raise ValueError(
            f"an array {x.shape} is split over devices as {spec}: scans and convolutions need "
            "whole images, so split the batch only"
        )
    return spec[0]


def split_like(a: Array, x: Array) -> Array:
    """`a` (B, ...), the same on all devices, split over them as the batch of `x` is."""
    if not _explicit_axes(x):
        return a
    sharding = NamedSharding(jax.typeof(x).sharding.mesh, PartitionSpec(batch_axes(x)))
    return jax.sharding.reshard(a, sharding)


def _explicit_axes(x: Array) -> set[str]:
    mesh = jax.typeof(x).sharding.mesh
    kinds = zip(mesh.axis_names, mesh.axis_types, strict=True)
    return {name for name, kind in kinds if kind == AxisType.Explicit}
