"""What other processes do in conformance tests. They are spawned, so that they share nothing but the backend."""

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from typing import Any

from hiddenlake.cache.store.backend import Backend

_CONTEXT = multiprocessing.get_context("spawn")

# A process starts in a second or two; more is a hang.
_SECONDS = 120


@contextmanager
def running(count: int, work: Callable[..., None], *arguments: Any) -> Iterator[list[tuple[BaseProcess, Connection]]]:
    """Processes that run `work(connection, *arguments)`, all started when each of them has said that it is ready."""
    started = []
    try:
        for _ in range(count):
            here, there = _CONTEXT.Pipe()
            process = _CONTEXT.Process(target=work, args=(there, *arguments), daemon=True)
            process.start()
            there.close()
            started.append((process, here))
        for _, connection in started:
            assert receive(connection) == "ready"
        for _, connection in started:
            connection.send("go")
        yield started
    finally:
        for process, connection in started:
            process.kill()
            process.join()
            connection.close()


def receive(connection: Connection) -> Any:
    """What a process says next."""
    assert connection.poll(_SECONDS), f"another process has said nothing for {_SECONDS} s"
    return connection.recv()


def _ready(connection: Connection) -> None:
    connection.send("ready")
    connection.recv()


def create(connection: Connection, place: Backend, name: str) -> None:
    """Create one file, as all the others do; says the bytes, and whether it did."""
    data = f"process {os.getpid()}".encode()
    _ready(connection)
    connection.send((data, place.create(name, data)))


def count_up(connection: Connection, place: Backend, name: str, times: int) -> None:
    """Add one to the number in a file, under the lock."""
    _ready(connection)
    for _ in range(times):
        with place.lock():
            place.write(name, str(int(place.read(name)) + 1).encode())
    connection.send("done")


def join_and_stay(connection: Connection, place: Backend, writer: str) -> None:
    """Become a writer, append, and live until killed."""
    _ready(connection)
    with place.lock():
        member = place.join(writer)
        member.append(b"[1, 2]")
        member.append(b"[3]")
    connection.send("joined")
    connection.recv()


def write_some(connection: Connection, place: Backend, samples: int, kind: str) -> None:
    """Write samples of the small capture until none is left; says how many it committed."""
    from hiddenlake.cache.testing import small

    _ready(connection)
    connection.send(small.write(place, samples, kind).published)


def write_and_die(connection: Connection, place: Backend, samples: int, kind: str) -> None:
    """Commit a shard, fill another one by half, say who it was, and die of it."""
    from hiddenlake.cache.testing import small

    _ready(connection)
    writer = small.open_small(place, samples, kind)
    writer.reserve([small.key(i) for i in range(samples)], samples)
    for i in range(small.SHARD_SAMPLES):
        small.add(writer, i)
    writer.flush()
    small.add(writer, small.SHARD_SAMPLES)
    (name,) = place.writers()
    connection.send(name)
    os._exit(1)
