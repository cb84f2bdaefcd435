"""Lakes: in a folder or a bucket, or behind a service, with one interface."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol, Self

from hiddenlake.cache.client.connection import Connection, is_url
from hiddenlake.cache.client.moment import ask_moment
from hiddenlake.cache.client.remote import RemoteCapture, ask_captures
from hiddenlake.cache.client.resolving import Input, Resolved, ask_resolve, resolve_body
from hiddenlake.cache.errors import BadInputError, StoreError
from hiddenlake.cache.store.backend import open_backend
from hiddenlake.cache.store.catalog import captures_of, list_captures
from hiddenlake.cache.store.readable import Readable
from hiddenlake.cache.store.reader import Capture


class Lake(Protocol):
    """What `connect` gives, wherever the lake is. It may be closed, and be the subject of `with`."""

    def captures(self) -> list[dict[str, Any]]:
        """One entry a capture, by name: name, model, task, sites, layers, positions, tokens, dtype, codec, samples,
        planned, bytes and failures; of one that cannot be opened name and `error`. Raises StoreError."""

    def capture(self, name: str) -> Readable:
        """A capture, as of now. Raises StoreError where there is none of this name, or none for this key."""

    def close(self) -> None: ...

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...


class LocalLake:
    """A lake in a folder or a bucket."""

    def __init__(self, where: str | Path) -> None:
        self.place = open_backend(where)

    def __repr__(self) -> str:
        return f"<hiddenlake lake {self.place}>"

    def captures(self) -> list[dict[str, Any]]:
        return [{key: value for key, value in entry.items() if key != "path"} for entry in list_captures(self.place)]

    def capture(self, name: str) -> Capture:
        found = {place.name: place for place in captures_of(self.place)}
        if name not in found:
            raise StoreError(f"{self.place} has no capture {name!r}: it has {', '.join(found) or 'none'}")
        return Capture(found[name])

    def close(self) -> None:
        pass

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass


class RemoteLake:
    """A lake behind a service. May be used from several threads."""

    def __init__(self, connection: Connection) -> None:
        self.connection = connection

    def __repr__(self) -> str:
        return f"<hiddenlake lake {self.connection.url}>"

    def captures(self) -> list[dict[str, Any]]:
        return self.connection.run(ask_captures())

    def capture(self, name: str) -> RemoteCapture:
        return RemoteCapture(self.connection.run(ask_moment(self.connection, name)))

    def resolve(
        self,
        inputs: Iterable[Input],
        *,
        model: str | None = None,
        sites: Iterable[str] | None = None,
        layers: Iterable[int] | None = None,
        positions: Iterable[str | int] | None = None,
        generation: Mapping[str, Any] | None = None,
        only_if_cached: bool = False,
        patience: float = 3600.0,
    ) -> Resolved:
        """Where the activations of these prompts lie; what is not there is computed first, and waited for.

        inputs : texts, lists of chat messages, or dicts as the service takes them (`token_ids`, `answer`, ...).
        model : name or id; may be left out where there is one.
        sites, layers : all that the model's workers tap, by default.  positions : last_q, first_answer and -1 by default.
        generation : max_new_tokens, temperature, top_p, top_k, seed, stop, samples; None where nothing is generated.
        only_if_cached : compute nothing: what is not there is an UnknownNameError.
        patience : seconds.

        Raises BadInputError, UnknownNameError, StoreError.
        """
        body = resolve_body(
            inputs, model=model, sites=sites, layers=layers, positions=positions, generation=generation,
            only_if_cached=only_if_cached,
        )  # fmt: skip
        return self.connection.run(ask_resolve(body, patience))

    def close(self) -> None:
        """Let go of the connections. What is used later makes new ones."""
        self.connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def connect(where: str | Path, key: str | None = None) -> Lake:
    """A lake: `connect("path/to/lake")`, `connect("s3://bucket/lake")`, or `connect("http://host:8765", key=...)`.

    where : a folder or a bucket, or the address of a `hiddenlake serve`.
    key : for a service; by default that of the environment, HIDDENLAKE_KEY. It never belongs into the address.

    Raises BadInputError without a key, or for one where none is needed; StoreError where httpx is missing.
    """
    if is_url(where):
        return RemoteLake(Connection(str(where), key))
    if key is not None:
        raise BadInputError(f"{where} is no address of a service, and a key was given: leave it out")
    return LocalLake(where)
