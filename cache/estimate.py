"""Estimate: what a capture will cost in disk and memory, said before it starts."""

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from hiddenlake.cache.engines.base import Request
from hiddenlake.cache.errors import StoreError
from hiddenlake.cache.samples import Prompt
from hiddenlake.cache.store.layout import Layout


@dataclass(frozen=True, slots=True)
class Estimate:
    """Costs of a run, in bytes.

    samples : still to be captured.
    disk_bytes : what they will take, whole shards and longest answers counted.  disk_free : what there is.
    buffer_bytes : shard buffers in memory.  ring_bytes : most that waiting rows may take.
    in_flight : samples that the ring admits at once.
    """

    samples: int
    disk_bytes: int
    disk_free: int
    buffer_bytes: int
    ring_bytes: int
    in_flight: int

    def check_disk(self) -> None:
        """Raise StoreError when the disk cannot hold the run."""
        if self.disk_bytes > self.disk_free:
            raise StoreError(
                f"the disk is too full: {self.samples} samples need {self.disk_bytes / 2**30:.2f} GiB, "
                f"{self.disk_free / 2**30:.2f} GiB are free; free some space, or capture fewer samples, sites, layers "
                f"or positions"
            )


def estimate(request: Request, layout: Layout, pending: Sequence[Prompt], out: Path) -> Estimate:
    """Project a run that captures the pending prompts into `out`."""
    shards = -(-len(pending) // layout.samples)
    tokens = 0
    if request.tokens is not None:
        for prompt in pending:
            answer = request.decoding.max_new_tokens if prompt.given is None else len(prompt.given)
            q = len(prompt.token_ids)
            tokens += len(request.tokens.indices(q, q + answer))
    folder = out
    while not folder.exists():
        folder = folder.parent
    sample_bytes = max(1, request.rows_per_sample) * request.row_bytes
    in_flight = request.ring_bytes // sample_bytes
    return Estimate(
        samples=len(pending),
        disk_bytes=shards * layout.shard_bytes + tokens * layout.token_bytes,
        disk_free=shutil.disk_usage(folder).free,
        buffer_bytes=layout.buffer_bytes,
        ring_bytes=min(request.ring_bytes, min(len(pending), in_flight) * sample_bytes),
        in_flight=in_flight,
    )
