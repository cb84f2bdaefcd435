"""What the kernels' benchmarks share: the kernel itself, its limit, device seconds in turns, and what it ran on."""

import importlib.util
import shutil
import subprocess
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from _table import machine

COPIED = 1 << 29  # bytes of the copied buffer: ten times an H100's L2 cache
LIMIT = "device-to-device copy (the limit)"
_MEASURED = 0.02  # seconds of one measurement: far above the resolution of events (0.5 us)


def kernel(name: str) -> ModuleType:
    """kernels/<name>.py by its path: `import hiddenlake` asks for packages that a GPU machine may lack."""
    path = Path(__file__).parents[2] / "kernels" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(name, path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def device_copy() -> Callable[[], object]:
    """A copy of COPIED bytes, which reads and writes them."""
    source = torch.empty(COPIED, dtype=torch.uint8, device="cuda").random_()
    return partial(torch.empty_like(source).copy_, source)


def in_turns(rounds: int, *works: Callable[[], object]) -> list[list[float]]:
    """Seconds of one call of each in each round, in rotated order."""
    repeats = [max(1, round(_MEASURED / seconds(work, 3))) for work in works]
    times: list[list[float]] = [[] for _ in works]
    for k in range(rounds):
        order = [*range(k % len(works), len(works)), *range(k % len(works))]
        for i in order:
            times[i].append(seconds(works[i], repeats[i]))
    return times


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Device seconds of one call, after one that is not counted."""
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    work()
    start.record()
    for _ in range(repeats):
        work()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3 / repeats


def about() -> dict[str, Any]:
    smi = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    driver = "unknown (no nvidia-smi)"
    if shutil.which(smi[0]):
        driver = subprocess.run(smi, capture_output=True, text=True, check=True).stdout.split()[0]
    return {"GPU": torch.cuda.get_device_name(), "driver": driver} | machine("torch", "triton")
