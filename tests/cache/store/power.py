"""A disk whose power may be cut: what the store asked of it, in order, and what any moment may leave behind.

`Recorder` stands in for the module `os` in `files`: it does each call, and notes what it changed. `Platter` replays
the notes one by one, and lists what the disk may hold if the power goes then. POSIX promises that

- the bytes of a file are there once the file was fsynced, and until then none, some, or zeros in their place;
- a name in a folder is there, or gone, once that folder was fsynced; until then each change of a name may have happened
  or not, whatever happened to the others. A rename is one change, of both names.

So a folder whose own name was never fsynced takes with it whatever was fsynced inside. Real file systems keep more.
"""

import fcntl
import os
import random
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = 0  # the folder that is there from the start


@dataclass(frozen=True, slots=True)
class Entries:
    """Names in a folder changed, in one step. changes : name -> what it stands for now, or None."""

    folder: int
    changes: dict[str, int | None]


@dataclass(frozen=True, slots=True)
class Folder:
    """`node` is a new, empty folder."""

    node: int


@dataclass(frozen=True, slots=True)
class Write:
    """Bytes of a file."""

    node: int
    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Resize:
    """A file is `size` bytes long now; shrink : or is longer already and stays so."""

    node: int
    size: int
    shrink: bool


@dataclass(frozen=True, slots=True)
class Sync:
    """A file, or the names in a folder, were fsynced."""

    node: int


@dataclass(frozen=True, slots=True)
class Acknowledged:
    """The store said that these samples are safe, and at least so many. Both grow."""

    keys: frozenset[str] = frozenset()
    count: int = 0

    def __or__(self, other: "Acknowledged") -> "Acknowledged":
        return Acknowledged(self.keys | other.keys, max(self.count, other.count))


Event = Entries | Folder | Write | Resize | Sync | Acknowledged


class Recorder:
    """The module os, as `files` uses it.

    events : what was changed below `root`, in order.
    count : asked at each change: how many samples the store says are safe.
    """

    def __init__(self, root: Path, count: Callable[[], int] = int) -> None:
        self.root = root
        self.count = count
        self.events: list[Event] = []
        self._names: dict[int, dict[str, int]] = {ROOT: {}}
        self._open: dict[int, tuple[int, int]] = {}  # descriptor -> (node, offset)
        self._nodes = 0
        self._counted = 0
        self._lock = threading.RLock()

    def __getattr__(self, name: str):
        return getattr(os, name)

    def acknowledge(self, keys) -> None:
        with self._lock:
            self._note(Acknowledged(frozenset(keys)))

    def _note(self, event: Event) -> None:
        # Counted before this change is noted: what the store says while it makes a change must hold without it.
        if (count := self.count()) > self._counted:
            self._counted = count
            self.events.append(Acknowledged(count=count))
        self.events.append(event)

    def open(self, path, flags, mode=0o777) -> int:
        with self._lock:
            descriptor = os.open(path, flags, mode)
            folder, name = self._place(path)
            node = self._names[folder].get(name, ROOT) if name else ROOT
            if flags & os.O_CREAT and name not in self._names[folder]:
                node = self._new()
                self._change(folder, {name: node})
            self._open[descriptor] = node, 0
            return descriptor

    def close(self, descriptor) -> None:
        with self._lock:
            self._open.pop(descriptor, None)
            os.close(descriptor)

    def write(self, descriptor, data) -> int:
        with self._lock:
            written = os.write(descriptor, data)
            node, offset = self._open[descriptor]
            if self._appends(descriptor):
                offset = os.fstat(descriptor).st_size - written
            self._note(Write(node, offset, bytes(data[:written])))
            self._open[descriptor] = node, offset + written
            return written

    @staticmethod
    def _appends(descriptor) -> bool:
        return bool(fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_APPEND)

    def posix_fallocate(self, descriptor, offset, size) -> None:
        with self._lock:
            os.posix_fallocate(descriptor, offset, size)
            self._note(Resize(self._open[descriptor][0], offset + size, shrink=False))

    def ftruncate(self, descriptor, size) -> None:
        with self._lock:
            os.ftruncate(descriptor, size)
            self._note(Resize(self._open[descriptor][0], size, shrink=True))

    def fsync(self, descriptor) -> None:
        # Not done: nothing here outlives the test, and thousands of them take long on a real disk.
        with self._lock:
            self._note(Sync(self._open[descriptor][0]))

    def rename(self, source, target) -> None:
        with self._lock:
            os.rename(source, target)
            (folder, old), (other, new) = self._place(source), self._place(target)
            assert folder == other, "a rename into another folder is two changes that no fsync binds together"
            self._change(folder, {old: None, new: self._names[folder][old]})

    def link(self, source, target) -> None:
        with self._lock:
            os.link(source, target)
            (folder, old), (other, new) = self._place(source), self._place(target)
            self._change(other, {new: self._names[folder][old]})

    def unlink(self, path) -> None:
        with self._lock:
            os.unlink(path)
            folder, name = self._place(path)
            self._change(folder, {name: None})

    def mkdir(self, path, mode=0o777) -> None:
        with self._lock:
            os.mkdir(path, mode)
            folder, name = self._place(path)
            node = self._new()
            self._names[node] = {}
            self._note(Folder(node))
            self._change(folder, {name: node})

    def makedirs(self, path, mode=0o777, exist_ok=False) -> None:
        path = Path(path)
        for folder in reversed([path, *path.parents]):
            if not folder.is_dir() or (folder == path and not exist_ok):
                self.mkdir(folder, mode)

    def _new(self) -> int:
        self._nodes += 1
        return self._nodes

    def _place(self, path) -> tuple[int, str]:
        """(folder's node, name in it), or (ROOT, "") for the root."""
        parts = Path(path).relative_to(self.root).parts
        folder = ROOT
        for name in parts[:-1]:
            folder = self._names[folder][name]
        return folder, parts[-1] if parts else ""

    def _change(self, folder: int, changes: dict[str, int | None]) -> None:
        for name, node in changes.items():
            if node is None:
                del self._names[folder][name]
            else:
                self._names[folder][name] = node
        self._note(Entries(folder, changes))


