"""Clock: seconds that all processes of this machine agree on and nobody sets, and which process is which."""

import os
import time
from functools import lru_cache
from pathlib import Path


def now() -> float:
    """Seconds of the machine's monotonic clock. What is to outlive a boot is kept with `boot()`."""
    return time.clock_gettime(time.CLOCK_MONOTONIC)


@lru_cache(maxsize=1)
def boot() -> str:
    """Names the machine's present boot."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def started(pid: int | None = None) -> str | None:
    """When a process started, as its kernel says; None where there is none. With its number it names one process."""
    try:
        # After the command's name, which may hold anything but ends at the last parenthesis.
        fields = Path(f"/proc/{os.getpid() if pid is None else pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else f"{boot()}/{fields[19]}"
