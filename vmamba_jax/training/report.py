"""What a person sees of a run while it goes: the progress bar, the log lines, the metrics file."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType

import jax
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from vmamba_jax.training.evaluate import Result
from vmamba_jax.training.metrics import MetricsLog
from vmamba_jax.training.segmentation_config import AnyRun
from vmamba_jax.training.step import Metrics


class NotFiniteError(RuntimeError):
    """Loss and gradient stay infinite or not a number; the message says what to do."""


class Report:
    """Progress of a run, on the console and in its metrics file.

    Use it as a context manager around the loop. The numbers of an update are read when the next
    one is reported, so that the device never waits for the host.

    Args:
        config: the run.
        console: where to print.
        start: updates done before.
        total: updates of the whole run.
        steps_per_epoch: updates per epoch.
    """

    def __init__(
        self, config: AnyRun, console: Console, *, start: int, total: int, steps_per_epoch: int
    ) -> None:
        self._config = config
        self._console = console
        self._total = total
        self._steps_per_epoch = steps_per_epoch
        self._log = MetricsLog(config.run, resume_at=start, write=jax.process_index() == 0)
        self._bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("loss {task.fields[loss]}  lr {task.fields[rate]}  {task.fields[speed]}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task(
            "training", total=total, completed=start, loss="-", rate="-", speed=""
        )
        self._pending: tuple[int, float, Metrics] | None = None
        self._lap_step, self._lap_time = start, time.perf_counter()

    def __enter__(self) -> "Report":
        self._log.__enter__()
        self._bar.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._bar.__exit__(kind, error, traceback)
        self._log.__exit__(kind, error, traceback)

    def update(self, step: int, learning_rate: float, metrics: Metrics) -> None:
        """Reports one update.

        Raises:
            NotFiniteError: if too many updates in a row were skipped.
        """
        self.flush()
        self._pending = (step, learning_rate, metrics)

    def flush(self) -> None:
        """Waits for the last update and reports it; the metrics file is on disk afterwards.

        Raises:
            NotFiniteError: if too many updates in a row were skipped.
        """
        if self._pending is None:
            return
        step, learning_rate, metrics = self._pending
        self._pending = None
        values = {name: value.item() for name, value in jax.device_get(metrics).items()}
        logging = step % self._config.log_every == 0 or step == self._total
        if logging:
            now = time.perf_counter()
            images = (step - self._lap_step) * self._config.data.batch_size
            speed = images / (now - self._lap_time)
            self._lap_step, self._lap_time = step, now
            self._bar.update(self._task, speed=f"{speed:.0f} img/s")
            self._log.write(
                {
                    "step": step,
                    "epoch": step / self._steps_per_epoch,
                    "loss": values["loss"],
                    "grad_norm": values["grad_norm"],
                    "learning_rate": learning_rate,
                    "images_per_second": speed,
                    "skipped": values["skipped"],
                }
            )
        self._bar.update(
            self._task,
            completed=step,
            loss=f"{values['loss']:.3f}",
            rate=f"{learning_rate:.2e}",
        )
        if values["skipped_in_a_row"] >= self._config.max_skipped:
            raise NotFiniteError(
                f"loss or gradient was not finite in the last {values['skipped_in_a_row']} updates "
                f"(update {step}: loss {values['loss']}, gradient norm {values['grad_norm']}); "
                "those updates were left out and the checkpoints before them are intact. Lower "
                "optimizer.learning-rate, or train in float32 with model.dtype float32, and run "
                "again"
            )

    def held_out(self, step: int, result: Result) -> None:
        """Reports an evaluation."""
        epoch, batch_of_epoch = step / self._steps_per_epoch, step % self._steps_per_epoch
        self._log.write({"step": step, "epoch": epoch, **result.metrics()})
        where = f"update {step}" if batch_of_epoch else f"epoch {epoch:g}"
        self._console.print(f"{where}: {result.summary()}", highlight=False)

    def sync(self) -> None:
        """Puts all that was reported on disk, so that no checkpoint is ahead of its record."""
        self.flush()
        self._log.sync()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time spent inside out of the speed of training."""
        start = time.perf_counter()
        yield
        self._lap_time += time.perf_counter() - start
