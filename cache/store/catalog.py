"""The lake's catalogue: which captures a folder holds, and what one of them is."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hiddenlake.cache.errors import HiddenlakeError, StoreError
from hiddenlake.cache.store.backend import Backend, open_backend
from hiddenlake.cache.store.reader import Capture, open_capture
from hiddenlake.cache.store.root import has_root, is_capture
from hiddenlake.cache.store.verify import kept_report


def list_captures(lake: str | Path) -> list[dict[str, Any]]:
    """One entry a capture of a folder, by name; the folder itself may be one. What is no capture is left out.

    Each entry has name and path, and model, task, sites, layers, positions, tokens, dtype, samples, planned, bytes and
    failures; for a capture that cannot be opened, `error` says why instead.

    Raises StoreError where there is no such folder.
    """
    return [_entry(place) for place in captures_of(lake)]


def captures_of(lake: str | Path | Backend) -> list[Backend]:
    """The captures of a folder, by name; the folder itself may be one. Raises StoreError where there is no such folder."""
    place = open_backend(lake)
    if has_root(place):
        return [place]
    try:
        names = sorted(name for name in place.list_folders() if not name.startswith("."))
    except OSError as error:
        raise StoreError(f"{place} is no folder: name the folder that holds your captures") from error
    # A capture whose root is damaged is one too: the listing says so.
    return [child for child in map(place.child, names) if is_capture(child) or child.list_files("commits")]


def _entry(place: Backend) -> dict[str, Any]:
    where = {"name": place.name, "path": str(place)}
    try:
        capture = open_capture(place)
        return where | facts(capture)
    except HiddenlakeError as error:
        return where | {"error": str(error)}


def facts(capture: Capture) -> dict[str, Any]:
    c = capture.coverage
    return {
        "model": _name(capture.identity.get("model")),
        "task": _name(capture.identity.get("task")),
        "sites": list(c.sites),
        "layers": len(c.layers),
        "positions": len(c.positions),
        "tokens": None if c.tokens is None else str(c.tokens),
        "dtype": c.dtype,
        "codec": capture.codec,
        "samples": len(capture),
        "planned": capture.planned,
        "bytes": capture.nbytes,
        "failures": capture.failures().num_rows,
    }


def _name(value: Any) -> Any:
    """A model or a task is a name, or an object with one (`name` or `id`)."""
    return value.get("name", value.get("id")) if isinstance(value, dict) else value


def describe(capture: Capture) -> dict[str, Any]:
    """Everything that `hiddenlake info` shows of one capture, as plain JSON."""
    provenances = {json.dumps(commit.provenance, sort_keys=True): commit.provenance for commit in capture.commits}
    failures: dict[str, int] = {}
    for cause in capture.failures()["cause"].to_pylist():
        failures[cause] = failures.get(cause, 0) + 1
    return {
        "name": capture.place.name,
        "path": capture.path,
        **facts(capture),
        "layers": list(capture.coverage.layers),
        "positions": list(capture.coverage.positions),
        "widths": capture.coverage.widths,
        "identity": capture.identity,
        "provenance": list(provenances.values()),
        "shard_samples": capture.shard_samples,
        "shards": len(capture.commits),
        "failure_causes": failures,
        "losses": {name: asdict(loss) for name, loss in capture.losses().items()},
        "verified": kept_report(capture.place),
    }
