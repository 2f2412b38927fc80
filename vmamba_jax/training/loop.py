"""The training loop: from a configuration to a finished run, top to bottom."""

import json
import math
from contextlib import closing

import jax
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from vmamba_jax.checkpoint import Checkpoints
from vmamba_jax.training.classification import classification_task
from vmamba_jax.training.config import RunConfig, to_json
from vmamba_jax.training.evaluate import Result
from vmamba_jax.training.interrupt import StopRequest
from vmamba_jax.training.report import Report
from vmamba_jax.training.segmentation import segmentation_task
from vmamba_jax.training.segmentation_config import AnyRun, SegmentationConfig
from vmamba_jax.training.sharding import check_batch_size, make_mesh, put_batch
from vmamba_jax.training.state import TrainState, abstract_state, create_state, with_weights
from vmamba_jax.training.task import Task, Training

_PROFILED = (10, 15)
"""First and last update of a session that `profile` traces: after compilation and warm-up."""


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
    task = open_task(config, mesh, console)
    learner, training = task.learner, task.training
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
            task.check_same_run(checkpoints.config())
            items = abstract_state(learner.init, mesh).items()
            state = TrainState.from_items(checkpoints.restore(items, data_iterator=batches))
        else:
            state = create_state(learner.init, mesh)
            if task.starting_weights is not None:
                state = with_weights(state, task.starting_weights(state.variables))
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
                        checkpoints.save(
                            step,
                            state.items(),
                            model=task.about,
                            data_iterator=batches,
                            config=to_json(config),
                        )
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


def open_task(config: AnyRun, mesh: Mesh, console: Console) -> Task:
    """Opens the images of a run and builds what learns; nothing is computed.

    Raises:
        DataError: if the images can't be used.
        ValueError: for an unknown model.
    """
    match config:
        case RunConfig():
            return classification_task(config, mesh, console)
        case SegmentationConfig():
            return segmentation_task(config, mesh, console)


def _announce(console: Console, config: AnyRun, task: Task, training: Training, start: int) -> None:
    """Says what runs where, and from which point."""
    parameters = sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(task.learner.params))
    total, length = training.total, "epochs" if isinstance(config, RunConfig) else "updates"
    console.print(
        f"{config.model_name}, {parameters:,} parameters, {config.model.dtype}; "
        f"{training.images} training and {task.held_out} held-out images of "
        f"{len(task.class_names)} classes; "
        f"{jax.device_count()} {jax.devices()[0].device_kind} device(s)",
        highlight=False,
        soft_wrap=True,
    )
    if start >= total:
        console.print(
            f"{config.run} is finished ({start} updates). To train afresh, delete that folder or "
            f"choose another with --run; to train longer, raise --{length}",
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
