"""The disk that is measured: its file system, its read-ahead and the kernel, which decide as much as any store."""

import os
import platform
from pathlib import Path
from typing import Any


def disk(folder: Path) -> dict[str, Any]:
    """{"file_system", "read_ahead_kib": None where the kernel does not say, "kernel"} of the folder's disk."""
    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    inside = [mount for mount in mounts if folder.resolve().is_relative_to(mount[1])]
    # of mounts on one place the last is the one that is seen
    _, _, kind, options, *_ = max(reversed(inside), key=lambda mount: len(mount[1]))
    device = os.stat(folder).st_dev
    number = f"{os.major(device)}:{os.minor(device)}"
    read_ahead = Path(f"/sys/class/bdi/{number}/read_ahead_kb")
    return {
        "file_system": f"{kind} ({options})",
        "read_ahead_kib": int(read_ahead.read_text()) if read_ahead.exists() else None,
        "kernel": platform.release(),
    }
