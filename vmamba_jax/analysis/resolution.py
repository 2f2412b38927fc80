"""One model at many image sizes: what it costs, and how far its answers drift.

The VMamba paper (arXiv 2401.10166) compares models this way: its cost grows in proportion to the
area, and its accuracy falls slowly away from the size of training.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from vmamba_jax.analysis.flops import summarize
from vmamba_jax.convert import from_torch, to_torch
from vmamba_jax.convert.adapt import resize_position_embedding
from vmamba_jax.data import EvalTransform
from vmamba_jax.data.decode import Sample
from vmamba_jax.models import VSSM
from vmamba_jax.preprocessing import Preprocessing
from vmamba_jax.typing import Array, Variables

SIZES = (224, 384, 512, 640, 768, 1024)
"""Sides in pixels, from the usual size of training up."""

_RUNS = 3
_RELEASED = Preprocessing()


class Resolution(NamedTuple):
    """What became of one image size.

    Attributes:
        size: side of the images, in pixels.
        seconds: a forward pass, per image: the median of three runs of one batch.
        memory: bytes of a batch's forward pass by the compiler's account: arguments (weights and
            images), results and temporaries.
        flops: operations for one image, see `vmamba_jax.analysis.flops`.
        drift: root mean square change of the logits since the first size, over the standard
            deviation of the logits there.
        agreement: share of images whose likeliest class is that of the first size.
        accuracy: share of images whose likeliest class is their label; None without labels.
    """

    size: int
    seconds: float
    memory: int
    flops: int
    drift: float
    agreement: float
    accuracy: float | None


def resolution_sweep(
    model: VSSM,
    variables: Variables,
    samples: Sequence[Sample],
    sizes: Sequence[int] = SIZES,
    *,
    preprocessing: Preprocessing = _RELEASED,
    labelled: bool = False,
    batch_size: int = 1,
    on_images: Callable[[int], None] | None = None,
) -> Iterator[Resolution]:
    """Runs a classifier at one image size after the other.

    A position embedding, if there is one, is resampled to each size.

    Args:
        model: the model.
        variables: its weights.
        samples: the images, read anew for every size.
        sizes: sides in pixels; the first is the one that the others are compared with.
        preprocessing: the crop and normalisation of the images, at every size; by default those
            of the released evaluation.
        labelled: whether the samples' labels are classes of the head.
        batch_size: images at a time.
        on_images: told after each batch how many images it had; what it raises ends the sweep.

    Yields:
        One result a size, as soon as it is known.

    Raises:
        ValueError: for no image, no head, no size, or one that leaves nothing in the last stage.
    """
    if not samples or not sizes or batch_size < 1:
        raise ValueError("a sweep needs images, sizes and a positive batch size")
    if model.config.num_classes == 0:
        raise ValueError("a sweep needs a classifier, and this model has no head")
    costs = [sum(part.flops for part in summarize(model.config, size)) for size in sizes]
    batch_size = min(batch_size, len(samples))
    labels, first = None, None
    for size, flops in zip(sizes, costs, strict=True):
        resized, weights = _at_size(model, variables, size)
        run, memory = _compile(resized, weights, (batch_size, size, size, 3))
        transform = EvalTransform.of(preprocessing.replace(image_size=size))
        seconds, rows, seen = 0.0, [], []
        for start in range(0, len(samples), batch_size):
            batch = [samples[i] for i in range(len(samples))[start : start + batch_size]]
            images = np.zeros((batch_size, size, size, 3), np.float32)
            images[: len(batch)] = [transform(sample["image"]) for sample in batch]
            if not rows:
                seconds = _median_seconds(run, weights, images) / batch_size
            rows.append(np.asarray(run(weights, images), np.float32)[: len(batch)])
            seen += [sample["label"] for sample in batch]
            if on_images is not None:
                on_images(len(batch))
        logits, labels = np.concatenate(rows), np.asarray(seen)
        first = logits if first is None else first
        likeliest = logits.argmax(axis=-1)
        yield Resolution(
            size,
            seconds,
            memory,
            flops,
            drift=float(np.sqrt(np.mean((logits - first) ** 2)) / max(first.std(), 1e-30)),
            agreement=float(np.mean(likeliest == first.argmax(axis=-1))),
            accuracy=float(np.mean(likeliest == labels)) if labelled else None,
        )


def _at_size(model: VSSM, variables: Variables, size: int) -> tuple[VSSM, Variables]:
    """The model, and its weights on the device, with a position embedding for this size."""
    config = model.config
    if config.posembed and (size, size) != config.input_size:
        weights = to_torch(variables, config)
        config = config.replace(imgsize=size)
        weights, _ = resize_position_embedding(weights, *config.feature_size(size, size, 0))
        variables = from_torch(weights, config)
    return model.clone(config=config), jax.tree.map(jnp.asarray, variables)


def _compile(
    model: VSSM, variables: Variables, shape: tuple[int, ...]
) -> tuple[Callable[[Variables, Any], Array], int]:
    """The compiled forward pass, and its memory in bytes."""
    images = jax.ShapeDtypeStruct(shape, np.float32)
    compiled: Any = jax.jit(model.apply).lower(variables, images).compile()
    account = compiled.memory_analysis()
    memory = (
        account.argument_size_in_bytes
        + account.output_size_in_bytes
        - account.alias_size_in_bytes
        + account.temp_size_in_bytes
    )
    return compiled, int(memory)


def _median_seconds(run: Callable[..., Array], variables: Variables, images: Any) -> float:
    times = []
    for _ in range(_RUNS + 1):
        start = time.perf_counter()
        jax.block_until_ready(run(variables, images))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])  # the first run warms up
