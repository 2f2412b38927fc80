"""The training loop: from a configuration to a finished run, top to bottom."""

import itertools
import json
import math
from contextlib import closing
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from vmamba_jax.checkpoint import Checkpoints
from vmamba_jax.data import ImageSource, batches_per_epoch
from vmamba_jax.errors import CheckpointError
from vmamba_jax.run_folder import choose_step
from vmamba_jax.training.config import RunConfig, differences, from_json, to_json
from vmamba_jax.training.evaluate import Evaluation, evaluate
from vmamba_jax.training.interrupt import StopRequest
from vmamba_jax.training.metrics import read_rows
from vmamba_jax.training.optimizer import make_schedule
from vmamba_jax.training.picture import draw_run
from vmamba_jax.training.report import Report
from vmamba_jax.training.setup import (
    Learner,
    Sources,
    build_learner,
    held_out_batches,
    identity_of,
    open_sources,
    starting_weights,
    train_batches,
)
from vmamba_jax.training.sharding import check_batch_size, make_mesh, put_batch, replicated
from vmamba_jax.training.state import TrainState, abstract_state, create_state, with_weights
from vmamba_jax.training.step import EvalStep, make_eval_step

_PROFILED = (10, 15)
"""First and last update of a session that `profile` traces: after compilation and warm-up."""
_DRAWN = 1024
"""Held-out images that the picture is chosen from."""


class RunError(RuntimeError):
    """A run that can't be resumed as asked; the message says why and what to do."""


def train(config: RunConfig, console: Console | None = None) -> Evaluation | None:
    """Trains a model, or goes on with a run that was interrupted.

    The state comes from the first of: the run's own latest checkpoint, `config.init_from`, the
    seed.

    Args:
        config: the run.
        console: where progress is shown; standard output by default.

    Returns:
        The held-out results at the end, or None if a signal ended the run early.

    Raises:
        DataError: if the images can't be used.
        RunError: if the folder holds another run.
        NotFiniteError: if loss and gradient stay infinite or not a number.
        CheckpointError: if a checkpoint can't be written or read.
        ValueError: for a batch, a mesh or a schedule that can't be.
    """
    console = console or Console()
    primary = jax.process_index() == 0
    console.quiet = not primary
    mesh = make_mesh(config.mesh)
    check_batch_size(config.data.batch_size, mesh, config.optimizer.accumulation_steps)
    check_batch_size(config.data.eval_batch_size, mesh)
    sources = open_sources(config.data)
    steps_per_epoch = batches_per_epoch(sources.train, config.data.batch_size)
    schedule = make_schedule(
        config.optimizer, config.data.batch_size, steps_per_epoch, config.epochs
    )
    total = schedule.total_steps
    learner = build_learner(config, num_classes=len(sources.train.class_names), mesh=mesh)
    eval_step = make_eval_step(learner.model, mesh)

    def due(step: int) -> bool:
        """Whether an update ends with an evaluation."""
        epoch, batch_of_epoch = divmod(step, steps_per_epoch)
        return step == total or (not batch_of_epoch and epoch % config.eval_every == 0)

    with (
        jax.set_mesh(mesh),
        Checkpoints(config.run / "checkpoints", keep=config.keep) as checkpoints,
        closing(train_batches(config, sources.train)) as batches,
    ):
        start = checkpoints.latest_step or 0
        if start:
            _check_same_run(config, checkpoints.config())
            state = checkpoints.restore(abstract_state(learner.init, mesh), data_iterator=batches)
        else:
            state = create_state(learner.init, mesh)
            if config.init_from is not None:
                state = with_weights(state, starting_weights(config, learner.model))
                console.print(f"starting from {config.init_from}", soft_wrap=True)
        _announce(console, config, learner, sources, start, total)
        if primary:
            (config.run / "config.json").write_text(json.dumps(to_json(config), indent=2) + "\n")

        def held_out(step: int, state: TrainState) -> Evaluation:
            """Evaluates the state that was saved last."""
            with closing(held_out_batches(config.data, sources.val)) as batches:
                found = evaluate(eval_step, state.weights, batches, mesh)
            checkpoints.record(step, found.metrics())
            return found

        result = None
        if start < total:
            with (
                StopRequest() as stop,
                Report(
                    config, console, start=start, total=total, steps_per_epoch=steps_per_epoch
                ) as report,
            ):
                if start and due(start) and not checkpoints.metrics(start):
                    report.held_out(start, held_out(start, state))  # its evaluation was cut short
                for step in range(start + 1, total + 1):
                    if config.profile and step - start == _PROFILED[0]:
                        jax.profiler.start_trace(str(config.run / "profile"))
                    learning_rate = schedule(step - 1)
                    state, metrics = learner.train_step(
                        state, put_batch(next(batches), mesh), np.float32(learning_rate)
                    )
                    report.update(step, learning_rate, metrics)
                    if config.profile and step - start == _PROFILED[1]:
                        report.flush()
                        jax.profiler.stop_trace()

                    stopping = stop.reached(step)
                    if stopping or due(step) or step % (config.save_every or steps_per_epoch) == 0:
                        report.sync()
                        checkpoints.save(state, data_iterator=batches, config=to_json(config))
                    if stopping and step < total:
                        checkpoints.wait()
                        console.print(
                            f"stopped by {stop.name} after update {step} of {total}: it is saved, "
                            "and the same command goes on from there"
                        )
                        return None
                    if due(step):  # after the save, which a fault in here must not cost
                        with report.paused():
                            result = held_out(step, state)
                        report.held_out(step, result)
            checkpoints.wait()
        if result is None:
            result = held_out(start, state)
        if jax.process_count() == 1:
            _draw(config, sources.val, eval_step, state, mesh, console)
        return result


