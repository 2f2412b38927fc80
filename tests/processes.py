"""Processes that train together on this machine, each ``python -m tiny ...``."""

import os
import socket
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor


def environment(devices: int, **more: str) -> dict[str, str]:
    """That of a process with so many devices.

    Of several that train together none may use the compilation cache: with jaxlib 0.10.2 a program
    that one reads back orders its collectives otherwise than the same one that another compiled.
    """
    return {
        **os.environ,
        "XLA_FLAGS": os.environ["XLA_FLAGS"].replace("count=8", f"count={devices}"),
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        **more,
    }


def free_address() -> str:
    """HOST:PORT where nobody listens."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{probe.getsockname()[1]}"


def start(*arguments: str, environment: dict[str, str]) -> subprocess.Popen[str]:
    """One process; its output and its errors are one text."""
    return subprocess.Popen(
        [sys.executable, "-m", "tiny", *arguments],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(processes: Sequence[subprocess.Popen[str]], timeout: float = 900) -> list[str]:
    """The outputs of processes that all end well."""
    try:
        with ThreadPoolExecutor(len(processes)) as pool:  # or one waits that another is read
            ends = pool.map(lambda process: process.communicate(timeout=timeout)[0], processes)
            outputs = list(ends)
    finally:
        for process in processes:
            process.kill()
    statuses = [process.returncode for process in processes]
    assert not any(statuses), f"statuses {statuses}\n" + "\n---\n".join(outputs)
    return outputs
