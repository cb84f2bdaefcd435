"""A moment of a capture behind a service: which samples it held, and how their values are asked for."""

import itertools
import json
from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from hiddenlake.cache.client.asking import Ask, Collect, Fill, Refused, Steps, ask, ask_plainly
from hiddenlake.cache.client.connection import Connection
from hiddenlake.cache.client.paths import capture_path
from hiddenlake.cache.errors import CorruptError, StoreError, UnknownNameError
from hiddenlake.cache.identity import digest
from hiddenlake.cache.service import wire
from hiddenlake.cache.store.blocks import blocks
from hiddenlake.cache.store.coverage import DTYPES, Coverage
from hiddenlake.cache.store.moment import Dtype, Moment
from hiddenlake.cache.store.snapshot import commits_name
from hiddenlake.cache.store.tables import SAMPLE_COLUMNS, decode, sample_schema

if TYPE_CHECKING:
    import pyarrow

# Asked for at once: what is lost, and asked for again, when a connection breaks.
PART_BYTES = 64 << 20

# Of samples/, what must be known before anything can be asked for.
_INDEX = ("key", "prompt_length")


class RemoteMoment(Moment):
    """What a service said of a capture at one time.

    Its reads name samples by their rows as long as the capture is what it was, and by their keys when it has grown since:
    then the commits that hold them must be those that held them at this moment. So a read gives what was there, or an
    error, and never other samples.

    index : (sample,) the columns of _INDEX, `commit`, and `stored_tokens` where there are tokens.
    """

    def __init__(self, connection: Connection, capture: str, facts: dict[str, Any], index: "pyarrow.Table") -> None:
        self.connection, self.capture, self.index = connection, capture, index
        try:
            self.name: str = facts["snapshot"]
            self.identity: dict[str, Any] = facts["identity"]
            self.coverage = Coverage.from_json(facts["coverage"])
            self._limits: dict[str, int] = {name: int(facts["limits"][name]) for name in ("read", "body")}
            self.keys = np.array(index["key"].to_pylist(), dtype=object)
            commit = index[wire.COMMIT].combine_chunks()
            self._commits, self._commit = commit.dictionary.to_pylist(), commit.indices.to_numpy()
            none = np.zeros(len(index), np.int64)
            self.token_length = none if self.coverage.tokens is None else index[wire.STORED_TOKENS].to_numpy()
            if facts["samples"] != len(index):
                raise ValueError(f"{len(index)} rows of {facts['samples']}")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise StoreError(
                f"what the service at {connection.url} says of {capture} is not understood ({error!r}): install the "
                f"hiddenlake here that runs there"
            ) from error
        # Whether the capture was seen to hold other samples than at this moment.
        self._over = False

    def __str__(self) -> str:
        return f"{self.connection.url}{capture_path(self.capture)}"

    @cached_property
    def token_first(self) -> np.ndarray:
        if self.coverage.tokens.part == "all_generated":
            return self.index["prompt_length"].to_numpy()
        return np.zeros(len(self.keys), np.int64)

    def samples(self, columns: Sequence[str] = SAMPLE_COLUMNS) -> "pyarrow.Table":
        return self.connection.run(self.ask_samples(columns))

    def read_cells(
        self,
        site: str,
        outer: Sequence[Sequence[int]],
        rows: np.ndarray,
        dtype: Dtype,
        check: bool = True,
        out: np.ndarray | None = None,
        single: bool = False,
    ) -> np.ndarray:
        return self.connection.run(self.ask_cells(site, outer, rows, dtype, check, out))

    def read_tokens(
        self,
        site: str,
        outer: Sequence[Sequence[int]],
        rows: np.ndarray,
        dtype: Dtype,
        check: bool = True,
        out: np.ndarray | None = None,
        single: bool = False,
    ) -> np.ndarray:
        return self.connection.run(self.ask_tokens(site, outer, rows, dtype, check, out))

    def fingerprint(self, site: str) -> str:
        return digest([site, self.commits_name(np.arange(len(self.keys)))])

    def commits_name(self, rows: np.ndarray) -> str:
        """As `Snapshot.commits_name`."""
        return commits_name(self._commits[i] for i in np.unique(self._commit[rows]).tolist())

    def ask_samples(self, columns: Sequence[str]) -> Steps:
        """Steps of `samples`."""
        import pyarrow as pa
        import pyarrow.compute as pc

        facts, table = yield from ask_table(self.connection.url, self.capture, list(dict.fromkeys(["key", *columns])))
        if facts["snapshot"] != self.name:
            # Its samples are among those of now, unless they are others under the same keys.
            rows = pc.index_in(pa.array(self.keys.tolist(), pa.string()), table["key"].combine_chunks())
            if rows.null_count:
                raise self._gone()
            table = table.take(rows)
        commits = table[wire.COMMIT].cast(pa.string()).to_pylist()
        if table["key"].to_pylist() != self.keys.tolist() or commits != [self._commits[i] for i in self._commit]:
            raise self._gone()
        return table.select(list(columns))

    def ask_cells(
        self,
        site: str,
        outer: Sequence[Sequence[int]],
        rows: np.ndarray,
        dtype: Dtype,
        check: bool,
        out: np.ndarray | None = None,
    ) -> Steps:
        """Steps of `read_cells`."""
        c = self.coverage
        out, row_bytes = self._memory(site, outer, rows, dtype, out)
        memory, at = memoryview(out.reshape(-1).view(np.uint8)), 0
        every = len(rows) == len(self.keys) and bool((rows == np.arange(len(rows))).all())
        for (*layers, positions), part in blocks(outer, rows, row_bytes, self._most_bytes, self._most_names):
            request = {
                **self._axis(layers),
                "positions": [c.positions[i] for i in positions],
                **self._how(site, dtype, check),
            }
            shape = (*map(len, layers), len(positions), len(part), out.shape[-1])
            stop = at + row_bytes * int(np.prod(shape[:-1], dtype=np.int64))
            named = None if every and len(part) == len(rows) else part
            yield from self._fill(request, named, part, shape, memory[at:stop], out.dtype)
            at = stop
        return out

    def ask_tokens(
        self,
        site: str,
        outer: Sequence[Sequence[int]],
        rows: np.ndarray,
        dtype: Dtype,
        check: bool,
        out: np.ndarray | None = None,
    ) -> Steps:
        """Steps of `read_tokens`."""
        out, row_bytes = self._memory(site, outer, rows, dtype, out)
        memory, at = memoryview(out.reshape(-1).view(np.uint8)), 0
        for layers, part in blocks(outer, rows, row_bytes, self._most_bytes, self._most_names):
            if not len(part):
                continue
            sample = np.searchsorted(self.token_offsets, part, side="right") - 1
            runs = [0, *(np.flatnonzero(np.diff(sample)) + 1).tolist(), len(part)]
            index = self.token_index[part].tolist()
            request = {
                **self._axis(layers),
                "tokens": [index[start:stop] for start, stop in itertools.pairwise(runs)],
                **self._how(site, dtype, check),
            }
            shape = (*map(len, layers), len(part), out.shape[-1])
            stop = at + row_bytes * int(np.prod(shape[:-1], dtype=np.int64))
            named = sample[runs[:-1]]
            yield from self._fill(request, named, named, shape, memory[at:stop], out.dtype)
            at = stop
        return out

    def _fill(
        self,
        request: dict[str, Any],
        named: np.ndarray | None,
        rows: np.ndarray,
        shape: tuple[int, ...],
        memory: memoryview,
        kind: np.dtype,
    ) -> Steps:
        """named : samples that the request names, by row; None for all.  rows : those that are read."""
        if not len(memory):
            return
        expected = {wire.SHAPE: ",".join(map(str, shape)), wire.DTYPE: kind.name}
        if not self._over:
            body = request | {"samples": None if named is None else named.tolist(), "snapshot": self.name}
            try:
                yield from ask(_read(body, Fill(memory, expected | {wire.SNAPSHOT: self.name})))
                return
            except Refused as refused:
                if refused.kind != wire.OTHER_SNAPSHOT:
                    raise refused.error from None
                self._over = True
        body = request | {"samples": self.keys[rows].tolist()}
        try:
            yield from ask_plainly(_read(body, Fill(memory, expected | {wire.COMMITS: self.commits_name(rows)})))
        except UnknownNameError as error:
            raise self._gone() from error

    def _gone(self) -> StoreError:
        return StoreError(
            f"{self} no longer holds the samples that it held, or holds them as they were captured again: refresh() it"
        )

    def _memory(
        self, site: str, outer: Sequence[Sequence[int]], rows: np.ndarray, dtype: Dtype, out: np.ndarray | None
    ) -> tuple[np.ndarray, int]:
        """(where values go, bytes of a row)."""
        shape = (*map(len, outer), len(rows), self.coverage.widths[site])
        kind = np.dtype(np.float32) if dtype == "float32" else DTYPES[self.coverage.dtype][1]
        if out is None:
            out = np.empty(shape, kind)
        elif out.shape != shape or out.dtype != kind or not out.flags.c_contiguous:
            raise ValueError(f"out is {out.dtype} {out.shape}: expected {kind} {shape}, C-contiguous")
        return out, shape[-1] * kind.itemsize

    def _axis(self, layers: list[np.ndarray]) -> dict[str, Any]:
        return {"layers": [self.coverage.layers[i] for i in layers[0]] if layers else None}

    def _how(self, site: str, dtype: Dtype, check: bool) -> dict[str, Any]:
        return {"capture": self.capture, "site": site, "dtype": dtype, "check": check, "format": "raw"}

    @property
    def _most_bytes(self) -> int:
        return min(PART_BYTES, self._limits["read"])

    @cached_property
    def _most_names(self) -> int:
        """Rows that one request can name, by keys and tokens, within the body that the service takes."""
        longest = max((len(json.dumps(key)) for key in self.keys), default=0)
        return max(1, min(wire.MOST_NAMES, (self._limits["body"] - 4096) // (longest + 16)))


def ask_moment(connection: Connection, capture: str) -> Steps:
    """What a capture holds now. Returns a RemoteMoment. Raises StoreError."""
    facts, index = yield from ask_table(connection.url, capture, list(_INDEX))
    return RemoteMoment(connection, capture, facts, index)


def ask_table(url: str, capture: str, columns: list[str]) -> Steps:
    """(facts, table) of all samples as of now: these columns and what the service says of them. Raises StoreError."""
    path = f"{capture_path(capture)}/samples.parquet"
    raw = yield from ask_plainly(Ask("GET", path, {"columns": columns}, sink=Collect(None)))
    table = read_parquet(raw, f"{url}{path}")
    try:
        facts = json.loads((table.schema.metadata or {})[wire.METADATA])
        version = facts["version"]
    except (KeyError, ValueError, TypeError) as error:
        raise StoreError(f"{url} gave a table that says nothing of its capture: is it `hiddenlake serve`?") from error
    if version != wire.VERSION:
        raise StoreError(
            f"{url} speaks version {version!r} of the service, this hiddenlake version {wire.VERSION}: install the one "
            f"here that runs there"
        )
    table = table.replace_schema_metadata(None)
    for number, name in enumerate(columns):
        table = table.set_column(
            number, sample_schema().field(name), table[name].cast(sample_schema().field(name).type)
        )
    return facts, table


def read_parquet(raw: bytes, what: str) -> "pyarrow.Table":
    """Raises StoreError, naming what was asked for."""
    try:
        return decode(raw, what)
    except CorruptError as error:
        raise StoreError(f"{error}: is that the address of `hiddenlake serve`?") from error


def _read(body: dict[str, Any], sink: Fill) -> Ask:
    return Ask("POST", "/v1/activations:read", body=body, sink=sink)
