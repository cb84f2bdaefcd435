"""Estimate: what a capture will cost in disk and memory, said before it starts."""

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hiddenlake.cache.engines.base import Memory, Request
from hiddenlake.cache.errors import StoreError
from hiddenlake.cache.samples import Prompt
from hiddenlake.cache.store.backend import Backend
from hiddenlake.cache.store.layout import Layout


@dataclass(frozen=True, slots=True)
class Estimate:
    """Costs of a run, in bytes.

    samples : still to be captured.  in_flight : of them, at once.
    disk_bytes : what they will take, whole shards and longest answers counted.  disk_free : what there is, None in object
        storage.
    buffer_bytes, ring_bytes : host memory of shard buffers, and of rows that wait.  memory_free : what there is, None
        where that is not known.
    device_bytes, kv_tokens : see Memory.
    """

    samples: int
    in_flight: int
    disk_bytes: int
    disk_free: int | None
    buffer_bytes: int
    ring_bytes: int
    memory_free: int | None
    device_bytes: int
    kv_tokens: int

    def check(self) -> None:
        """Raise StoreError when the disk, or the memory, cannot hold the run."""
        if self.disk_free is not None and self.disk_bytes > self.disk_free:
            raise StoreError(
                f"the disk is too full: {self.samples} samples need {self.disk_bytes / 2**30:.2f} GiB, "
                f"{self.disk_free / 2**30:.2f} GiB are free; free some space, or capture fewer samples, sites, layers "
                f"or positions"
            )
        needed = self.buffer_bytes + self.ring_bytes
        if self.memory_free is not None and needed > self.memory_free:
            raise StoreError(
                f"the memory is too small: shard buffers take {self.buffer_bytes / 2**30:.2f} GiB and waiting rows "
                f"up to {self.ring_bytes / 2**30:.2f} GiB, {self.memory_free / 2**30:.2f} GiB are free; lower "
                f"--buffer-bytes or --ring-bytes"
            )


def estimate(request: Request, memory: Memory, layout: Layout, pending: Sequence[Prompt], out: Backend) -> Estimate:
    """Project a run that captures the pending prompts into `out` by an engine that takes so much memory."""
    shards = -(-len(pending) // layout.samples)
    tokens = 0
    if request.tokens is not None:
        for prompt in pending:
            answer = request.decoding.max_new_tokens if prompt.given is None else len(prompt.given)
            q = len(prompt.token_ids)
            tokens += len(request.tokens.indices(q, q + answer))
    return Estimate(
        samples=len(pending),
        in_flight=min(len(pending), memory.samples),
        disk_bytes=shards * layout.shard_bytes + tokens * layout.token_bytes,
        disk_free=out.free_bytes(),
        buffer_bytes=layout.buffer_bytes,
        ring_bytes=memory.host_bytes(len(pending)),
        memory_free=free_memory(),
        device_bytes=memory.device_bytes,
        kv_tokens=memory.kv_tokens,
    )


def free_memory() -> int | None:
    """Bytes that the machine, or the container, has left for programs; None off Linux."""
    try:
        lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        free = int(lines["MemAvailable"].split()[0]) * 1024
        group = Path("/sys/fs/cgroup")
        with suppress(OSError, ValueError):  # outside of a container, or without a limit
            limit, used = (int((group / name).read_text()) for name in ("memory.max", "memory.current"))
            cached = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())["inactive_file"]
            free = min(free, limit - used + int(cached))
    except (OSError, KeyError):
        return None
    return free
