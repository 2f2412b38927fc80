"""The most memory that a process has held."""

import resource
import sys
from pathlib import Path


def peak_memory() -> int:
    """Of this process, in bytes."""
    status = Path("/proc/self/status")
    if status.exists():  # Linux, where ru_maxrss begins with the peak of the parent process
        (line,) = (line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return 1024 * int(line.split()[1])
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
