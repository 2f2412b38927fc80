"""The record of a run: one JSON line and one set of TensorBoard scalars per logged update."""

import json
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tensorboardX.event_file_writer import EventsWriter
from tensorboardX.proto import event_pb2, summary_pb2

Row = dict[str, float | int]
# Protocol buffers make their classes at run time.
_events: Any = event_pb2
_summaries: Any = summary_pb2


class MetricsLog:
    """Appends rows to ``metrics.jsonl`` and to a TensorBoard event file beside it.

    Use it as a context manager: leaving it flushes both.

    Args:
        folder: the run's folder.
        resume_at: rows after this step are from updates that were lost; they are dropped, so that
            the record of a resumed run reads like that of an uninterrupted one.
        write: False (every process but the first) makes all calls do nothing.

    Raises:
        OSError: here and below, if a file can't be written; it names the file.
    """

    def __init__(self, folder: Path, *, resume_at: int = 0, write: bool = True) -> None:
        self._path = folder / "metrics.jsonl"
        self._events: EventsWriter | None = None
        if not write:
            return
        kept = [row for row in read_rows(folder) if row["step"] <= resume_at]
        new = self._path.with_suffix(".new")
        with self._named():
            new.write_text("".join(json.dumps(row) + "\n" for row in kept))
            new.replace(self._path)
            self._file = self._path.open("a")
            # Not by SummaryWriter, whose thread dies where a disk is full: all waits for it then.
            self._events = EventsWriter(str(folder / "events"))
            if resume_at:  # has TensorBoard drop them, too
                started = _events.SessionLog(status=_events.SessionLog.START)
                self._events.write_event(_events.Event(step=resume_at + 1, session_log=started))

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, error: type[BaseException] | None = None, *_: object) -> None:
        if self._events is None:
            return
        try:
            with self._named():
                self._events.close()
                self._file.close()
        except OSError:
            if error is None:  # else it is what has failed already
                raise

    def write(self, row: Row) -> None:
        """Adds one row; it must have a ``step``."""
        if self._events is None:
            return
        values = [
            _summaries.Summary.Value(tag=name, simple_value=value)
            for name, value in row.items()
            if name != "step"
        ]
        with self._named():
            self._file.write(json.dumps(row) + "\n")
            self._file.flush()
            self._events.write_event(
                _events.Event(
                    wall_time=time.time(),
                    step=int(row["step"]),
                    summary=_summaries.Summary(value=values),
                )
            )

    def sync(self) -> None:
        """Puts what was written on disk; called before a checkpoint that relies on it."""
        if self._events is not None:
            with self._named():
                self._events.flush()
                os.fsync(self._file.fileno())

    @contextmanager
    def _named(self) -> Iterator[None]:
        """Has errors name the file, and say what became of the run."""
        try:
            yield
        except OSError as error:
            raise OSError(
                error.errno,
                f"the record can't be written: {error.strerror}. The checkpoints are intact; make "
                "room, and the same command goes on from the last one",
                str(self._path),
            ) from error


def is_evaluated(folder: Path, step: int) -> bool:
    """Whether a run's record has the held-out results of an update."""
    return any(row["step"] == step and "loss" not in row for row in read_rows(folder))


def read_rows(folder: Path) -> list[dict[str, Any]]:
    """The rows of ``metrics.jsonl``; a last line that was cut off is left out."""
    path = folder / "metrics.jsonl"
    rows = []
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows
