"""Findings: the grids and probes that lie beside a lake's captures, by name."""

import errno
import json
import math
import os
import re
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterator
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from hiddenlake.cache.errors import HiddenlakeError, StoreError
from hiddenlake.cache.identity import digest
from hiddenlake.cache.service.keys import Caller
from hiddenlake.cache.service.lake import NAME
from hiddenlake.cache.service.logs import event
from hiddenlake.cache.service.problems import no_such
from hiddenlake.cache.store.files import trouble
from hiddenlake.cache.store.local import LocalBackend
from hiddenlake.cache.store.reader import Capture

if TYPE_CHECKING:
    import xarray as xr

    from hiddenlake.probing.probe import Probe

Found = TypeVar("Found")

# What is larger is no grid or probe of ours: 100 layers x 100 positions x 60 metrics are 5 MB, a probe's header less than 1.
_MOST_METADATA = 16 << 20
_MOST_GRID = 256 << 20
_MOST_PROBE = 16 << 20

# How many of each are remembered: a grid may be large, and what it says of itself is asked for with every listing.
_HELD = {"grid": 16, "attrs": 1024, "probe": 1024}

# A file of an array in a grid.
_FILE = re.compile(r"([A-Za-z_][A-Za-z0-9_]{0,127})/(?:zarr\.json|c(?:/[0-9]{1,9}){0,8})")

# What is no file: nothing, a folder, a pipe, a link.
_NO_FILE = frozenset({errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EINVAL, errno.ELOOP})

# Those that save_grid makes arrays with, and the harmless rest of Zarr's own.
_CODECS = frozenset({"bytes", "vlen-utf8", "zstd", "gzip", "blosc", "crc32c", "transpose", "sharding_indexed"})


@dataclass(frozen=True, slots=True)
class StoredGrid:
    """A saved grid, not opened yet. version : is another one when the grid was replaced.  attrs : the grid's own."""

    name: str
    path: Path
    version: tuple[int, int, int]
    attrs: dict[str, Any]

    @property
    def edition(self) -> str:
        """Names its version to others."""
        return digest(list(self.version))[:16]

    def read(self, path: str) -> bytes:
        """A file of its Zarr group. Raises Problem (404) for what is no file of it, or of another version by now."""
        try:
            metadata = _metadata(self.path)
            if path == "zarr.json":
                # Where the capture lay is the server's business.
                metadata.get("attributes", {}).pop("capture", None)
                raw = json.dumps(metadata).encode()
            elif (file := _FILE.fullmatch(path)) and file[1] in _arrays(self.path, metadata):
                raw = LocalBackend(self.path).read(path, _MOST_GRID)
            else:
                raise FileNotFoundError(errno.ENOENT, "no file of a grid")
            if _version(self.path / "zarr.json") == self.version:  # afterwards: what was read is of this version
                return raw
        except OSError as error:
            if error.errno not in _NO_FILE:
                raise trouble(f"{self.path.name}/{path}", error) from error
        raise no_such(
            "file of this grid", "the list of grids says where each is now; a chunk that is not there is a hole"
        )


def at_one_moment(capture: Capture) -> Capture:
    """As it is now: what is committed while a request is answered does not move its samples to other rows."""
    return copy(capture)


