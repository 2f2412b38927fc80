"""Held-out loss and accuracy, every image counted exactly once."""

import dataclasses
from collections.abc import Iterable
from contextlib import closing
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from vmamba_jax.data import open_source
from vmamba_jax.errors import CheckpointError
from vmamba_jax.run_folder import complete_steps
from vmamba_jax.training.config import EvalConfig
from vmamba_jax.training.setup import as_in_run, held_out_batches
from vmamba_jax.training.sharding import check_batch_size, make_mesh, put_batch, replicated
from vmamba_jax.training.start import (
    architecture_of,
    check_same_labels,
    fitted,
    initial_weights,
    say_which,
)
from vmamba_jax.training.step import EvalStep, make_eval_step

_SUMS = ("count", "loss", "top1", "top5")


class Evaluation(NamedTuple):
    """Results over a whole held-out set.

    Attributes:
        accuracy: share of images whose most likely class is right.
        accuracy_top5: share of images whose class is among the five most likely.
        loss: mean cross-entropy in nats.
        images: how many images were counted.
    """

    accuracy: float
    accuracy_top5: float
    loss: float
    images: int

    def metrics(self) -> dict[str, float]:
        """What is kept of it beside the weights."""
        return {
            "accuracy": self.accuracy,
            "accuracy_top5": self.accuracy_top5,
            "val_loss": self.loss,
        }


def evaluate(
    eval_step: EvalStep,
    variables: Any,
    batches: Iterable[dict[str, np.ndarray]],
    mesh: Mesh,
) -> Evaluation:
    """Runs a model over held-out batches.

    Args:
        eval_step: from `make_eval_step`.
        variables: the model's variables, on the mesh.
        batches: this process's part of each batch: `image`, `label`, and a `mask` that is False
            for padding.
        mesh: from `make_mesh`.

    Raises:
        ValueError: if there is no image.
    """
    totals: dict[str, jax.Array] = {}
    for batch in batches:
        results = eval_step(variables, put_batch(batch, mesh))
        totals = {name: totals.get(name, 0.0) + results[name] for name in _SUMS}
    sums = {name: float(value) for name, value in totals.items()}
    if not sums.get("count"):
        raise ValueError("the held-out split has no readable image")
    count = sums["count"]
    return Evaluation(
        accuracy=sums["top1"] / count,
        accuracy_top5=sums["top5"] / count,
        loss=sums["loss"] / count,
        images=int(count),
    )


def evaluate_run(config: EvalConfig, console: Console | None = None) -> Evaluation:
    """Evaluates weights: those that `config.init_from` names, else those of the run.

    Args:
        config: the run, and which of its checkpoints.
        console: where progress is shown; standard output by default.

    Raises:
        DataError: if the images can't be used.
        CheckpointError: if there are no such weights, they can't be read, or they are of other
            classes than the images.
    """
    console = console or Console()
    mesh = make_mesh(config.mesh)
    check_batch_size(config.data.eval_batch_size, mesh)
    source = open_source(
        config.data.kind, config.data.root, config.data.val_split, config.data.channels
    )
    if config.init_from is None:
        if not complete_steps(config.run / "checkpoints"):
            raise CheckpointError(
                f"{config.run} holds no checkpoint: train first, name another run with --run, or "
                "weights with --init-from"
            )
        config = dataclasses.replace(config, init_from=str(config.run))
        weights = initial_weights(config, config.step)
    else:
        weights = initial_weights(config)
    assert weights is not None
    what, where = str(config.init_from), f"{config.data.root} ({config.data.val_split})"
    check_same_labels(weights, what, source.class_names, where)
    architecture = weights.config if config.model.name is None else architecture_of(config)
    weights = fitted(
        config,
        weights,
        architecture.replace(
            num_classes=weights.config.num_classes,
            imgsize=config.data.image_size,
            in_chans=config.data.channels,
        ),
    )
    model = as_in_run(config.model, weights.config)
    say_which(console, "weights:", config, weights)
    with jax.set_mesh(mesh):
        variables = jax.device_put(weights.variables(), replicated(mesh))
        with closing(held_out_batches(config.data, source)) as batches:
            result = evaluate(make_eval_step(model, mesh), variables, batches, mesh)
    console.print(
        f"{result.images} images: loss {result.loss:.4f}, top-1 {100 * result.accuracy:.2f}%, "
        f"top-5 {100 * result.accuracy_top5:.2f}%",
        soft_wrap=True,
    )
    return result
