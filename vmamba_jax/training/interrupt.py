"""Being asked to stop: SIGTERM from a scheduler or Ctrl-C from a person."""

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class StopRequest:
    """Remembers a signal, so that training can end between two updates.

    Use it as a context manager around the loop. A second Ctrl-C interrupts at once. In a
    multi-process run JAX's preemption service listens for SIGTERM instead, and lets all processes
    stop after the same update.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "StopRequest":
        if jax.process_count() == 1:
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyright: ignore[reportArgumentType]

    def reached(self, step: int) -> bool:
        """Whether to stop after update `step`; every process gets the same answer."""
        if jax.process_count() > 1 and multihost_utils.reached_preemption_sync_point(step):
            self.name = "SIGTERM"
        return self.name is not None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.name is not None:
            signal.default_int_handler(number, frame)
        self.name = signal.Signals(number).name
