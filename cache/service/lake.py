"""The lake as the service sees it: captures by name, opened once, shown to those who may see them."""

import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from hiddenlake.cache.errors import HiddenlakeError, StoreError
from hiddenlake.cache.identity import digest
from hiddenlake.cache.service.keys import Caller
from hiddenlake.cache.service.problems import no_such
from hiddenlake.cache.store.backend import Backend, open_backend
from hiddenlake.cache.store.catalog import captures_of
from hiddenlake.cache.store.reader import Capture

# A name that a client gives is looked up, never joined to a path. This is what it may look like at all.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")

# How long a capture, and the list of them, is believed to be as it was.
_FRESH_SECONDS = 1.0


@dataclass(slots=True)
class _Opened:
    capture: Capture
    when: float
    lock: threading.Lock = field(default_factory=threading.Lock)


class Lake:
    """The captures of one folder or bucket. May be used from several threads."""

    def __init__(self, where: str | Path) -> None:
        self.place: Backend = open_backend(where)
        self._lock = threading.Lock()
        self._places: dict[str, Backend] = {}
        self._listed = -_FRESH_SECONDS
        self._opened: dict[str, _Opened] = {}
        self._names()

    def names(self, caller: Caller) -> list[str]:
        """Of the captures that a caller may see, and of those that cannot be opened, which are nobody's secret."""
        return [name for name in sorted(self._names()) if self._visible(name, caller)]

    def capture(self, name: str, caller: Caller) -> Capture:
        """A capture by name, as of now. Raises Problem (404) where there is none that the caller may see, StoreError."""
        if not NAME.fullmatch(name) or name not in self._names() or not self._visible(name, caller):
            raise no_such("capture", "GET /v1/captures lists those that there are")
        return self._open(name)

    def captures(self, caller: Caller) -> Iterator[tuple[str, Capture | HiddenlakeError]]:
        """Every capture that a caller may see, or why it cannot be opened."""
        for name in sorted(self._names()):
            try:
                if self._visible(name, caller):
                    yield name, self._open(name)
            except HiddenlakeError as error:
                yield name, error

    def refresh(self, name: str) -> None:
        """Have the next look at a capture see what was committed since."""
        with self._lock:
            self._listed = -_FRESH_SECONDS
            if opened := self._opened.get(name):
                opened.when = -_FRESH_SECONDS

    def _names(self) -> dict[str, Backend]:
        with self._lock:
            if time.monotonic() - self._listed >= _FRESH_SECONDS:
                self._places = {place.name: place for place in captures_of(self.place)}
                self._listed = time.monotonic()
                for gone in self._opened.keys() - self._places.keys():
                    del self._opened[gone]
            return self._places

    def _open(self, name: str) -> Capture:
        with self._lock:
            opened = self._opened.get(name)
        if opened is None:
            opened = _Opened(Capture(self._places[name]), time.monotonic())
            with self._lock:
                opened = self._opened.setdefault(name, opened)
        if time.monotonic() - opened.when >= _FRESH_SECONDS:
            with opened.lock:
                if time.monotonic() - opened.when >= _FRESH_SECONDS:
                    try:
                        opened.capture.refresh()
                    except StoreError:  # removed, and perhaps made again
                        opened.capture = Capture(self._places[name])
                    opened.when = time.monotonic()
        return opened.capture

    def _visible(self, name: str, caller: Caller) -> bool:
        try:
            owner = self._open(name).identity.get("tenant")
        except HiddenlakeError:
            return caller.may("admin") or caller.tenant is None
        return owner is None or caller.tenant == owner


def snapshot_id(capture: Capture) -> str:
    """Names what a capture holds at this moment: the same samples in the same order, of the same bytes."""
    return digest([[commit.shard, commit.writer, commit.fencing] for commit in capture.commits])
