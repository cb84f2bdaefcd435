"""Runs the store benchmark's rounds: one process a store, every round through all of them in turn."""

import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from _arms import Arm, ArmError, in_rotation
from _environments import python_of
from _stores import RIVALS, Kind, Rounds, Size, Store

from hiddenlake.cache.store import Coverage, choose_layout

# What an arm may take for the reads of one round, so that a slow one makes one of them.
_SECONDS = 0.5

# Shard buffers of the writer, as `open_writer` has by default.
_BUFFER_BYTES = 2 << 30


@dataclass
class Reads:
    """Of one way of reading, round by round. rate : bytes a second.  ms, cpu : of a read, milliseconds.

    fetched : bytes from the disk for each byte that was asked for.
    """

    rate: list[float] = field(default_factory=list)
    ms: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    fetched: list[float] = field(default_factory=list)

    def add(self, answer: dict[str, Any]) -> None:
        """An arm's answer: the median of its reads, since the first is often slow."""
        walls, nbytes = np.array(answer["walls"]), np.array(answer["bytes"])
        self.rate.append(float(np.median(nbytes / walls)))
        self.ms.append(1e3 * float(np.median(walls)))
        self.cpu.append(1e3 * float(np.mean(answer["cpus"])))
        self.fetched.append(float(np.mean(np.array(answer["fetched"]) / nbytes)))


@dataclass
class Writes:
    """Of one store, round by round. rate : bytes of activations a second until durable.

    shipped : until the store says that it is done.  cpu : seconds for each GB.  peak : bytes of memory beside what was
    there before.  bytes : of the files, for each byte of activations.
    """

    rate: list[float] = field(default_factory=list)
    shipped: list[float] = field(default_factory=list)
    cpu: list[float] = field(default_factory=list)
    peak: list[int] = field(default_factory=list)
    bytes: list[float] = field(default_factory=list)

    def add(self, answer: dict[str, Any], nbytes: int) -> None:
        self.rate.append(nbytes / answer["durable"])
        self.shipped.append(nbytes / answer["shipped"])
        self.cpu.append(answer["cpu"] * 1e9 / nbytes)
        self.peak.append(answer["peak"])
        self.bytes.append(answer["bytes"] / nbytes)


# A store and a way of reading it.
Case = tuple[Store, str]


class StoreBench:
    """The arms of one size.

    folder : on the disk that is measured.  samples : N.  failed : why a store's arm is not there any more.
    """

    def __init__(self, folder: Path, size: Size, samples: int, rounds: Rounds, stack: ExitStack) -> None:
        self.folder, self.size, self.samples, self.rounds = folder, size, samples, rounds
        coverage = Coverage(
            ("mlp_out",), tuple(range(size.layers)), tuple(map(str, range(size.positions))), {"mlp_out": size.hidden}
        )
        self.layout = choose_layout(coverage, samples, _BUFFER_BYTES)
        self.failed: dict[Store, str] = {}
        self._stack, self._start = stack, time.perf_counter()
        self._arms: dict[str, Arm] = {}
        self._random = np.random.default_rng(size.hidden)

    def nbytes(self, store: Store) -> int:
        """Of the activations that a store is given."""
        return self.size.layers * self.size.positions * self.size.hidden * 2 * store.samples(self.samples)

    def arm(self, store: Store) -> Arm:
        """The store's process, started where there is none. Raises RuntimeError."""
        if store.name not in self._arms:
            python = python_of(store.environment) if store.environment else sys.executable
            shape = {
                "layers": self.size.layers, "positions": self.size.positions, "samples": store.samples(self.samples),
                "hidden": self.size.hidden, "shard": self.layout.samples,
            }  # fmt: skip
            spec = {"folder": str(self.folder / store.name), "shape": shape, **store.more}
            arm = Arm(store.name, python, store.script, spec, self.folder / f"{store.name}.log")
            self._arms[store.name] = self._stack.enter_context(closing(arm))
            arm.wait_until_ready()
        return self._arms[store.name]

    def write(self, store: Store) -> dict[str, Any]:
        return self.arm(store).ask({"op": "write", "fsync": not store.fsyncs})

    def sweep(self, *stores: Store) -> None:
        """Bring what these stores wrote into the page cache, as whoever goes through it in order does."""
        for store in stores:
            self.arm(store).ask({"op": "sweep"})

    def delete(self, store: Store) -> None:
        """What a store wrote. Its process closes it, so that its caches go too, and stays: it has warmed up."""
        if store not in self.failed:
            self.arm(store).ask({"op": "delete"})

    def measure_writes(self, stores: Sequence[Store], rounds: int, warm_up: bool) -> dict[Store, Writes]:
        """What each store's writing cost, round by round; a first round for warming up is not kept."""
        found = {store: Writes() for store in stores}
        for r in range(rounds + warm_up):
            for store in in_rotation(stores, r):
                if store in self.failed:
                    continue
                try:
                    answer = self.write(store)
                    self.delete(store)
                except RuntimeError as error:
                    self.leave_out(store, error)
                    continue
                if r >= warm_up:
                    found[store].add(answer, self.nbytes(store))
            now = ", ".join(f"{store.name} {of.rate[-1] / 1e6:.0f}" for store, of in found.items() if of.rate)
            self.say(f"write {r + 1} of {rounds + warm_up}, MB/s: {now}")
        return found

    def measure_reads(self, cases: Sequence[Case], kind: Kind, cold: bool, rounds: int) -> dict[Case, Reads]:
        """What each way of reading cost, round by round, all asked for the same."""
        found = {case: Reads() for case in cases}
        samples = min(store.samples(self.samples) for store, _ in cases)
        for r in range(rounds):
            wants = kind.wants(self.size, samples, self._random, cold)
            for store, way in in_rotation(cases, r):
                round = {"op": "read", "wants": wants, "way": way, "cold": cold, "seconds": _SECONDS}
                found[store, way].add(self.arm(store).ask(round))
        now = ", ".join(f"{store.label(way)} {np.median(of.ms):.3g}" for (store, way), of in found.items())
        self.say(f"{'cold' if cold else 'warm'} {kind.name}, ms: {now}")
        return found

    def say(self, what: str) -> None:
        """Progress, with the seconds since this size began."""
        print(f"{self.size.hidden}, {time.perf_counter() - self._start:.0f} s: {what}", file=sys.stderr)

    def leave_out(self, store: Store, error: RuntimeError) -> None:
        """A rival that cannot run is left out, and said to be. Raises the error where it is not the rival's own."""
        if store not in RIVALS.values() or (isinstance(error, ArmError) and error.arm.name != store.name):
            raise error
        self.failed[store] = str(error)
        self.say(f"{store.name} is left out: {error}")
        if isinstance(error, ArmError):
            print(error.arm.log_tail(), file=sys.stderr)
            error.arm.close()
        shutil.rmtree(self.folder / store.name, ignore_errors=True)
