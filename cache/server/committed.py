"""Committed: which capture of a lake holds a sample, read from what is committed there."""

from pathlib import Path

from hiddenlake.cache.errors import HiddenlakeError
from hiddenlake.cache.store.commits import list_commits, read_commit
from hiddenlake.cache.store.root import is_capture


class Committed:
    """Remembers what it has read, since a commit never changes. Not thread-safe."""

    def __init__(self, lake: Path) -> None:
        self.lake = lake
        self._read: dict[Path, set[int]] = {}
        self._capture_of: dict[str, str] = {}

    def find(self, key: str) -> str | None:
        """The name of the capture that holds a sample, or None. A commit that is damaged holds nothing."""
        if key not in self._capture_of:
            for path in sorted(self.lake.iterdir()):
                if not path.name.startswith(".") and is_capture(path):
                    self._read_new(path)
        return self._capture_of.get(key)

    def _read_new(self, path: Path) -> None:
        read = self._read.setdefault(path, set())
        for shard in list_commits(path) - read:
            read.add(shard)
            try:
                keys = read_commit(path, shard).keys
            except HiddenlakeError:
                continue
            self._capture_of.update((key, path.name) for key in keys if key is not None)