def evaluate_run(
    config: RunConfig, console: Console | None = None, *, which: str = "latest"
) -> Evaluation:
    """Evaluates a run's weights, or those of `config.init_from` where there is no run.

    Args:
        config: the run.
        console: where progress is shown; standard output by default.
        which: ``"latest"``, ``"best"`` or the number of a checkpoint.

    Raises:
        DataError: if the images can't be used.
        RunError: if the folder holds another run.
        CheckpointError: if there are no such weights, or they can't be read.
    """
    console = console or Console()
    mesh = make_mesh(config.mesh)
    check_batch_size(config.data.eval_batch_size, mesh)
    sources = open_sources(config.data)
    learner = build_learner(config, num_classes=len(sources.train.class_names), mesh=mesh)
    abstract = abstract_state(learner.init, mesh)
    folder = config.run / "checkpoints"
    with jax.set_mesh(mesh):
        if config.init_from is not None and not folder.exists():
            variables = jax.device_put(starting_weights(config, learner.model), replicated(mesh))
            console.print(f"weights: {config.init_from}", soft_wrap=True)
        elif folder.exists():
            with Checkpoints(folder, read_only=True) as checkpoints:
                step = choose_step(folder, which)
                _check_same_run(config, checkpoints.config(step))
                variables = checkpoints.restore_weights(
                    abstract.variables, average=abstract.ema is not None, step=step
                )
            console.print(f"weights: {folder}, update {step}", soft_wrap=True)
        else:
            raise CheckpointError(
                f"{folder} does not exist: train first, or name weights with --init-from"
            )
        eval_step = make_eval_step(learner.model, mesh)
        with closing(held_out_batches(config.data, sources.val)) as batches:
            result = evaluate(eval_step, variables, batches, mesh)
    console.print(
        f"{result.images} images: loss {result.loss:.4f}, top-1 {100 * result.accuracy:.2f}%, "
        f"top-5 {100 * result.accuracy_top5:.2f}%",
        soft_wrap=True,
    )
    return result


def _check_same_run(config: RunConfig, saved: dict[str, Any]) -> None:
    """Refuses to go on with a run that was something else."""
    before = to_json(identity_of(from_json(RunConfig, saved)))
    changed = differences(before, to_json(identity_of(config)))
    if changed:
        raise RunError(
            f"{config.run} holds a run with other settings ({'; '.join(changed)}): give the same "
            "ones to go on with it, another folder with --run to keep both, or delete it"
        )


def _announce(
    console: Console, config: RunConfig, learner: Learner, sources: Sources, start: int, total: int
) -> None:
    """Says what runs where, and from which point."""
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(learner.params))
    console.print(
        f"{config.model.name}, {parameters:,} parameters, {config.model.dtype}; "
        f"{len(sources.train)} training and {len(sources.val)} held-out images of "
        f"{len(sources.train.class_names)} classes; "
        f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)",
        highlight=False,
        soft_wrap=True,
    )
    if start >= total:
        console.print(
            f"{config.run} is finished ({start} updates). To train afresh, delete that folder or "
            "choose another with --run; to train longer, raise --epochs",
            highlight=False,
            soft_wrap=True,
        )
    elif start:
        console.print(
            f"resuming {config.run} after update {start} of {total}; to start afresh, delete that "
            "folder or choose another with --run",
            highlight=False,
            soft_wrap=True,
        )
    else:
        console.print(f"training into {config.run}, {total} updates", highlight=False)


def _draw(
    config: RunConfig,
    source: ImageSource,
    eval_step: EvalStep,
    state: TrainState,
    mesh: Mesh,
    console: Console,
) -> None:
    """Writes the picture of the run, if matplotlib is there."""
    shown: dict[str, list[np.ndarray]] = {"image": [], "label": [], "prediction": []}
    with closing(held_out_batches(config.data, source)) as batches:
        for batch in itertools.islice(batches, -(-_DRAWN // config.data.eval_batch_size)):
            results = eval_step(state.weights, put_batch(batch, mesh))
            seen = batch["mask"]
            shown["image"].append(batch["image"][seen])
            shown["label"].append(batch["label"][seen])
            shown["prediction"].append(np.asarray(results["prediction"])[seen])
    images, labels, predictions = (np.concatenate(parts) for parts in shown.values())
    mistakes_first = np.argsort(labels == predictions, kind="stable")[:48]
    path = config.run / "training.png"
    try:
        draw_run(
            path,
            read_rows(config.run),
            images[mistakes_first],
            labels[mistakes_first],
            predictions[mistakes_first],
            source.class_names,
        )
    except ImportError:
        console.print("no picture: matplotlib is missing (pip install 'vmamba-jax[demo]')")
    else:
        console.print(f"curves and predictions: {path}", highlight=False)
