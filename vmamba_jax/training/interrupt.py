"""Being asked to stop: SIGTERM from a scheduler or Ctrl-C from a person."""

import os
import signal
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from types import FrameType
from typing import TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Item = TypeVar("Item")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)
_PATIENCE = 3
"""So many times Ctrl-C ends a process at once, saved or not."""
_PACE = 1.0
"""Seconds between two agreements of several processes, as long as steps are shorter than that."""
_MOST_STEPS = 16
"""Steps between two agreements at most: the pace of the next steps is a guess."""


class StoppedError(Exception):
    """Work that need not be finished was given up because a signal asked for it."""


class StopRequest:
    """Remembers a signal, so that a run ends between two updates, in all its processes at once.

    Use it as a context manager around all of the run, from before the processes find each other: a
    signal is remembered from then on, whatever the run is doing. More signals change nothing, but
    the third Ctrl-C interrupts at once. JAX's preemption service must be off: it would take
    SIGTERM for itself, and forgets one that comes before the first update of a resumed run.

    Python hears a signal when the call into compiled code that it waits for returns. So a
    compilation, or the restoration of a checkpoint, is finished first.

    Attributes:
        name: the signal that this process heard, or that a process of the run did; None before.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._agreed = False
        self._interrupts = 0
        self._previous: dict[int, object] = {}
        self._every, self._steps, self._since = 1, 0, time.perf_counter()

    def __enter__(self) -> "StopRequest":
        for number in _SIGNALS:
            self._previous[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def reached(self) -> bool:
        """Whether to stop now.

        Every process of a run must ask equally often, between the same steps, and gets the same
        answer: the processes agree, by a maximum over them all, about once a second, and after
        every step that takes longer. Between two agreements the answer is no.
        """
        if jax.process_count() == 1:
            return self.name is not None
        self._agreed = self._agreed or self._agree()
        return self._agreed

    def watch(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, until it is time to stop.

        Raises:
            StoppedError: instead of the next item.
        """
        self._every = 1  # they take another time than what was before, and what comes after
        for item in items:
            if self.reached():
                raise StoppedError
            yield item
        self._every = 1

    def _agree(self) -> bool:
        self._steps += 1
        if self._steps < self._every:
            return False
        milliseconds = 1000 * (time.perf_counter() - self._since) / self._steps
        heard = signal.Signals[self.name] if self.name else 0
        mine = np.array([heard, min(1 + milliseconds, 1e6)], np.int32)
        number, pace = map(int, np.max(multihost_utils.process_allgather(mine), axis=0))
        # The same in every process, as all that it is made of was agreed on.
        self._every = min(max(int(1000 * _PACE / pace), 1), 2 * self._every, _MOST_STEPS)
        self._steps, self._since = 0, time.perf_counter()
        if number:
            self.name = signal.Signals(number).name
        return number > 0

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self._interrupts += number == signal.SIGINT
        if self._interrupts >= _PATIENCE:
            signal.default_int_handler(number, frame)
        if self.name is None:
            self.name = signal.Signals(number).name
            with suppress(OSError):  # not by print, which this may have interrupted
                os.write(2, f"\n{self.name}: stopping\n".encode())
