"""The training loop: from a configuration to a finished run, top to bottom."""

import json
import math
from contextlib import closing

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from rich.console import Console

from vmamba_jax.checkpoint import Checkpoints
from vmamba_jax.local_path import local_path
from vmamba_jax.run_folder import complete_steps
from vmamba_jax.training.classification import classification_task
from vmamba_jax.training.config import RunConfig, to_json
from vmamba_jax.training.evaluate import Result
from vmamba_jax.training.interrupt import StoppedError, StopRequest
from vmamba_jax.training.metrics import is_evaluated
from vmamba_jax.training.report import Report
from vmamba_jax.training.segmentation import segmentation_task
from vmamba_jax.training.segmentation_config import AnyRun, SegmentationConfig
from vmamba_jax.training.sharding import check_batch_size, make_mesh, put_batch
from vmamba_jax.training.start import RunError
from vmamba_jax.training.state import TrainState, abstract_state, create_state, with_weights
from vmamba_jax.training.task import Task, Training

_PROFILED = (10, 15)
"""First and last update of a session that `profile` traces: after compilation and warm-up."""


def train(
    config: AnyRun, console: Console | None = None, stop: StopRequest | None = None
) -> Result | None:
    """Trains a model, or goes on with a run that was interrupted.

    The state comes from the first of: the run's own latest checkpoint, `config.init_from`, the
    seed.

    Args:
        config: the run.
        console: where progress is shown; standard output by default.
        stop: listens for signals already; by default SIGTERM and Ctrl-C are listened for from here
            to the end.

    Returns:
        The held-out results at the end, or None if a signal ended the run early.

    Raises:
        DataError: if the images can't be used.
        RunError: if the folder holds another run, or another process of this one is gone.
        NotFiniteError: if loss and gradient stay infinite or not a number.
        CheckpointError: if a checkpoint can't be written or read.
        ValueError: for a batch, a mesh or a schedule that can't be, or the address of a bucket.
    """
    if stop is None:
        with StopRequest() as listening:
            return train(config, console, listening)
    for folder in (config.run, config.data.root):
        local_path(folder)
    console = console or Console()
    console.quiet = jax.process_index() > 0
    try:
        return _train(config, console, stop)
    except StoppedError:
        # All that counts is saved; what was left undone, the next start makes up for.
        saved = complete_steps(config.run / "checkpoints")
        where = f"update {saved[-1]} is saved" if saved else "nothing was trained yet"
        console.print(
            f"stopped by {stop.name}, {where}: the same command goes on from there", highlight=False
        )
        return None
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1 or "RESOURCE_EXHAUSTED" in str(error):
            raise
        raise RunError(
            f"another process of this run seems to be gone ({str(error).splitlines()[0]}): see "
            f"what it said. The checkpoints in {config.run} are intact; start all processes again "
            "to go on from the last one"
        ) from error


def _train(config: AnyRun, console: Console, stop: StopRequest) -> Result:
    """Trains.

    Raises:
        StoppedError: a signal came, and all that was trained is saved.
    """
    primary = jax.process_index() == 0
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

        def leave_if_asked() -> None:
            """Before the first update there is nothing to save."""
            if stop.reached():
                raise StoppedError

        leave_if_asked()
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
        leave_if_asked()

        def held_out(step: int, state: TrainState) -> Result:
            """Evaluates the state that was saved last."""
            found = task.evaluate(state.weights, stop)
            checkpoints.record(step, found.metrics())
            return found

        result = None
        # An evaluation that was cut short, or of which there is no record, is made up for.
        kept = checkpoints.metrics(start) and is_evaluated(config.run, start)
        missing = start > 0 and due(start) and not kept
        if jax.process_count() > 1:  # by what the first one sees of the disk
            missing = bool(multihost_utils.broadcast_one_to_all(np.int32(missing)))
        if start < total or missing:
            with Report(
                config,
                console,
                start=start,
                total=total,
                steps_per_epoch=training.steps_per_epoch,
            ) as report:
                if missing:
                    result = held_out(start, state)
                    report.held_out(start, result)
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

                    stopping = stop.reached()
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
                    if stopping:
                        checkpoints.wait()  # of a save that fails this tells, and a stop would not
                        raise StoppedError
                    if due(step):  # after the save, which a fault in here must not cost
                        with report.paused():
                            result = held_out(step, state)
                        report.held_out(step, result)
            checkpoints.wait()
        if result is None:
            result = held_out(start, state)
        if jax.process_count() == 1:
            _draw(config, task, state, console, stop)
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


def _draw(
    config: AnyRun, task: Task, state: TrainState, console: Console, stop: StopRequest
) -> None:
    """Writes the picture of the run, if matplotlib is there."""
    path = config.run / "training.png"
    try:
        task.draw(path, state.weights, stop)
    except ImportError:
        console.print("no picture: matplotlib is missing (pip install 'vmamba-jax[demo]')")
    else:
        console.print(f"curves and predictions: {path}", highlight=False)
