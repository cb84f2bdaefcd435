"""Transfers a capture of 300 MB and prints what it was allowed, and how much more memory the process took at its peak.

python peak.py make LAKE                  writes the capture
python peak.py FORMAT LAKE OUT BYTES      exports it in BYTES of memory
python peak.py import EXPORT OUT BYTES    imports its safetensors export with shard buffers of BYTES
"""

import json
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import ml_dtypes  # noqa: F401
import numpy as np

from hiddenlake.cache.exchange.cost import Watcher
from hiddenlake.cache.exchange.exporting import export_capture
from hiddenlake.cache.exchange.importing import import_source
from hiddenlake.cache.exchange.own_export import OwnExport
from hiddenlake.cache.positions import Tokens
from hiddenlake.cache.samples import Sample
from hiddenlake.cache.store import Coverage, open_writer

SAMPLES, LAYERS, POSITIONS, WIDTH = 600, tuple(range(8)), ("0", "1", "2", "3", "-1", "-2"), 1024


def make(path, samples=SAMPLES):
    coverage = Coverage(("mlp_out",), LAYERS, POSITIONS, {"mlp_out": WIDTH}, "bfloat16", Tokens("all"))
    identity = {"model": "m", "task": "t"}
    rows = np.random.default_rng(0).normal(size=(len(LAYERS), 24, WIDTH)).astype(ml_dtypes.bfloat16).view(np.uint16)
    with open_writer(
        path, identity=identity, coverage=coverage, provenance={}, planned=samples, buffer_bytes=64 << 20
    ) as writer:
        keys = [f"k{i:05d}" for i in range(samples)]
        writer.reserve(keys, samples)
        for i, key in enumerate(keys):
            shard, slot = writer.slot()
            index = [token % 24 for token in (0, 1, 2, 3, -1, -2)]
            shard.views["mlp_out"][:, :, slot, :] = rows[:, index]
            shard.views["embed"][:, slot, :] = rows[0, index]
            span = writer.span(24)
            while span.rest:
                piece = writer.piece(span)
                part = slice(piece.first, piece.first + piece.count)
                piece.shard.views["mlp_out"][:, piece.rows] = rows[:, part]
                piece.shard.views["embed"][piece.rows] = rows[0, part]
                writer.filled(piece)
            sample = Sample(
                key, i, 0, "", "", "", (), None, None, False, tuple(range(24)), (-1.0,) * 4, 20, 24, "stop",
                tuple(index),
            )  # fmt: skip
            writer.add(shard, slot, sample, span)


def memory():
    """Bytes that the process itself takes. Pages of files that are mapped are not counted: they are the system's cache,
    which it takes back when it needs it."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(lines[name].split()[0]) for name in ("RssAnon", "RssShmem")) << 10


class Peak(threading.Thread):
    """Looks every millisecond or so until it is stopped."""

    def __init__(self):
        super().__init__(daemon=True)
        self.before = self.most = memory()
        self.running = True

    def run(self):
        while self.running:
            self.most = max(self.most, memory())
            time.sleep(0.001)


class Heard(Watcher):
    def planned(self, cost):
        self.cost = cost


def main(what, source, out, allowed):
    watcher = Heard()
    # what is imported, and what libraries keep, is there before it counts
    make(f"{out}-small", 40)
    if what == "import":
        export_capture(f"{out}-small", f"{out}-warm")
        import_source(OwnExport(f"{out}-warm"), f"{out}-warmer", buffer_bytes=64 << 20)
        opened = OwnExport(source)
    else:
        export_capture(f"{out}-small", f"{out}-warm", what, memory_bytes=64 << 20)
    peak = Peak()
    peak.start()
    if what == "import":
        import_source(opened, out, buffer_bytes=int(allowed), watcher=watcher)
    else:
        export_capture(source, out, what, memory_bytes=int(allowed), watcher=watcher)
    peak.running = False
    peak.join()
    cost = replace(watcher.cost, note="")
    print(json.dumps({"allowed": cost.memory_bytes, "data": cost.data_bytes, "peak": peak.most - peak.before}))


if __name__ == "__main__":
    if sys.argv[1] == "make":
        make(sys.argv[2])
    else:
        main(*sys.argv[1:])
