"""What every store's arm does: write all samples, read cells of them, warm or cold, and show that they are right."""

import os
import shutil
import time
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Any

import numpy as np
from serve import expect
from store_files import bytes_of, evict, fetched, forget_peak, make_durable, peak, sweep
from store_rows import Rows, Shape, Want


class StoreArm(ABC):
    """One store. A round is one of

    {"op": "write", "fsync"}: all samples, from memory to files, with an fsync of each where the store makes none;
    {"op": "delete"} of these files; {"op": "sweep"}: read through them, so that they are in the page cache;
    {"op": "read", "wants", "way", "cold", "seconds"}: as many of `wants` as `seconds` allow, one at least, each timed
    by itself. Warm ones have all been read before; a cold one's files are not in the page cache.
    """

    def __init__(self, spec: dict[str, Any]) -> None:
        self.shape = Shape(**spec["shape"])
        self.folder = Path(spec["folder"])
        self.spec = spec
        self.rows = Rows(self.shape)
        self._open = False

    @abstractmethod
    def write(self) -> None:
        """Write all samples into `folder`, which is not there."""

    def open(self) -> None:
        """Open for reading what was written."""

    def close(self) -> None:
        """Let go of what `open` opened, mappings too."""

    def aim(self, want: Want, way: str) -> None:
        """Open, or make, what only this read needs. Not measured."""

    @abstractmethod
    def read(self, want: Want, way: str) -> Any:
        """As this store's users do, into memory of the process."""

    @abstractmethod
    def bits(self, result: Any, want: Want) -> np.ndarray | None:
        """(layer, position, sample, hidden) uint16 of what was read. None where it is no activations."""

    def block(self, samples: range) -> np.ndarray:
        """(layer, position, sample, hidden) uint16 of a shard, in a buffer that is used again for the next but one."""
        s = self.shape
        if not hasattr(self, "_buffers"):
            shape = (s.layers, s.positions, s.shard, s.hidden)
            self._buffers = [np.zeros(shape, np.uint16), np.zeros(shape, np.uint16)]
        self._buffers.reverse()
        buffer = self._buffers[0]
        for slot, i in enumerate(samples):
            buffer[:, :, slot] = self.rows.sample(i)
        return buffer[:, :, : len(samples)]

    def prepare(self, round: dict[str, Any]) -> dict[str, Any]:
        if round["op"] in ("write", "delete"):
            if self._open:
                self.close()
            self._open = False
            shutil.rmtree(self.folder, ignore_errors=True)
        if round["op"] == "write":
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            os.sync()  # what others left to be written is not this arm's
        return round

    def run(self, round: dict[str, Any]) -> dict[str, Any]:
        return {"write": self._write, "read": self.read_round, "sweep": self._sweep, "delete": lambda _: {}}[
            round["op"]
        ](round)

    def report(self, round: dict[str, Any], result: dict[str, Any]) -> dict[str, Any]:
        if round["op"] == "write":
            result["bytes"] = bytes_of(self.folder)
            expect("a store at least as large as its activations", result["bytes"] >= self.shape.bytes, True)
        return result

    def _sweep(self, round: dict[str, Any]) -> dict[str, Any]:
        sweep(self.folder)
        return {}

    def _write(self, round: dict[str, Any]) -> dict[str, Any]:
        before = forget_peak()
        cpu, start = time.process_time(), time.perf_counter()
        self.write()
        shipped = time.perf_counter() - start
        if round["fsync"]:
            make_durable(self.folder)
        durable, cpu = time.perf_counter() - start, time.process_time() - cpu
        return {"shipped": shipped, "durable": durable, "cpu": cpu, "peak": peak() - before}

    def read_round(self, round: dict[str, Any]) -> dict[str, Any]:
        """{"walls", "cpus": seconds, "fetched", "bytes"}, a number a read."""
        if not self._open:
            self.open()
            self._open = True
        wants, way, cold = [Want.of(each, self.shape) for each in round["wants"]], round["way"], round["cold"]
        if not cold:
            wants = self._warm(wants, way, round["seconds"])
        walls, cpus, disk, result = [], [], [], None
        until = time.perf_counter() + round["seconds"]
        for want in wants:
            result = None  # its memory goes before the next is asked for, and its file may be thrown out
            if cold:
                self.close()
                evict(self.folder)
                self.open()
                self.aim(want, way)
            from_disk, cpu, start = fetched(), time.process_time(), time.perf_counter()
            result = self.read(want, way)
            walls.append(time.perf_counter() - start)
            cpus.append(time.process_time() - cpu)
            disk.append(fetched() - from_disk)
            if time.perf_counter() > until:
                break
        found = self.bits(result, want)
        if found is not None:
            expect("what was read", self.rows.what_is_wrong(want, found), None)
        nbytes = [want.bytes(self.shape) for want in wants[: len(walls)]]
        return {"walls": walls, "cpus": cpus, "fetched": disk, "bytes": nbytes}

    def _warm(self, wants: list[Want], way: str, seconds: float) -> list[Want]:
        """Those that were read in this time. All before the first is measured: a cell that is in the page cache lies
        in memory, and not in the CPU's caches, where the read before has left its own.
        """
        until = time.perf_counter() + seconds
        for count, want in enumerate(wants, 1):
            self.aim(want, way)
            self.read(want, way)
            if time.perf_counter() > until:
                break
        return wants[:count]
