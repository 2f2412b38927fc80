"""Classification as a task of the training loop."""

import itertools
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
from jax.sharding import Mesh

from vmamba_jax.data import batches_per_epoch, check_same_classes, open_source
from vmamba_jax.training.config import RunConfig
from vmamba_jax.training.evaluate import Evaluation, evaluate
from vmamba_jax.training.metrics import read_rows
from vmamba_jax.training.optimizer import make_schedule
from vmamba_jax.training.picture import draw_run
from vmamba_jax.training.setup import (
    build_learner,
    held_out_batches,
    starting_weights,
    train_batches,
)
from vmamba_jax.training.sharding import put_batch
from vmamba_jax.training.step import make_eval_step
from vmamba_jax.training.task import Task, Training
from vmamba_jax.typing import Variables

_DRAWN = 1024
"""Held-out images that the picture is chosen from."""


def classification_task(config: RunConfig, mesh: Mesh) -> Task:
    """A classifier on labelled images.

    Raises:
        DataError: if the held-out images can't be used.
        ValueError: for an unknown model.
    """
    data = config.data
    source = open_source(data.kind, data.root, data.val_split)
    learner = build_learner(config, num_classes=len(source.class_names), mesh=mesh)
    eval_step = make_eval_step(learner.model, mesh)

    def training() -> Training:
        images = open_source(data.kind, data.root, data.train_split)
        check_same_classes(images, source)
        steps_per_epoch = batches_per_epoch(images, data.batch_size)
        schedule = make_schedule(config.optimizer, data.batch_size, steps_per_epoch, config.epochs)
        return Training(
            images=len(images),
            batches=train_batches(config, images),
            steps_per_epoch=steps_per_epoch,
            total=schedule.total_steps,
            eval_every=config.eval_every * steps_per_epoch,
            learning_rate=schedule,
        )

    def held_out(variables: Any) -> Evaluation:
        with closing(held_out_batches(data, source)) as batches:
            return evaluate(eval_step, variables, batches, mesh)

    def draw(path: Path, variables: Variables) -> None:
        shown: dict[str, list[np.ndarray]] = {"image": [], "label": [], "prediction": []}
        with closing(held_out_batches(data, source)) as batches:
            for batch in itertools.islice(batches, -(-_DRAWN // data.eval_batch_size)):
                results = eval_step(variables, put_batch(batch, mesh))
                seen = batch["mask"]
                shown["image"].append(batch["image"][seen])
                shown["label"].append(batch["label"][seen])
                shown["prediction"].append(np.asarray(results["prediction"])[seen])
        images, labels, predictions = (np.concatenate(parts) for parts in shown.values())
        first = np.argsort(labels == predictions, kind="stable")[:48]  # the mistakes
        names = source.class_names
        draw_run(
            path, read_rows(path.parent), images[first], labels[first], predictions[first], names
        )

    return Task(
        learner=learner,
        class_names=source.class_names,
        held_out=len(source),
        training=training,
        evaluate=held_out,
        starting_weights=lambda _: starting_weights(config, learner.model),
        draw=draw,
    )
