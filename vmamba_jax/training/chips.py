"""The TPUs that can be compiled for without one: their kinds, their slices, and their memory.

libtpu (of the `tpu` extra) describes the devices of a slice and compiles for them.
"""

import os
import re
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import topologies
from jax.sharding import SingleDeviceSharding

from vmamba_jax._closest import closest

_PLANE = ("1x1", "2x2", "2x4", "4x4", "4x8", "8x8", "8x16", "16x16")
_CUBE = (
    "2x2x1", "2x2x2", "2x2x4", "2x4x4", "4x4x4", "4x4x8",
    "4x8x8", "8x8x8", "8x8x16", "8x16x16", "16x16x16",
)  # fmt: skip
_SHAPES = {"v4": _CUBE, "v5e": _PLANE, "v5p": _CUBE, "v6e": _PLANE, "tpu7x": _CUBE}

SLICES = tuple(f"{kind}:{shape}" for kind, shapes in _SHAPES.items() for shape in shapes)
"""The slices that Google Cloud rents, https://cloud.google.com/tpu/docs; each side doubles."""


class TopologyError(RuntimeError):
    """A topology that can't be compiled for here; the message says why and what to do."""


def describe(topology: str) -> list[Any]:
    """The devices of a slice, as descriptions to compile for.

    A device is a chip, but for tpu7x, where it is half of one, as when a program runs there.

    Args:
        topology: kind and arrangement of the chips, such as ``v5e:4x4`` or ``v4:4x4x4``: one of
            `SLICES`, or another that libtpu knows.

    Raises:
        TopologyError: if libtpu is missing, or does not know the topology.
    """
    kind, _, shape = topology.partition(":")
    if kind not in _SHAPES:
        raise TopologyError(
            f"unknown kind of TPU {kind!r} in topology {topology!r}." + closest(kind, _SHAPES)
        )
    try:
        return _describe(kind, shape)
    except (RuntimeError, ValueError, NotImplementedError) as error:
        known = [kind for kind in _SHAPES if _is_described(kind)]
        if "lockfile" in str(error):
            what = (
                "Another process uses libtpu: wait for it, or where no TPU is here let both, with "
                "ALLOW_MULTIPLE_LIBTPU_LOAD=1 in the environment"
            )
        elif not known:
            what = "It needs libtpu: pip install 'vmamba-jax[tpu]'"
        elif kind not in known:
            what = f"The installed libtpu describes {', '.join(known)}"
        else:
            what = f"Take one that exists, such as {', '.join(_SHAPES[kind])}"
        said = str(error).splitlines()[0].rstrip(".")
        raise TopologyError(f"can't describe the topology {topology!r}: {said}. {what}") from error


def memory_of(device: Any) -> int | None:
    """Bytes that a program may use on a device, less than are built in; None if it isn't said.

    The compiler names them as it refuses a program that needs more.
    """
    too_large = jax.ShapeDtypeStruct((2**40,), jnp.float32, sharding=SingleDeviceSharding(device))
    try:
        jax.jit(lambda x: x[::-1] + x).lower(too_large).compile()
    except jax.errors.JaxRuntimeError as error:
        available = re.search(r"available HBM \(([\d.]+)G\)", str(error))
        return available and round(float(available[1]) * 2**30)
    return None


def _describe(kind: str, shape: str) -> list[Any]:
    # libtpu looks for the machine that it runs on; these values say that there is none to ask.
    for name, value in {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }.items():
        os.environ.setdefault(name, value)
    options: dict[str, Any] = {}
    if kind == "v4":  # both cores of a chip are one device, as they are when a program runs there
        options["chip_config_name"] = "megacore"
    if shape and set(shape.split("x")) == {"1"}:  # by default libtpu takes a host of 2x2 chips
        options["chips_per_host_bounds"] = (1, 1, 1)
    return topologies.get_topology_desc(
        platform="tpu", topology_name=f"{kind}:{shape}", **options
    ).devices


def _is_described(kind: str) -> bool:
    try:
        return bool(_describe(kind, "2x2" if _SHAPES[kind] is _PLANE else "2x2x1"))
    except (RuntimeError, ValueError, NotImplementedError):
        return False
