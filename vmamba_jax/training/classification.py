"""Classification as a task of the training loop, and the evaluation of a classifier."""

import itertools
from contextlib import closing
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from vmamba_jax.data import batches_per_epoch
from vmamba_jax.run_folder import complete_steps
from vmamba_jax.training.config import EvalConfig, RunConfig
from vmamba_jax.training.evaluate import Evaluation, evaluate
from vmamba_jax.training.fit import learner_that_fits
from vmamba_jax.training.interrupt import StopRequest
from vmamba_jax.training.metrics import read_rows
from vmamba_jax.training.optimizer import make_schedule
from vmamba_jax.training.picture import draw_run
from vmamba_jax.training.setup import (
    as_in_run,
    build_learner,
    held_out_batches,
    open_sources,
    open_val_source,
    preprocessing_of,
    say_what_is_missing,
    train_batches,
)
from vmamba_jax.training.sharding import check_batch_size, make_mesh, put_batch, replicated
from vmamba_jax.training.start import (
    about_model,
    architecture_of,
    check_same_labels,
    check_same_run,
    fitted,
    initial_weights,
    say_which,
    weights_to_evaluate,
)
from vmamba_jax.training.step import make_eval_step
from vmamba_jax.training.task import Task, Training
from vmamba_jax.typing import Variables

_DRAWN = 1024
"""Held-out images that the picture is chosen from."""


def classification_task(config: RunConfig, mesh: Mesh, console: Console) -> Task:
    """A classifier on labelled images.

    Args:
        config: the run.
        mesh: from `make_mesh`.
        console: where it is said which weights a new run starts from.

    Raises:
        DataError: if the images can't be used.
        RunError: if the folder holds a run of another task.
        CheckpointError: if the weights that it starts from can't be read.
        ValueError: for an unknown model, or a schedule that can't be.
    """
    data = config.data
    sources = open_sources(data)
    say_what_is_missing(sources.val, console)
    class_names = sources.train.class_names
    steps_per_epoch = batches_per_epoch(sources.train, data.batch_size)
    schedule = make_schedule(config.optimizer, data.batch_size, steps_per_epoch, config.epochs)
    fresh = not complete_steps(config.run / "checkpoints")
    weights = initial_weights(config) if fresh else None
    architecture = architecture_of(config, weights)
    learner = learner_that_fits(
        config,
        lambda choice: build_learner(choice, architecture, num_classes=len(class_names), mesh=mesh),
        mesh,
        console,
    )
    eval_step = make_eval_step(learner.model, mesh, preprocessing_of(data))
    # Before anything is compiled: what does not fit is said soon.
    start = None if weights is None else fitted(config, weights, learner.model.config)

    def starting_weights(initial: Variables) -> Variables:
        del initial
        assert start is not None
        say_which(console, "starting from", config, start)
        return start.variables()

    def held_out(variables: Any, stop: StopRequest) -> Evaluation:
        with closing(held_out_batches(data, sources.val)) as batches:
            return evaluate(eval_step, variables, stop.watch(batches), mesh)

    def draw(path: Path, variables: Variables, stop: StopRequest) -> None:
        shown: dict[str, list[np.ndarray]] = {"image": [], "label": [], "prediction": []}
        with closing(held_out_batches(data, sources.val)) as batches:
            for batch in itertools.islice(stop.watch(batches), -(-_DRAWN // data.eval_batch_size)):
                results = eval_step(variables, put_batch(batch, mesh))
                seen = batch["mask"]
                shown["image"].append(batch["image"][seen])
                shown["label"].append(batch["label"][seen])
                shown["prediction"].append(np.asarray(results["prediction"])[seen])
        images, labels, predictions = (np.concatenate(parts) for parts in shown.values())
        mistakes_first = np.argsort(labels == predictions, kind="stable")[:48]
        draw_run(
            path,
            read_rows(path.parent),
            images[mistakes_first],
            labels[mistakes_first],
            predictions[mistakes_first],
            class_names,
        )

    return Task(
        learner=learner,
        class_names=class_names,
        held_out=len(sources.val),
        training=Training(
            images=len(sources.train),
            batches=train_batches(config, sources.train),
            steps_per_epoch=steps_per_epoch,
            total=schedule.total_steps,
            eval_every=config.eval_every * steps_per_epoch,
            learning_rate=schedule,
        ),
        about=about_model(config, learner.model.config, class_names, preprocessing_of(data)),
        check_same_run=lambda saved: check_same_run(config, saved, architecture, class_names),
        starting_weights=None if start is None else starting_weights,
        evaluate=held_out,
        draw=draw,
    )


def evaluate_classifier(config: EvalConfig, console: Console) -> Evaluation:
    """Evaluates weights: those that `config.init_from` names, else those of the run.

    Args:
        config: the run, and which of its checkpoints.
        console: where progress is shown.

    Raises:
        DataError: if the images can't be used.
        CheckpointError: if there are no such weights, they can't be read, or they are of other
            classes than the images.
    """
    mesh = make_mesh(config.mesh)
    data = config.data
    check_batch_size(data.eval_batch_size, mesh)
    config, step = weights_to_evaluate(config)
    weights = initial_weights(config, step)
    assert weights is not None
    source = open_val_source(data, weights.class_names)
    say_what_is_missing(source, console)
    what, where = str(config.init_from), f"{data.root} ({data.val_split})"
    check_same_labels(weights, what, source.class_names, where)
    architecture = weights.config if config.model.name is None else architecture_of(config)
    weights = fitted(
        config,
        weights,
        architecture.replace(
            num_classes=weights.config.num_classes,
            imgsize=data.image_size,
            in_chans=data.channels,
        ),
    )
    model = as_in_run(config.model, weights.config)
    say_which(console, "weights:", config, weights)
    with jax.set_mesh(mesh):
        variables = jax.device_put(weights.variables(), replicated(mesh))
        with closing(held_out_batches(data, source)) as batches:
            eval_step = make_eval_step(model, mesh, preprocessing_of(data))
            result = evaluate(eval_step, variables, batches, mesh)
    console.print(result.details(), soft_wrap=True)
    return result
