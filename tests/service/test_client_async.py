"""The asynchronous client: the same as the blocking one, beside each other in one event loop."""

import asyncio
import functools
import time

import numpy as np
import pytest

import hiddenlake
from hiddenlake.cache.client import asking, connection
from hiddenlake.cache.errors import BadInputError, StoreError, UnknownNameError
from hiddenlake.cache.testing import small

from .conftest import SAMPLES, add_key, same
from .proxy import answer, proxy
from .test_client import SEEN, same_dataset, settle, write_some


def asynchronous(test):
    """A test that is a coroutine."""

    @functools.wraps(test)
    def run(*arguments, **named):
        asyncio.run(asyncio.wait_for(test(*arguments, **named), 120))

    return run


@pytest.fixture
def connect(server, key):
    return lambda: hiddenlake.connect_async(server.url, key)


@pytest.mark.parametrize("name", SEEN)
@asynchronous
async def test_a_capture_is_what_it_is_locally(connect, local, name):
    expected = local.capture(name)
    async with connect() as lake:
        found = await lake.capture(name)
        assert (found.identity, found.coverage, found.keys) == (expected.identity, expected.coverage, expected.keys)
        assert len(found) == SAMPLES and (await found.samples()).equals(expected.samples())
        assert (await found.labels()).keys() == expected.labels().keys()
        c = expected.coverage
        if c.positions:
            for asked in [
                ("mlp_act",),
                ("mlp_act", 3, "-1"),
                ("embed", None, ["last_q"], small.key(2)),
                ("mlp_act", [3, 0], -1, 4),
            ]:
                for dtype in ("stored", "float32"):
                    same(await found.read(*asked, dtype=dtype), expected.read(*asked, dtype=dtype))
            same_dataset(await found.dataset(), expected.dataset())
        if c.tokens:
            for asked in [("mlp_act",), ("embed", None, [3, 1], slice(-2, None)), ("resid_post", 3, small.key(5))]:
                one, other = await found.read_tokens(*asked), expected.read_tokens(*asked)
                for field in ("values", "offsets", "token_index"):
                    same(getattr(one, field), getattr(other, field))
            same_dataset(await found.dataset("stored", tokens=True), expected.dataset("stored", tokens=True))


@asynchronous
async def test_the_list_is_the_blocking_one(connect, server, key):
    async with connect() as lake:
        with hiddenlake.connect(server.url, key) as blocking:
            assert await lake.captures() == blocking.captures()


@asynchronous
async def test_many_reads_beside_each_other(connect, local):
    expected = local.capture("exact").read("mlp_act")
    async with connect() as lake:
        capture = await lake.capture("exact")
        rows = [i % SAMPLES for i in range(100)]
        for row, found in zip(
            rows, await asyncio.gather(*(capture.read("mlp_act", samples=i) for i in rows)), strict=True
        ):
            same(found, expected[:, :, row])


def test_one_lake_in_several_loops(connect, local):
    """As in a notebook that calls asyncio.run again and again."""
    lake = connect()

    async def work():
        capture = await lake.capture("cells")
        return await capture.read("mlp_act")

    for _ in range(2):
        same(asyncio.run(work()), local.capture("cells").read("mlp_act"))


@asynchronous
async def test_errors_are_the_same(connect, server):
    async with connect() as lake:
        with pytest.raises(StoreError, match="no such capture"):
            await lake.capture("nothing")
        capture = await lake.capture("cells")
        with pytest.raises(UnknownNameError, match="it has 0, 3"):
            await capture.read("mlp_act", 1)
        with pytest.raises(UnknownNameError, match="has no tokens"):
            await capture.read_tokens("mlp_act")
    async with hiddenlake.connect_async(server.url, "hl_wrong") as lake:
        with pytest.raises(StoreError, match="keys add"):
            await lake.captures()
    with pytest.raises(BadInputError, match="use connect"):
        hiddenlake.connect_async("some/folder", "x")


@asynchronous
async def test_waiting_holds_nobody_up(server, key, local, monkeypatch):
    """While one read waits to be let in, another coroutine goes on."""
    monkeypatch.setattr(asking, "FIRST_SECONDS", 0.001)
    monkeypatch.setattr(connection.time, "sleep", None)
    with proxy(server.url) as between:
        async with hiddenlake.connect_async(between.url, key) as lake:
            capture = await lake.capture("exact")
            await lake.connection.close()
            between.faults = [1200, answer(429, retry_after="1"), 300]
            start, turns = time.monotonic(), 0
            read = asyncio.create_task(capture.read("mlp_act"))
            while not read.done():
                turns += 1
                await asyncio.sleep(0.01)
            assert turns > 10 and time.monotonic() - start > 1
            same(await read, local.capture("exact").read("mlp_act"))
            await lake.connection.close()
            between.faults = [1200] * asking.ATTEMPTS
            with pytest.raises(StoreError, match="no whole answer"):
                await capture.read("mlp_act")


@asynchronous
async def test_a_read_that_is_cancelled_leaves_the_next_one_right(connect, local):
    """Its connection is not used again with half an answer in it."""
    expected = local.capture("exact").read("mlp_act")
    async with connect() as lake:
        capture = await lake.capture("exact")
        for i in range(30):
            task = asyncio.create_task(capture.read("mlp_act"))
            await asyncio.sleep(i * 3e-4)
            task.cancel()
            try:
                same(await task, expected)
            except asyncio.CancelledError:
                pass
            row = i % SAMPLES
            same(await capture.read("mlp_act", samples=row), expected[:, :, row])


def test_what_has_grown_is_read_as_it_was(tmp_path, serve):
    folder = tmp_path / "lake" / "growing"
    write_some(folder, range(0, SAMPLES, 2))
    one = serve(tmp_path / "lake", key=add_key(tmp_path / "lake", "x"))
    here = hiddenlake.open_capture(folder)
    before, tokens = here.read("mlp_act"), here.read_tokens("mlp_act").values

    async def work():
        async with hiddenlake.connect_async(one.url, one.key) as lake:
            capture = await lake.capture("growing")
            write_some(folder, range(1, SAMPLES, 2))
            with hiddenlake.connect(one.url, one.key) as blocking:
                settle(one, blocking.capture("growing"), SAMPLES)
            same(await capture.read("mlp_act"), before)
            same((await capture.read_tokens("mlp_act")).values, tokens)
            await capture.refresh()
            assert len(capture) == SAMPLES
            return await capture.read("mlp_act")

    here.refresh()
    found = asyncio.run(work())
    here.refresh()
    assert not np.array_equal(found[:, :, : before.shape[2]], before)
    same(found, here.read("mlp_act"))
