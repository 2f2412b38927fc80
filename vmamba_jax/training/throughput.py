"""Images per second by the published protocol: a fixed batch, 50 warm-up runs, then 30 timed."""

import dataclasses
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from rich.console import Console

from vmamba_jax.training.config import RunConfig
from vmamba_jax.training.setup import build_model
from vmamba_jax.training.sharding import batch_sharding, check_batch_size, make_mesh, replicated
from vmamba_jax.training.start import architecture_of


@dataclasses.dataclass(frozen=True)
class ThroughputConfig(RunConfig):
    """A model to time.

    Attributes:
        num_classes: classes of the head.
        images: images in the batch, over all devices.
        warmup: runs before the clock starts.
        timed: runs on the clock.
    """

    num_classes: int = 1000
    images: int = 128
    warmup: int = 50
    timed: int = 30


def measure_throughput(
    config: ThroughputConfig, console: Console | None = None
) -> dict[str, float]:
    """Times a model on noise, forward alone and forward with backward.

    Args:
        config: model, image size and precision, and how often to run.
        console: where the result is printed; standard output by default.

    Returns:
        Images per second: ``{"forward": ..., "forward_backward": ...}``.

    Raises:
        ValueError: if the batch does not divide by the devices.
    """
    console = console or Console()
    mesh = make_mesh(config.mesh)
    check_batch_size(config.images, mesh)
    size = config.data.image_size
    architecture = architecture_of(config)
    model = build_model(config, architecture, num_classes=config.num_classes)

    def noise() -> jax.Array:
        return jax.random.normal(
            jax.random.key(0), (config.images, size, size, config.data.channels)
        )

    def loss(params: Any, others: Any, images: jax.Array) -> jax.Array:
        logits: Any
        logits, _ = model.apply(
            {"params": params, **others},
            images,
            train=True,
            rngs={"dropout": jax.random.key(0)},
            mutable=list(others),
        )
        return jnp.mean(jax.nn.log_softmax(logits.astype(jnp.float32))[:, 0])

    def split(variables: Any) -> tuple[Any, Any]:
        return variables["params"], {k: v for k, v in variables.items() if k != "params"}

    def forward(variables: Any, images: jax.Array) -> Any:
        return model.apply(variables, images)

    def forward_backward(variables: Any, images: jax.Array) -> Any:
        params, others = split(variables)
        return jax.grad(loss)(params, others, images)

    speeds = {}
    with jax.set_mesh(mesh):
        images = jax.jit(noise, out_shardings=batch_sharding(mesh))()
        init = jax.jit(model.init, out_shardings=replicated(mesh))
        variables = init(jax.random.key(0), images[:1])
        for name, run in (("forward", forward), ("forward_backward", forward_backward)):
            compiled = jax.jit(run)
            seconds = _seconds(compiled, (variables, images), config)
            speeds[name] = config.images / seconds
            console.print(
                f"{config.model_name}, {config.model.dtype}, {name.replace('_', ' + ')}: "
                f"{speeds[name]:.1f} img/s ({config.images} images of {size}x{size} in "
                f"{1000 * seconds:.1f} ms on {mesh.size} {mesh.devices.flat[0].device_kind})",
                soft_wrap=True,
            )
    return speeds


def _seconds(run: Callable[..., Any], inputs: tuple[Any, ...], config: ThroughputConfig) -> float:
    """Mean time of one run."""
    for _ in range(max(config.warmup, 1)):  # the first one compiles
        jax.block_until_ready(run(*inputs))
    start = time.perf_counter()
    results = [run(*inputs) for _ in range(config.timed)]
    jax.block_until_ready(results)
    return (time.perf_counter() - start) / config.timed
