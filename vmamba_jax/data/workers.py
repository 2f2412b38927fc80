"""Worker processes: they leave signals to their parent, end with it, and lose no exception."""

import multiprocessing
import os
import pickle
import signal
import threading
import traceback
from typing import Any

from vmamba_jax.data.errors import DataError


def follow_parent(index: int, count: int) -> None:
    """What each worker does first.

    Ctrl-C, and SIGTERM of many schedulers, reach every process of a group; the parent alone decides
    what ends, as it still needs its workers until all is saved. A parent that is killed takes them
    along.
    """
    del index, count
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(
        target=_end_with, args=(multiprocessing.parent_process(),), daemon=True
    ).start()


def _end_with(parent: Any) -> None:
    parent.join()
    os._exit(1)


def portable(error: BaseException) -> BaseException:
    """An exception as it can be raised where records are read.

    Most are what they were. One that ends an iteration or a process by its class, or that a worker
    process can't hand over (pickling would lose it, or its message), becomes a `DataError` that
    tells all of it.
    """
    in_worker = multiprocessing.parent_process() is not None
    harmless = isinstance(error, Exception) and not isinstance(error, StopIteration)
    if harmless and (not in_worker or _survives_pickling(error)):
        return error
    name = f"{type(error).__module__}.{type(error).__qualname__}"
    return DataError(
        f"reading a record raised {name}: {error}\n{''.join(traceback.format_exception(error))}"
    )


def _survives_pickling(error: BaseException) -> bool:
    try:
        copy = pickle.loads(pickle.dumps(error))
        return type(copy) is type(error) and str(copy) == str(error)
    except Exception:  # an exception's own code may raise anything
        return False
