"""Committed: which capture of a lake holds a sample, read from what is committed there."""

from pathlib import Path

from hiddenlake.cache.errors import HiddenlakeError
from hiddenlake.cache.store.backend import Backend, open_backend
from hiddenlake.cache.store.commits import list_commits, read_commit
from hiddenlake.cache.store.root import is_capture


class Committed:
    """Remembers what it has read, since a commit never changes. Not thread-safe."""

    def __init__(self, lake: Path) -> None:
        self.lake = open_backend(lake)
        self._read: dict[str, set[int]] = {}
        self._capture_of: dict[str, str] = {}

    def find(self, key: str) -> str | None:
        """The name of the capture that holds a sample, or None. A commit that is damaged holds nothing."""
        if key not in self._capture_of:
            for name in sorted(self.lake.list_folders()):
                place = self.lake.child(name)
                if not name.startswith(".") and is_capture(place):
                    self._read_new(place)
        return self._capture_of.get(key)

    def _read_new(self, place: Backend) -> None:
        read = self._read.setdefault(place.name, set())
        for shard in list_commits(place) - read:
            read.add(shard)
            try:
                keys = read_commit(place, shard).keys
            except HiddenlakeError:
                continue
            self._capture_of.update((key, place.name) for key in keys if key is not None)
