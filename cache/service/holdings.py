"""Holdings: which computed captures stay. Beyond the quota the least recently used go, but for those that are pinned."""

import threading
import time
from collections.abc import Iterator

from hiddenlake.cache.errors import HiddenlakeError
from hiddenlake.cache.service.database import Database
from hiddenlake.cache.service.lake import Lake
from hiddenlake.cache.service.plans import TASK
from hiddenlake.cache.service.problems import Problem
from hiddenlake.cache.store.removal import living_writers, remove_capture

# What was used so lately is not removed: somebody may be about to read what he was just told of.
_JUST_USED_SECONDS = 60.0

# A use is written down at most so often.
_NOTE_SECONDS = 10.0


class Holdings:
    """Of one lake. May be used from several threads."""

    def __init__(self, database: Database, lake: Lake) -> None:
        self._database, self._lake = database, lake
        self._lock = threading.Lock()
        self._noted: dict[str, float] = {}

    def use(self, name: str) -> None:
        """A capture was read, or named to somebody."""
        now = time.time()
        with self._lock:
            if self.is_noted(name):
                return
            self._noted[name] = now
        with self._database.write() as cursor:
            cursor.execute(
                "INSERT INTO held (capture, used) VALUES (?, ?) ON CONFLICT (capture) DO UPDATE SET used = excluded.used",
                (name, now),
            )

    def is_noted(self, name: str) -> bool:
        """Whether `use` has nothing to write down now."""
        return time.time() - self._noted.get(name, 0.0) < _NOTE_SECONDS

    def pin(self, name: str, pinned: bool) -> None:
        """Have a capture stay, whatever the quota; or not."""
        with self._database.write() as cursor:
            cursor.execute(
                "INSERT INTO held (capture, pinned, used) VALUES (?, ?, ?)"
                " ON CONFLICT (capture) DO UPDATE SET pinned = excluded.pinned",
                (name, int(pinned), time.time()),
            )

    def pinned(self) -> set[str]:
        """Names of the captures that are pinned."""
        return {row["capture"] for row in self._database.read("SELECT capture FROM held WHERE pinned")}

    def remove(self, name: str) -> None:
        """Remove a capture. Raises Problem (409) where it is pinned, or being written."""
        if name in self.pinned():
            raise Problem(409, "pinned", "the capture is pinned", "unpin it first")
        place = self._lake.place.child(name)
        with place.lock():
            writers = living_writers(place)
        if writers:
            raise Problem(
                409,
                "being_written",
                f"{len(writers)} processes are writing the capture",
                "try again when they have left it",
            )
        remove_capture(place)
        self._lake.refresh(name)
        with self._database.write() as cursor:
            cursor.execute("DELETE FROM held WHERE capture = ?", (name,))

    def bytes_staying(self) -> int:
        """Of computed captures that no eviction would remove now."""
        going = {name for name, _, _ in self._evictable()}
        return sum(size for name, size in self._computed() if name not in going)

    def evict(self, quota: int) -> list[str]:
        """Remove computed captures, the least recently used first, until the others keep within the quota.

        Returns their names. What is being written stays for now.
        """
        total = sum(size for _, size in self._computed())
        gone = []
        for name, size, _ in sorted(self._evictable(), key=lambda row: row[2]) if total > quota else ():
            if total <= quota:
                break
            try:
                self.remove(name)
            except HiddenlakeError:
                continue
            total -= size
            gone.append(name)
        return gone

    def _computed(self) -> Iterator[tuple[str, int]]:
        """(name, bytes that are committed) of the captures that a service has made."""
        for name, capture in self._lake.all():
            if capture.identity.get("task") == TASK:
                yield name, capture.nbytes

    def _evictable(self) -> list[tuple[str, int, float]]:
        """(name, bytes, when it was used last)."""
        rows = self._database.read("SELECT capture, pinned, used FROM held")
        held = {row["capture"]: (row["pinned"], row["used"]) for row in rows}
        found = [(name, size, *held.get(name, (0, 0.0))) for name, size in self._computed()]
        before = time.time() - _JUST_USED_SECONDS
        return [(name, size, used) for name, size, pinned, used in found if not pinned and used < before]
