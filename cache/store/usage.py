"""Usage: what captures take, by part."""

from pathlib import Path
from typing import Any

from hiddenlake.cache.errors import HiddenlakeError
from hiddenlake.cache.store.backend import Backend
from hiddenlake.cache.store.catalog import captures_of
from hiddenlake.cache.store.commits import commit_file, list_commits
from hiddenlake.cache.store.reader import open_capture


def usage(lake: "str | Path | Backend") -> list[dict[str, Any]]:
    """Bytes of each capture of a folder, the largest first: path, bytes, and parts by name (a site, `tokens/` and a site,
    `row_crc`, `scale`, `samples`, `labels`, `failures`, `commits`); `error` where a capture cannot be opened.

    Raises StoreError where there is no such folder.
    """
    rows = []
    for place in captures_of(lake):
        try:
            parts = _parts(place)
            rows.append({"path": str(place), "bytes": sum(parts.values()), "parts": parts})
        except HiddenlakeError as error:
            rows.append({"path": str(place), "bytes": 0, "parts": {}, "error": str(error)})
    return sorted(rows, key=lambda row: -row["bytes"])


def _parts(place: Backend) -> dict[str, int]:
    records = {name: record.size for commit in open_capture(place).commits for name, record in commit.files.items()}
    parts: dict[str, int] = {}
    for name, size in records.items():
        folder = name.rpartition("/")[0]
        part = folder if folder.startswith("tokens/") else folder.partition("/")[0]
        parts[part] = parts.get(part, 0) + size
    for folder in ("labels", "failures"):
        if names := place.list_files(folder):
            parts[folder] = sum(place.size(f"{folder}/{name}") for name in names)
    parts["commits"] = sum(place.size(commit_file(shard)) for shard in list_commits(place))
    return parts
