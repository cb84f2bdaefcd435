"""What the store benchmark compares: sizes, stores, and the reads that are asked of each."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Size:
    """positions : 15, as in the paper.  samples, quick_samples : so many that the activations are over 4 GB, 0.5 GB."""

    layers: int
    hidden: int
    samples: int
    quick_samples: int
    positions: int = 15


# Layers and hidden size of SmolLM2-135M and of Llama-3.1-8B.
SIZES = {576: Size(30, 576, 8192, 1024), 4096: Size(32, 4096, 1088, 128)}


@dataclass(frozen=True)
class Rounds:
    """writes, reads : beside the limits and TensorStore.  other_writes, other_reads : beside other stores.

    slabs : of the largest read.  judged : by goals.
    """

    writes: int
    reads: int
    other_writes: int
    other_reads: int
    slabs: int
    judged: bool


FULL = Rounds(8, 10, 3, 5, 3, judged=True)
QUICK = Rounds(3, 3, 1, 2, 1, judged=False)

# A store that takes minutes is asked for a part of the samples, a multiple of this.
_FEWEST = 64


@dataclass(frozen=True, eq=False)
class Store:
    """One store. name : in the table.  script : in arms/.  environment : its pins, None for this one.

    more : of its spec.  ways : of reading it, as its arm knows them; "" where there is one.
    part : one n-th of the samples is asked of it.  fsyncs : whether its files are durable when it says that they are
        written.  slab : whether the largest read is asked of it.
    means : for the table's foot.
    """

    name: str
    script: str
    means: str
    environment: str | None = None
    more: dict[str, Any] = field(default_factory=dict)
    ways: tuple[str, ...] = ("",)
    part: int = 1
    fsyncs: bool = True
    slab: bool = True

    def samples(self, samples: int) -> int:
        """How many are asked of it."""
        return samples if self.part == 1 else max(_FEWEST, samples // self.part // _FEWEST * _FEWEST)

    def label(self, way: str) -> str:
        """A way of reading it, in the table."""
        return f"{self.name}, {way}" if way else self.name


OURS = Store("hiddenlake", "store_hiddenlake.py", "", more={"arrival": "task"})
SHUFFLED = Store("hiddenlake, arrived in another order", "store_hiddenlake.py", "", more={"arrival": "shuffled"})
SHARED = Store(
    "hiddenlake, shared", "store_hiddenlake.py",
    "ours, in memory that other processes can fill, as vLLM's do: here it has no huge pages",
    more={"arrival": "task", "shared": True},
)  # fmt: skip
SHARDS = Store(
    "plain files", "store_raw.py", "the same bytes, in order already, one file a shard, written and fsynced: the limit",
    more={"files": "one a shard"},
)  # fmt: skip
DIRECT = Store(
    "plain files, O_DIRECT", "store_raw.py", "the same, past the page cache, as ours are written: the disk's own limit",
    more={"files": "one a shard", "flags": os.O_DIRECT},
)  # fmt: skip
CONTIGUOUS = Store(
    "one contiguous read", "store_raw.py", "one preadv of as many bytes from one open file: the limit",
    more={"files": "one"}, ways=("into a buffer", "into new memory", "announced"),
)  # fmt: skip

_TENSORSTORE = (
    "a Zarr v3 array with our shards and chunks, fsynced; read with no cache, with its own of 32 MiB, which keeps shard "
    "indices, and with its own of 1 GiB, from which decoded chunks are copied, so that a warm read reads and verifies "
    "nothing"
)
_WAYS = ("no cache", "its index cached", "its chunks cached")

RIVALS = {
    "tensorstore": Store(
        "TensorStore", "store_tensorstore.py", f"{_TENSORSTORE}; crc32c in each chunk",
        more={"checksums": True}, ways=_WAYS,
    ),
    "tensorstore_plain": Store(
        "TensorStore without checksums", "store_tensorstore.py", _TENSORSTORE, more={"checksums": False},
        ways=_WAYS,
    ),
    "zarr": Store(
        "zarr-python", "store_zarr.py", "a Zarr v3 array with our shards and chunks, without checksums of chunks",
        fsyncs=False,
    ),
    "memmap": Store(
        "np.memmap", "store_memmap.py", "one file (layer, position, sample, hidden), filled a shard at once, flushed"
    ),
    "safetensors": Store(
        "safetensors per request", "store_safetensors.py", "a file a request as vLLM's connector lays it out, 8 "
        "writing threads, get_slice of the wanted rows", fsyncs=False,
    ),
    "probelab": Store(
        "probelab", "store_probelab.py", "save_memmap of all activations, gathered in memory; load_memmap of a layer",
        "probelab", slab=False,
    ),
    "lmprobe": Store(
        "lmprobe", "store_lmprobe.py", "save_prompt_activations of each prompt; load_layer_across_prompts, or "
        "load_prompt_activations of one", "lmprobe", part=4, fsyncs=False, slab=False,
    ),
    "sae_lens": Store(
        "SAELens", "store_sae_lens.py", "CacheActivationsRunner without its model, a run a layer, float32, since its "
        "format has no bfloat16; read batch by batch with its ActivationsStore, or by row from its dataset",
        "sae_lens", part=4, fsyncs=False, slab=False,
    ),
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """One kind of read. make : (size, samples to choose from, random numbers) -> layers, positions, samples; None for
    all.  warm, cold : how many in a round.  one_sample : whether it is of one.
    """

    name: str
    make: Callable[[Size, int, np.random.Generator], tuple[Any, Any, Any]]
    warm: int
    cold: int
    one_sample: bool = False

    def wants(self, size: Size, samples: int, random: np.random.Generator, cold: bool) -> list[dict[str, Any]]:
        """What the arms are asked for, the same of each."""
        found = []
        for _ in range(self.cold if cold else self.warm):
            layers, positions, chosen = self.make(size, samples, random)
            found.append({"layers": layers, "positions": positions, "samples": chosen, "at": random.random()})
        return found


def _one(count: int, random: np.random.Generator, length: int = 1) -> list[int]:
    start = int(random.integers(count - length + 1))
    return [start, start + length]


def _some(samples: int, random: np.random.Generator) -> list[int]:
    return sorted(random.choice(samples, max(2, samples // 20), replace=False).tolist())


CELL = Kind("X[layer, position]", lambda s, n, r: (_one(s.layers, r), _one(s.positions, r), None), 6, 3)
SOME = Kind(
    "X[layer, position] of 5 % of the samples",
    lambda s, n, r: (_one(s.layers, r), _one(s.positions, r), _some(n, r)),
    6,
    3,
)
COLUMN = Kind(
    "one sample, one position, all layers",
    lambda s, n, r: (None, _one(s.positions, r), [int(r.integers(n))]),
    20,
    5,
    True,
)
SAMPLE = Kind("one sample, all positions, all layers", lambda s, n, r: (None, None, [int(r.integers(n))]), 10, 5, True)
SLAB = Kind("3 positions, all layers, all samples", lambda s, n, r: (None, _one(s.positions, r, 3), None), 1, 1)

KINDS = (CELL, SOME, COLUMN, SAMPLE, SLAB)
