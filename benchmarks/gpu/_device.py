"""The device of a benchmark: what it is, and how fast bytes come home from it."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from _kernels import about
from _table import machine

from hiddenlake.cache.rows import TapTable
from hiddenlake.cache.worker.staging import make_staging

_COPIED = 1 << 29  # bytes: far beyond what a launch costs
_STEPS = 40


def facts() -> dict[str, Any]:
    """Of the machine and its versions, GPU and driver first."""
    import vllm

    known = about()
    known["versions"] |= machine("transformers", "zarr")["versions"] | {"vllm": vllm.__version__}
    return known | {"device_gib": round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)}


def link_bandwidth() -> float:
    """Bytes a second of one large copy from the device into pinned memory."""
    source = torch.empty(_COPIED, dtype=torch.uint8, device="cuda").random_()
    target = torch.empty(_COPIED, dtype=torch.uint8, pin_memory=True)
    return _COPIED / _seconds(lambda: target.copy_(source, non_blocking=True))


def staging_bandwidth(table: TapTable, rows: int) -> float:
    """Bytes a second of steps whose rows go home by hiddenlake's staging, one behind the other, without a model."""
    buffers, staging = make_staging(rows, 4 * rows, table, torch.bfloat16, torch.device("cuda"))

    def steps() -> None:
        for _ in range(_STEPS):
            slots = staging.ring.take(rows)
            staging.begin(list(range(rows)), slots)
            staging.collect()
            staging.ring.give_back(slots)
        torch.cuda.current_stream().wait_event(staging.mark())

    return _STEPS * rows * len(table) * buffers.out.itemsize / _seconds(steps)


def token_latency(table: TapTable, rows: int) -> tuple[float, float]:
    """(beside a step's rows on their way home, alone): seconds until the host has a few bytes, as sampled tokens are."""
    _, staging = make_staging(rows, 4 * rows, table, torch.bfloat16, torch.device("cuda"))
    tokens = torch.zeros(rows, dtype=torch.int64, device="cuda")
    home = torch.zeros(rows, dtype=torch.int64, pin_memory=True)
    stream = torch.cuda.Stream()
    found = []
    for busy in (True, False):
        times = []
        for _ in range(_STEPS):
            torch.cuda.synchronize()
            if busy:
                slots = staging.ring.take(rows)
                staging.begin(list(range(rows)), slots)
                staging.collect()
                staging.ring.give_back(slots)
            start = time.perf_counter()
            with torch.cuda.stream(stream):
                home.copy_(tokens, non_blocking=True)
            stream.synchronize()
            times.append(time.perf_counter() - start)
        found.append(statistics.median(times))
    return found[0], found[1]


def _seconds(work: Callable[[], object]) -> float:
    """Device seconds of one call, after one that is not counted."""
    work()
    torch.cuda.synchronize()
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    work()
    end.record()
    end.synchronize()
    torch.cuda.empty_cache()  # the card is for the engines
    return start.elapsed_time(end) / 1e3
