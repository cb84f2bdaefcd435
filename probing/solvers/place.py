"""Place: the device that a cell is solved on, where one is named."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from hiddenlake.cache.errors import ProbeError

_of_thread = threading.local()


def check_device(name: str) -> torch.device:
    """`cpu`, `cuda` or `cuda:1`. Raises ProbeError for one that there is not."""
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise ProbeError(f"device {name!r} is no device: expected e.g. cpu, cuda or cuda:1") from error
    if device.type not in ("cpu", "cuda"):
        raise ProbeError(f"probes are fitted on cpu or cuda, not on {name!r}")
    if device.type == "cuda":
        there = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= there:
            raise ProbeError(
                f"device {name!r}: torch sees {there} CUDA devices here: leave `device` out, or name another"
            )
    return device


@contextmanager
def queue_of_thread(device: torch.device) -> Iterator[None]:
    """Each thread's work in a CUDA stream of its own, so that the cells of several threads overlap.

    One a thread, and not one a cell: torch keeps freed memory for the stream that it was used in.
    """
    if device.type != "cuda":
        yield
        return
    streams = _of_thread.__dict__.setdefault("streams", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    with torch.cuda.stream(streams[device]):
        yield


def device_memory(device: torch.device) -> int | None:
    """Nine tenths of a CUDA device's bytes, of what it has and not of what is free, so that it is the same each time.

    None for a CPU.
    """
    return torch.cuda.get_device_properties(device).total_memory * 9 // 10 if device.type == "cuda" else None
