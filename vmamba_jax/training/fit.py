"""What of a block the backward pass computes again, where the run leaves it to the memory."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jax.stages import Compiled, Lowered
from rich.console import Console

from vmamba_jax.ops.residuals import POLICIES
from vmamba_jax.training.config import RunConfig
from vmamba_jax.training.sharding import batch_sharding
from vmamba_jax.training.state import abstract_state
from vmamba_jax.training.task import Learner

Run = TypeVar("Run", bound=RunConfig)


class DoesNotFitError(RuntimeError):
    """A program that needs more memory than a device has; the message is the compiler's."""


def lower_step(config: RunConfig, learner: Learner, mesh: Mesh) -> Lowered:
    """The training step of a classifier for the devices of a mesh, which need not be here."""

    def split(shape: tuple[int, ...], dtype: Any) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=batch_sharding(mesh))

    data = config.data
    batch = {
        "image": split(
            (data.batch_size, data.image_size, data.image_size, data.channels),
            jnp.uint8 if data.channels == 3 else jnp.float32,
        ),
        "label": split((data.batch_size,), jnp.int32),
    }
    train_step: Any = learner.train_step
    # Devices that are not here can't hold so much as a constant.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state = abstract_state(learner.init, mesh)
    with jax.set_mesh(mesh):
        # A learning rate as the loop gives it: then a run's first update finds what is compiled.
        return train_step.lower(state, batch, np.float32(0))


def compile_step(lowered: Lowered, available: int | None) -> Compiled:
    """Compiles a step.

    Args:
        lowered: from `lower_step`.
        available: bytes that a program may use on a device, if they are known.

    Raises:
        DoesNotFitError: if it needs more.
    """
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error) or "hbm" not in str(error).lower():
            raise
        raise DoesNotFitError(str(error)) from error
    needed = sum(bytes_of(compiled).values())
    if available is not None and needed > available:
        raise DoesNotFitError(f"it needs {needed:,} bytes of {available:,}")
    return compiled


def bytes_of(compiled: Compiled) -> dict[str, int]:
    """What a program needs of a device's memory."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return {
        "arguments": memory.argument_size_in_bytes,
        "outputs_not_aliased": memory.output_size_in_bytes - memory.alias_size_in_bytes,
        "temporaries": memory.temp_size_in_bytes,
        "code": memory.generated_code_size_in_bytes,
    }


def choices(config: Run) -> Iterator[Run]:
    """The run with each setting of what to compute again that it leaves open, fastest first."""
    model = config.model
    names = (
        POLICIES if model.recompute == "auto" and not model.use_checkpoint else [model.recompute]
    )
    for name in names:
        yield dataclasses.replace(config, model=dataclasses.replace(model, recompute=name))


def learner_that_fits(
    config: RunConfig, build: Callable[[RunConfig], Learner], mesh: Mesh, console: Console
) -> Learner:
    """A run's learner; with ``recompute="auto"`` the fastest whose step fits the devices.

    It is found by compiling, where a device says how much memory it has; elsewhere, as on a CPU, it
    is the first.
    """
    tried = list(choices(config))
    available = _memory_here(mesh)
    if len(tried) == 1 or available is None:
        return build(tried[0])
    for choice in tried:
        learner = build(choice)
        try:
            compile_step(lower_step(choice, learner, mesh), available)
        except DoesNotFitError:
            console.print(f"too large for the devices: recompute {choice.model.recompute}")
            continue
        console.print(f"computed again in the backward pass: {choice.model.recompute}")
        return learner
    return build(tried[-1])


def _memory_here(mesh: Mesh) -> int | None:
    """Bytes that a program may use on each device, the same number in all processes."""
    stats = mesh.local_devices[0].memory_stats() or {}
    mebibytes = stats.get("bytes_limit", 0) // 2**20
    if jax.process_count() > 1:  # they must choose alike
        mebibytes = int(multihost_utils.broadcast_one_to_all(np.int32(mebibytes)))
    return mebibytes * 2**20 or None
