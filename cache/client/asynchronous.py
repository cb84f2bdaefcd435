"""Asynchronous: the same lake and captures for coroutines."""

import asyncio
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from hiddenlake.cache.client.connection import AsyncConnection, Connection, is_url
from hiddenlake.cache.client.moment import RemoteMoment, ask_moment
from hiddenlake.cache.client.remote import RemoteCapture, ask_captures, ask_labels
from hiddenlake.cache.client.resolving import Input, Resolved, ask_resolve, resolve_body
from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.store.coverage import Coverage
from hiddenlake.cache.store.moment import Dtype
from hiddenlake.cache.store.readable import TokenRows
from hiddenlake.cache.store.tables import SAMPLE_COLUMNS

if TYPE_CHECKING:
    import pyarrow
    import xarray


class AsyncCapture:
    """As `RemoteCapture`; what asks the service is a coroutine. Reads may run beside each other, in one event loop."""

    def __init__(self, connection: AsyncConnection, moment: RemoteMoment) -> None:
        self._connection, self._blocking = connection, RemoteCapture(moment)

    def __repr__(self) -> str:
        return repr(self._blocking)

    def __len__(self) -> int:
        return len(self._blocking)

    @property
    def path(self) -> str:
        return self._blocking.path

    @property
    def identity(self) -> dict[str, Any]:
        return self._blocking.identity

    @property
    def coverage(self) -> Coverage:
        return self._blocking.coverage

    @property
    def keys(self) -> list[str]:
        return self._blocking.keys

    async def refresh(self) -> None:
        moment = self._blocking.snapshot
        self._blocking.snapshot = await self._connection.run(ask_moment(moment.connection, moment.capture))

    async def read(
        self,
        site: str,
        layer: int | Iterable[int] | None = None,
        position: str | int | Iterable[str | int] | None = None,
        samples: str | int | Iterable[str | int] | None = None,
        dtype: Dtype = "stored",
        check: bool = True,
    ) -> np.ndarray:
        """As `Readable.read`."""
        moment = self._blocking.snapshot
        (layers, positions, rows), (one_layer, one_position, one_sample) = self._blocking.axes(
            site, layer, position, samples, dtype, moment
        )
        block = await self._connection.run(moment.ask_cells(site, [*layers, positions], rows, dtype, check))
        return block[tuple(0 if one else slice(None) for one in (*one_layer, one_position, one_sample))]

    async def read_tokens(
        self,
        site: str,
        layer: int | Iterable[int] | None = None,
        samples: str | int | Iterable[str | int] | None = None,
        tokens: slice | None = None,
        dtype: Dtype = "stored",
        check: bool = True,
    ) -> TokenRows:
        """As `Readable.read_tokens`."""
        moment = self._blocking.snapshot
        layers, one_layer, rows, offsets = self._blocking.token_axes(site, layer, samples, tokens, dtype, moment)
        block = await self._connection.run(moment.ask_tokens(site, layers, rows, dtype, check))
        return TokenRows(
            block[tuple(0 if one else slice(None) for one in one_layer)], offsets, moment.token_index[rows]
        )

    async def samples(self) -> "pyarrow.Table":
        """As `Readable.samples`."""
        return await self._connection.run(self._blocking.snapshot.ask_samples(SAMPLE_COLUMNS))

    async def labels(self) -> dict[str, "pyarrow.Table"]:
        """As `Readable.labels`."""
        return await self._connection.run(ask_labels(self._connection.url, self._blocking.snapshot.capture))

    async def dataset(self, dtype: Dtype = "float32", *, tokens: bool = False) -> "xarray.Dataset":
        """As `Readable.dataset`. xarray knows no waiting: its arrays block when they are read; read them in a thread."""
        return await asyncio.to_thread(self._blocking.dataset, dtype, tokens=tokens)


class AsyncLake:
    """As `RemoteLake`, for coroutines of one event loop. `async with` closes it."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self.connection = AsyncConnection(url, key)
        self._blocking = Connection(url, key)

    def __repr__(self) -> str:
        return f"<hiddenlake lake {self.connection.url}>"

    async def captures(self) -> list[dict[str, Any]]:
        """As `Lake.captures`."""
        return await self.connection.run(ask_captures())

    async def capture(self, name: str) -> AsyncCapture:
        """As `Lake.capture`."""
        return AsyncCapture(self.connection, await self.connection.run(ask_moment(self._blocking, name)))

    async def resolve(self, inputs: Iterable[Input], *, patience: float = 3600.0, **asked: Any) -> Resolved:
        """As `RemoteLake.resolve`."""
        return await self.connection.run(ask_resolve(resolve_body(inputs, **asked), patience))

    async def close(self) -> None:
        await self.connection.close()
        self._blocking.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()


def connect_async(url: str, key: str | None = None) -> AsyncLake:
    """A lake behind a service, for coroutines: `async with hiddenlake.connect_async("http://host:8765") as lake`.

    url, key : as in `connect`.

    Raises BadInputError without a key, and for a folder; StoreError where httpx is missing.
    """
    if not is_url(url):
        raise BadInputError(f"{url} is no address of a service: for a lake in a folder use connect")
    return AsyncLake(url, key)