class Findings:
    """Grids are `*.zarr` in LAKE/grids, probes `*.safetensors` in LAKE/probes; where there is no such folder, in the ones
    beside the lake, where `hiddenlake demo` and `paper` put them. May be used from several threads.

    A grid is of the captures that have the value identity it was fitted on: who may not see those does not see it. A probe
    is of everybody, or of the tenant in its identity.
    """

    def __init__(self, lake: str | Path) -> None:
        self._lake = Path(lake)
        self._lock = threading.Lock()
        self._held: dict[str, OrderedDict[Any, Any]] = {kind: OrderedDict() for kind in _HELD}

    def grids(self, capture: Capture) -> list[StoredGrid]:
        """Of a capture that the caller may see, by name."""
        identity = digest(capture.identity)
        return [grid for grid in self._grids() if grid.attrs.get("identity") == identity]

    def grid(self, capture: Capture, name: str) -> StoredGrid:
        """By name. Raises Problem (404), also for a grid of another capture."""
        for grid in self.grids(capture):
            if grid.name == name:
                return grid
        raise no_such("grid of this capture", f"GET /v1/captures/{capture.place.name}/grids lists them")

    def open(self, grid: StoredGrid) -> "xr.Dataset":
        """In memory; not to be changed. Raises StoreError."""
        from hiddenlake.probing.saving import open_grid

        return self._remember(grid.path, grid.version, "grid", lambda: open_grid(_checked(grid.path)))

    def probes(self, caller: Caller) -> dict[str, "Probe"]:
        """Those that a caller may see, by name."""
        found = {}
        for name, path in self._entries("probes", ".safetensors"):
            probe = self._try(name, path, lambda path=path: self._probe(path))
            if probe is not None and probe.identity.get("tenant") in (None, caller.tenant):
                found[name] = probe
        return found

    def probe(self, name: str, caller: Caller) -> "Probe":
        """By name. Raises Problem (404)."""
        if (probe := self.probes(caller).get(name)) is None:
            raise no_such("probe", "GET /v1/probes lists them")
        return probe

    def _grids(self) -> Iterator[StoredGrid]:
        for name, path in self._entries("grids", ".zarr"):
            found = self._try(name, path, lambda path=path: self._attrs(path))
            if found is not None:
                yield StoredGrid(name, path, *found)

    def _attrs(self, path: Path) -> tuple[tuple[int, int, int], dict[str, Any]]:
        version = _version(path / "zarr.json")
        return version, self._remember(path, version, "attrs", lambda: _metadata(path).get("attributes", {}))

    def _probe(self, path: Path) -> "Probe":
        from hiddenlake.probing.probe import load_probe

        version = _version(path)
        if version[2] > _MOST_PROBE:
            raise StoreError(f"{path.name} has {version[2]} bytes: a probe has at most {_MOST_PROBE}")
        return self._remember(path, version, "probe", lambda: load_probe(path))

    def _entries(self, kind: str, suffix: str) -> Iterator[tuple[str, Path]]:
        """(name, path) of what a folder holds. A client's name is looked up here, and never joined to a path."""
        own = self._lake / kind
        folder = own if own.is_dir() else self._lake.absolute().parent / kind
        try:
            with os.scandir(folder) as entries:
                there = sorted(e.name for e in entries if e.name.endswith(suffix) and not e.is_symlink())
        except OSError:
            return
        for file in there:
            if NAME.fullmatch(name := file.removesuffix(suffix)):
                yield name, folder / file

    def _try(self, name: str, path: Path, look: Callable[[], Found]) -> Found | None:
        """What cannot be read is nobody's: whose it is stands inside. The log says so."""
        try:
            return look()
        except (HiddenlakeError, OSError, ValueError) as error:
            event("unreadable", kind=path.suffix, name=name, error=type(error).__name__)
            return None

    def _remember(self, path: Path, version: tuple[int, int, int], kind: str, make: Callable[[], Found]) -> Found:
        held, key = self._held[kind], (path, version)
        with self._lock:
            if key in held:
                held.move_to_end(key)
                return held[key]
        made = make()
        with self._lock:
            held[key] = made
            if len(held) > _HELD[kind]:
                held.popitem(last=False)
        return made


def _version(file: Path) -> tuple[int, int, int]:
    found = file.stat(follow_symlinks=False)
    return found.st_ino, found.st_mtime_ns, found.st_size


def _metadata(path: Path) -> dict[str, Any]:
    raw = (path / "zarr.json").read_bytes()
    if len(raw) > _MOST_METADATA:
        raise StoreError(f"{path.name}: its metadata has {len(raw)} bytes: a grid's has at most {_MOST_METADATA}")
    found = json.loads(raw)
    if not isinstance(found, dict) or not isinstance(found.get("attributes", {}), dict):
        raise StoreError(f"{path.name}: zarr.json is no group's metadata")
    return found


def _arrays(path: Path, metadata: dict[str, Any]) -> dict[str, Any]:
    arrays = (metadata.get("consolidated_metadata") or {}).get("metadata")
    if not isinstance(arrays, dict):
        raise StoreError(f"{path.name}: no consolidated metadata: expected a folder that save_grid wrote")
    return arrays


def _checked(path: Path) -> Path:
    """A grid whose arrays may be opened: none is huge, and each is stored as save_grid stores it. Raises StoreError."""
    declared = 0
    for name, array in _arrays(path, _metadata(path)).items():
        declared += 8 * max(math.prod(array.get("shape", ())), math.prod(_chunk(array)))
        codecs = {codec["name"] for codec in array.get("codecs", ())}
        if not codecs <= _CODECS:
            raise StoreError(f"{path.name}: {name} is stored by {', '.join(sorted(codecs - _CODECS))}: save it again")
    if declared > _MOST_GRID:
        raise StoreError(f"{path.name} declares {declared} bytes: a grid has at most {_MOST_GRID}")
    return path


def _chunk(array: dict[str, Any]) -> list[int]:
    return array.get("chunk_grid", {}).get("configuration", {}).get("chunk_shape", [])
