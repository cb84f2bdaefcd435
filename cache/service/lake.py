"""The lake as the service sees it: captures by name, opened once, shown to those who may see them."""

import re
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from hiddenlake.cache.errors import HiddenlakeError, StoreError
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
    """wanted, seen : numbers of the last look that was asked for, and of the last that was taken."""

    capture: Capture
    when: float
    wanted: int = 0
    seen: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @property
    def stale(self) -> bool:
        return self.seen < self.wanted or time.monotonic() - self.when >= _FRESH_SECONDS


class Lake:
    """The captures of one folder or bucket. May be used from several threads."""

    def __init__(self, where: str | Path) -> None:
        self.place: Backend = open_backend(where)
        self._lock = threading.Lock()
        self._places: dict[str, Backend] = {}
        self._listed = -_FRESH_SECONDS
        self._opened: dict[str, _Opened] = {}
        self._names()

    def capture(self, name: str, caller: Caller) -> Capture:
        """A capture by name, as of now. Raises Problem (404) where there is none that the caller may see, StoreError."""
        if NAME.fullmatch(name) and name not in self._names():
            self.refresh(name)  # it may have been made a moment ago
        if NAME.fullmatch(name) and name in self._names():
            try:
                capture = self._open(name)
            except HiddenlakeError:
                if _sees_damage(caller):
                    raise
            else:
                if _visible(capture, caller):
                    return capture
        raise no_such("capture", "GET /v1/captures lists those that there are")

    def at_hand(self, name: str, caller: Caller) -> Capture | None:
        """The same, if it was looked at a moment ago: without a look at a disk, and without waiting for anybody."""
        opened = self._opened.get(name)
        if opened is None or opened.stale or time.monotonic() - self._listed >= _FRESH_SECONDS:
            return None
        return opened.capture if _visible(opened.capture, caller) else None

    def fresh(self, name: str, caller: Caller, sample: str) -> Capture:
        """The same, looked at again if a sample of it was not there a moment ago."""
        capture = self.capture(name, caller)
        if sample in capture.snapshot.row_of:
            return capture
        self.refresh(name)
        return self.capture(name, caller)

    def all(self) -> Iterator[tuple[str, Capture]]:
        """Every capture that can be opened, whoever may see it."""
        for name in sorted(self._names()):
            with suppress(HiddenlakeError):
                yield name, self._open(name)

    def captures(self, caller: Caller) -> Iterator[tuple[str, Capture | HiddenlakeError]]:
        """Every capture that a caller may see, or why it cannot be opened."""
        for name in sorted(self._names()):
            try:
                if not NAME.fullmatch(name):
                    raise StoreError(
                        "a client cannot ask for a folder of this name: rename it to letters, digits, . _ and -"
                    )
                capture = self._open(name)
            except HiddenlakeError as error:
                if _sees_damage(caller):
                    yield ascii(name)[1:-1], error
            else:
                if _visible(capture, caller):
                    yield name, capture

    def refresh(self, name: str) -> None:
        """Have the next look at a capture see what was committed since."""
        with self._lock:
            self._listed = -_FRESH_SECONDS
            if opened := self._opened.get(name):
                opened.wanted += 1

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
            opened, place = self._opened.get(name), self._places.get(name)
        if place is None:  # a moment ago it was there
            raise no_such("capture", "GET /v1/captures lists those that there are")
        if opened is None:
            opened = _Opened(Capture(place), time.monotonic())
            with self._lock:
                opened = self._opened.setdefault(name, opened)
        if opened.stale:
            with opened.lock:
                if opened.stale:
                    # As of before the look, which may miss what is committed while it is taken.
                    when, wanted = time.monotonic(), opened.wanted
                    try:
                        opened.capture.refresh()
                    except StoreError:  # removed, and perhaps made again
                        opened.capture = Capture(place)
                    opened.when, opened.seen = when, wanted
        return opened.capture


def _visible(capture: Capture, caller: Caller) -> bool:
    """Asked of the very object that is then used: a moment later another tenant's may lie in its place."""
    owner = capture.identity.get("tenant")
    return owner is None or caller.tenant == owner


def _sees_damage(caller: Caller) -> bool:
    """Nobody can tell whose a capture is that cannot be opened."""
    return caller.may("admin") or caller.tenant is None
