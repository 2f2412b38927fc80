"""The training loop: from a configuration to a finished run, top to bottom."""

import json
import math
from contextlib import closing
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from vmamba_jax.checkpoint import Checkpoints
from vmamba_jax.errors import CheckpointError
from vmamba_jax.run_folder import choose_step
from vmamba_jax.training.classification import classification_task
from vmamba_jax.training.config import RunConfig, differences, from_json, to_json
from vmamba_jax.training.evaluate import Result
from vmamba_jax.training.interrupt import StopRequest
from vmamba_jax.training.report import Report
from vmamba_jax.training.segmentation import segmentation_task
from vmamba_jax.training.segmentation_config import AnyRun, SegmentationConfig
from vmamba_jax.training.setup import identity_of
from vmamba_jax.training.sharding import check_batch_size, make_mesh, put_batch, replicated
from vmamba_jax.training.state import TrainState, abstract_state, create_state, with_weights
from vmamba_jax.training.task import Task, Training

_PROFILED = (10, 15)
"""First and last update of a session that `profile` traces: after compilation and warm-up."""


class RunError(RuntimeError):
    """A run that can't be resumed as asked; the message says why and what to do."""


def train(config: AnyRun, console: Console | None = None) -> Result | None:
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
    task = open_task(config, mesh)
    learner, training = task.learner, task.training()
    total = training.total

    def due(step: int) -> bool:
        """Whether an update ends with an evaluation."""
        return step == total or step % training.eval_every == 0

    with (
        jax.set_mesh(mesh),
        Checkpoints(config.run / "checkpoints", keep=config.keep) as checkpoints,
        closing(training.batches) as batches,
    ):
        start = checkpoints.latest_step or 0
        if start:
            _check_same_run(config, checkpoints.config())
            state = checkpoints.restore(abstract_state(learner.init, mesh), data_iterator=batches)
        else:
            state = create_state(learner.init, mesh)
            if config.init_from is not None:
                state = with_weights(state, task.starting_weights(state.variables))
                console.print(f"starting from {config.init_from}", soft_wrap=True)
        _announce(console, config, task, training, start)
        if primary:
            (config.run / "config.json").write_text(json.dumps(to_json(config), indent=2) + "\n")

        def held_out(step: int, state: TrainState) -> Result:
            """Evaluates the state that was saved last."""
            found = task.evaluate(state.weights)
            checkpoints.record(step, found.metrics())
            return found

        result = None
        if start < total:
            with (
                StopRequest() as stop,
                Report(
                    config,
                    console,
                    start=start,
                    total=total,
                    steps_per_epoch=training.steps_per_epoch,
                ) as report,
            ):
                if start and due(start) and not checkpoints.metrics(start):
                    report.held_out(start, held_out(start, state))  # its evaluation was cut short
                for step in range(start + 1, total + 1):
                    if config.profile and step - start == _PROFILED[0]:
                        jax.profiler.start_trace(str(config.run / "profile"))
                    learning_rate = training.learning_rate(step - 1)
                    state, metrics = learner.train_step(
                        state, put_batch(next(batches), mesh), np.float32(learning_rate)
                    )
                    report.update(step, learning_rate, metrics)
                    if config.profile and step - start == _PROFILED[1]:
                        report.flush()
                        jax.profiler.stop_trace()

                    stopping = stop.reached(step)
                    save_every = config.save_every or training.steps_per_epoch
                    if stopping or due(step) or step % save_every == 0:
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
            _draw(config, task, state, console)
        return result


def evaluate_run(
    config: AnyRun, console: Console | None = None, *, which: str = "latest"
) -> Result:
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
    task = open_task(config, mesh)
    abstract = abstract_state(task.learner.init, mesh)
    folder = config.run / "checkpoints"
    with jax.set_mesh(mesh):
        if config.init_from is not None and not folder.exists():
            variables = jax.device_put(task.starting_weights(None), replicated(mesh))
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
        result = task.evaluate(variables)
    console.print(result.details(), soft_wrap=True)
    return result


def open_task(config: AnyRun, mesh: Mesh) -> Task:
    """Opens the held-out images of a run and builds what learns; nothing is computed.

    Raises:
        DataError: if the images can't be used.
        ValueError: for an unknown model.
    """
    match config:
        case RunConfig():
            return classification_task(config, mesh)
        case SegmentationConfig():
            return segmentation_task(config, mesh)


def _check_same_run(config: AnyRun, saved: dict[str, Any]) -> None:
    """Refuses to go on with a run that was something else."""
    kind = SegmentationConfig if isinstance(config, SegmentationConfig) else RunConfig
    if ("updates" in saved) != (kind is SegmentationConfig):
        raise RunError(
            f"{config.run} holds a run of another task: choose another folder with --run"
        )
    before = to_json(identity_of(from_json(kind, saved)))
    changed = differences(before, to_json(identity_of(config)))
    if changed:
        raise RunError(
            f"{config.run} holds a run with other settings ({'; '.join(changed)}): give the same "
            "ones to go on with it, another folder with --run to keep both, or delete it"
        )


def _announce(console: Console, config: AnyRun, task: Task, training: Training, start: int) -> None:
    """Says what runs where, and from which point."""
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(task.learner.params))
    total = training.total
    console.print(
        f"{config.model.name}, {parameters:,} parameters, {config.model.dtype}; "
        f"{training.images} training and {task.held_out} held-out images of "
        f"{len(task.class_names)} classes; "
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


def _draw(config: AnyRun, task: Task, state: TrainState, console: Console) -> None:
    """Writes the picture of the run, if matplotlib is there."""
    path = config.run / "training.png"
    try:
        task.draw(path, state.weights)
    except ImportError:
        console.print("no picture: matplotlib is missing (pip install 'vmamba-jax[demo]')")
    else:
        console.print(f"curves and predictions: {path}", highlight=False)
