"""A model of a GPU's streams on a CPU: what is launched runs later, in any order that streams and events allow."""

from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from random import Random
from typing import Any, Self
from unittest.mock import patch

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten


class Record:
    """One recording of an event."""

    done = False


class LazyDevice(TorchDispatchMode):
    """Stands in for torch.cuda while it is entered.

    What writes to one of its tensors, or reads one, waits in the current stream. Whenever something is launched, a
    random number of what could run by then runs: with what memory holds at that time, the host's too. For a while one
    stream is served before the others, so that these fall far behind.

    eagerness : chance of each operation to run before it must.
    """

    def __init__(self, seed: int, eagerness: float) -> None:
        super().__init__()
        self._chance = Random(seed)
        self._eagerness = eagerness
        self._memory: set[int] = set()
        self._running = False
        self.streams: list[Stream] = []
        self.current = self._first = Stream(self)

    def own(self, *tensors: torch.Tensor) -> None:
        """From now on these tensors, and all views of them, are in the device's memory."""
        self._memory.update(tensor.untyped_storage().data_ptr() for tensor in tensors)

    def __enter__(self) -> Self:
        self._patches = [
            patch.object(torch.cuda, "Stream", lambda device=None: Stream(self)),
            patch.object(torch.cuda, "Event", lambda **settings: Event(self)),
            patch.object(torch.cuda, "current_stream", lambda device=None: self.current),
            patch.object(torch.cuda, "stream", self._on),
            patch.object(torch.Tensor, "pin_memory", lambda tensor: tensor),
        ]
        for each in self._patches:
            each.start()
        return super().__enter__()

    def __exit__(self, *error: object) -> None:
        for each in self._patches:
            each.stop()
        super().__exit__(*error)

    @contextmanager
    def _on(self, stream: "Stream") -> Iterator[None]:
        before, self.current = self.current, stream
        yield
        self.current = before

    def __torch_dispatch__(self, function: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        tensors = [value for value in tree_flatten((args, kwargs))[0] if isinstance(value, torch.Tensor)]
        if self._running or not any(tensor.untyped_storage().data_ptr() in self._memory for tensor in tensors):
            return function(*args, **kwargs)
        if not function._schema.is_mutable:
            assert all(output.alias_info for output in function._schema.returns), f"{function} makes the host wait"
            return function(*args, **kwargs)
        if function is torch.ops.aten.copy_.default:
            [into, value, asynchronous] = [*args, *kwargs.values(), False][:3]
            assert asynchronous, "a copy makes the host wait"
            args, kwargs = (into, value), {}
        self.current.launch(lambda: function(*args, **kwargs))
        return args[0] if function._schema.returns else None

    def run_until(self, record: Record) -> None:
        while not record.done:
            assert self._run_one(), "the host waits for what can never run"

    def run_some(self) -> None:
        while self._chance.random() < self._eagerness and self._run_one():
            pass

    def _run_one(self) -> bool:
        ready = [stream for stream in self.streams if stream.work and stream.work[0][0]()]
        if not ready:
            return False
        if self._chance.random() < 0.05:
            self._first = self._chance.choice(self.streams)
        _, action = (self._first if self._first in ready else self._chance.choice(ready)).work.popleft()
        self._running = True
        action()
        self._running = False
        return True


class Stream:
    """Runs what is launched one by one."""

    def __init__(self, device: LazyDevice) -> None:
        self.device = device
        self.work: deque[tuple[Callable[[], bool], Callable[[], Any]]] = deque()
        device.streams.append(self)

    def launch(self, action: Callable[[], Any], ready: Callable[[], bool] = lambda: True) -> None:
        self.work.append((ready, action))
        self.device.run_some()

    def wait_event(self, event: "Event") -> None:
        if (record := event.latest) is not None:
            self.launch(lambda: None, lambda: record.done)

    def wait_stream(self, stream: "Stream") -> None:
        event = Event(self.device)
        event.record(stream)
        self.wait_event(event)


class Event:
    """As CUDA's: waiting is for the recording that was the last at that time, and for nothing before the first."""

    def __init__(self, device: LazyDevice) -> None:
        self.device = device
        self.latest: Record | None = None

    def record(self, stream: Stream | None = None) -> None:
        record = self.latest = Record()
        (stream or self.device.current).launch(lambda: setattr(record, "done", True))

    def synchronize(self) -> None:
        if self.latest is not None:
            self.device.run_until(self.latest)
