"""The record of a run: one JSON line and one set of TensorBoard scalars per logged update."""

import json
import os
from pathlib import Path
from typing import Any

from tensorboardX import SummaryWriter

Row = dict[str, float | int]


class MetricsLog:
    """Appends rows to ``metrics.jsonl`` and to TensorBoard event files beside it.

    Use it as a context manager: leaving it flushes both.

    Args:
        folder: the run's folder.
        resume_at: rows after this step are from updates that were lost; they are dropped, so that
            the record of a resumed run reads like that of an uninterrupted one.
        write: False (every process but the first) makes all calls do nothing.
    """

    def __init__(self, folder: Path, *, resume_at: int = 0, write: bool = True) -> None:
        self._writer = None
        if not write:
            return
        path = folder / "metrics.jsonl"
        kept = [row for row in read_rows(folder) if row["step"] <= resume_at]
        new = path.with_suffix(".new")
        new.write_text("".join(json.dumps(row) + "\n" for row in kept))
        new.replace(path)
        self._file = path.open("a")
        self._writer = SummaryWriter(str(folder), purge_step=resume_at + 1 if resume_at else None)

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._writer.close()
            self._file.close()

    def write(self, row: Row) -> None:
        """Adds one row; it must have a ``step``."""
        if self._writer is None:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name != "step":
                self._writer.add_scalar(name, value, int(row["step"]))

    def sync(self) -> None:
        """Puts what was written on disk; called before a checkpoint that relies on it."""
        if self._writer is not None:
            self._writer.flush()
            os.fsync(self._file.fileno())


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