# What may be left of bytes that were not fsynced: none of them, all, the first half, or zeros where blocks were reserved.
LOST, WHOLE, TORN, ZEROS = "lost", "whole", "torn", "zeros"
LEFT = (LOST, WHOLE, TORN, ZEROS)

# A tree of what a disk holds: path -> bytes of a file, or None for a folder.
State = dict[str, bytes | None]


class Platter:
    """What a disk holds, and what it was told and may forget."""

    def __init__(self) -> None:
        self.acknowledged = Acknowledged()
        self._durable_names: dict[int, dict[str, int]] = {ROOT: {}}
        self._pending: list[Entries] = []
        self._durable: dict[int, bytes] = {}
        self._contents: dict[int, bytearray] = {}

    def apply(self, event: Event) -> None:
        match event:
            case Entries(_, changes):
                self._pending.append(event)
                for node in changes.values():
                    if node is not None and node not in self._durable_names:
                        self._contents.setdefault(node, bytearray())
            case Folder(node):
                self._durable_names[node] = {}
            case Write(node, offset, data):
                contents = self._contents[node]
                contents.extend(bytes(max(0, offset + len(data) - len(contents))))
                contents[offset : offset + len(data)] = data
            case Resize(node, size, shrink):
                contents = self._contents[node]
                if shrink:
                    del contents[size:]
                contents.extend(bytes(max(0, size - len(contents))))
            case Sync(node) if node in self._durable_names:
                for entries in self._pending:
                    if entries.folder == node:
                        _change(self._durable_names, entries)
                self._pending = [entries for entries in self._pending if entries.folder != node]
            case Sync(node):
                self._durable[node] = bytes(self._contents[node])
            case Acknowledged():
                self.acknowledged |= event

    def states(self, chance: random.Random, samples: int) -> Iterator[State]:
        """What the disk may hold: every change of names lost, or done, or each alone, and some mixtures of them.

        samples : how many mixtures.
        """
        yield self._state([], lambda node: LOST)
        for left in LEFT:
            yield self._state(self._pending, lambda node, left=left: left)
        for entries in self._pending:
            yield self._state([entries], lambda node: LOST)
            yield self._state([other for other in self._pending if other is not entries], lambda node: ZEROS)
        for _ in range(samples):
            kept = [entries for entries in self._pending if chance.random() < 0.5]
            yield self._state(kept, lambda node: chance.choice(LEFT))

    def whole(self) -> State:
        """What a process sees, and the disk has after a shutdown."""
        return self._state(self._pending, lambda node: WHOLE)

    def _state(self, kept: list[Entries], left) -> State:
        names = {folder: dict(entries) for folder, entries in self._durable_names.items()}
        for entries in kept:
            _change(names, entries)
        state: State = {}

        def walk(folder: int, path: str) -> None:
            for name, node in sorted(names[folder].items()):
                if node in names:
                    state[path + name] = None
                    walk(node, f"{path}{name}/")
                else:
                    state[path + name] = self._bytes(node, left)

        walk(ROOT, "")
        return state

    def _bytes(self, node: int, left) -> bytes:
        durable, contents = self._durable.get(node, b""), bytes(self._contents[node])
        if durable == contents:
            return contents
        match left(node):
            case "lost":
                return durable
            case "whole":
                return contents
            case "torn":
                return contents[: len(contents) // 2]
            case "zeros":
                return bytes(len(contents))


def _change(names: dict[int, dict[str, int]], entries: Entries) -> None:
    for name, node in entries.changes.items():
        if node is None:
            names[entries.folder].pop(name, None)
        else:
            names[entries.folder][name] = node


def lay_out(state: State, folder: Path) -> None:
    """Make the files of a state in a folder."""
    folder.mkdir()
    for name, data in state.items():
        if data is None:
            (folder / name).mkdir()
        else:
            (folder / name).write_bytes(data)
