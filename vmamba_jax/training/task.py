"""What a run learns, and from what: all that the loop has to know of a task."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import optax
from jax.sharding import Mesh

from vmamba_jax.data import BatchIterator
from vmamba_jax.training.evaluate import Result
from vmamba_jax.training.interrupt import StopRequest
from vmamba_jax.training.segmentation_config import AnyRun
from vmamba_jax.training.state import TrainState, abstract_variables, make_state
from vmamba_jax.training.step import (
    Augment,
    Loss,
    TrainStep,
    make_train_step,
    soft_cross_entropy,
)
from vmamba_jax.typing import Variables


class Learner(NamedTuple):
    """What learns, before any array is made.

    Attributes:
        model: the model, a Linen module.
        optimizer: its optimizer.
        init: builds the state from scratch.
        train_step: one update, jitted.
        params: the model's parameters as `jax.ShapeDtypeStruct`.
    """

    model: Any
    optimizer: optax.GradientTransformationExtraArgs
    init: Callable[[], TrainState]
    train_step: TrainStep
    params: object


def make_learner(
    config: AnyRun,
    model: nn.Module,
    optimizer: optax.GradientTransformationExtraArgs,
    augment: Augment,
    mesh: Mesh,
    *,
    image_shape: tuple[int, int, int],
    loss: Loss = soft_cross_entropy,
) -> Learner:
    """What learns in a run: the parts of a task, put together as its settings say.

    Args:
        config: the run; of it the seed, the moving average and the accumulation.
        model: the model.
        optimizer: its optimizer.
        augment: see `make_train_step`.
        mesh: from `make_mesh`.
        image_shape: height, width and channels of the training images.
        loss: see `make_train_step`.
    """
    ema_decay = config.optimizer.ema_decay
    return Learner(
        model=model,
        optimizer=optimizer,
        init=make_state(
            model, optimizer, image_shape=image_shape, seed=config.seed, ema=ema_decay > 0
        ),
        train_step=make_train_step(
            model,
            optimizer,
            augment,
            mesh,
            loss=loss,
            ema_decay=ema_decay,
            accumulation_steps=config.optimizer.accumulation_steps,
        ),
        params=abstract_variables(model, image_shape)["params"],
    )


class Training(NamedTuple):
    """The training images, and how long they are learned from.

    Attributes:
        images: how many there are.
        batches: this process's part of the endless batches.
        steps_per_epoch: updates in one pass over the images.
        total: updates of the whole run.
        eval_every: updates between evaluations.
        learning_rate: update, from 0 -> its learning rate.
    """

    images: int
    batches: BatchIterator
    steps_per_epoch: int
    total: int
    eval_every: int
    learning_rate: Callable[[int], float]


class Task(NamedTuple):
    """A task: classification or segmentation, on a data set.

    Attributes:
        learner: what learns.
        class_names: names of the classes, in the order of the labels.
        held_out: how many held-out images there are.
        training: the training images.
        about: what is kept beside the weights, so that each checkpoint is a model.
        check_same_run: refuses to go on with a run that had other settings, given as JSON types.
        starting_weights: the weights that the run's `init_from` names, None if it names none. What
            they have not is taken from the given initial variables.
        evaluate: the held-out results of variables on the mesh; given up by a `StoppedError` if a
            signal comes.
        draw: draws a run's curves, and what its variables make of held-out images, into a file;
            likewise.
    """

    learner: Learner
    class_names: Sequence[str]
    held_out: int
    training: Training
    about: dict[str, Any]
    check_same_run: Callable[[dict[str, Any]], None]
    starting_weights: Callable[[Variables], Variables] | None
    evaluate: Callable[[Variables, StopRequest], Result]
    draw: Callable[[Path, Variables, StopRequest], None]
