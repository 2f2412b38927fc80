"""Held-out loss and accuracy, every image counted exactly once."""

from collections.abc import Iterable
from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import RenderableType

from vmamba_jax.training.sharding import put_batch
from vmamba_jax.training.step import EvalStep

_SUMS = ("count", "loss", "top1", "top5")


@runtime_checkable
class Result(Protocol):
    """What an evaluation found, whatever the task."""

    def metrics(self) -> dict[str, float]:
        """What is kept of it beside the weights."""
        ...

    def summary(self) -> str:
        """A few words for the line of an evaluation while a run goes."""
        ...

    def headline(self) -> str:
        """The one number."""
        ...

    def details(self) -> RenderableType:
        """All of it, for the console."""
        ...


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

    def summary(self) -> str:
        """Loss and accuracy."""
        return f"held-out loss {self.loss:.4f}, accuracy {100 * self.accuracy:.2f}%"

    def headline(self) -> str:
        """The accuracy."""
        return f"held-out accuracy {100 * self.accuracy:.2f}%"

    def details(self) -> str:
        """Loss and both accuracies in one line."""
        return (
            f"{self.images} images: loss {self.loss:.4f}, top-1 {100 * self.accuracy:.2f}%, "
            f"top-5 {100 * self.accuracy_top5:.2f}%"
        )


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
        jax.block_until_ready(totals)  # two batches on their way are enough
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
