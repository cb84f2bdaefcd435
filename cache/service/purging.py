"""Purging: a capture removed with every trace of its prompts that its lake keeps, and a search that shows that none is left."""

import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from hiddenlake.cache.errors import HiddenlakeError, StoreError
from hiddenlake.cache.service.database import FILE, FOLDER, Database
from hiddenlake.cache.store.catalog import captures_of
from hiddenlake.cache.store.local import LocalBackend
from hiddenlake.cache.store.reader import Capture, open_capture
from hiddenlake.cache.store.removal import remove_capture
from hiddenlake.cache.store.snapshot import samples_of

# Of prompts and answers that are looked for byte by byte, evenly chosen; keys are looked for all.
_TEXTS = 1000

# A shorter text is not this capture's alone.
_LEAST_CHARACTERS = 24

# Keys of samples and of answers are 32 hexadecimal digits; they overlap where more of them follow each other.
_KEY = re.compile(rb"(?=([0-9a-f]{32}))")

_PART_BYTES = 1 << 24


@dataclass(frozen=True, slots=True)
class Purged:
    """samples : of the capture that is gone.  files, bytes : that were searched.  left : what is still somewhere, in words."""

    samples: int
    files: int
    bytes: int
    left: tuple[str, ...]


def purge(path: str | Path) -> Purged:
    """Remove a capture, and what the service's database knows of its samples; then look for them in all that is left.

    Every file of the lake is searched for the samples' keys, and for prompts, answers and token ids as text; other
    captures' samples are compared by their keys, prompts and answers. What is left there is the user's to remove.
    Nobody can say what a disk keeps of blocks that it has freed, or what copies and compressed files of other tools hold.

    Raises StoreError where there is no such capture on a local disk, or it is being written.
    """
    capture = open_capture(path)
    if not isinstance(capture.place, LocalBackend):
        raise StoreError(
            f"{path} is not on a local disk: `hiddenlake rm` removes it; its bucket may keep older versions"
        )
    place = capture.place.path
    lake, name = place.parent, place.name
    keys, texts = set(capture.keys), _texts(capture)
    database = Database(lake) if (lake / FOLDER / FILE).exists() else None
    if database is not None:
        keys |= {row["key"] for row in database.read("SELECT key FROM entries WHERE capture = ?", (name,))}
    # First, since it may be refused, and since a server adds what it finds in a capture that is there.
    remove_capture(capture.place)
    if database is not None:
        _forget(database, name, keys)
    wanted, needles = {key.encode() for key in keys}, _needles(texts)
    files, size, left = 0, 0, []
    others = {other.name: other for other in captures_of(lake)}
    for other in others.values():
        left += _in_capture(lake / other.name, keys, texts)
    for file in _files(lake, set(others)):
        files, size = files + 1, size + file.stat().st_size
        left += _in_file(file, wanted, needles)
    return Purged(len(capture), files, size, tuple(left))


def _texts(capture: Capture) -> set[str]:
    """Prompts and answers that are long enough to be told by."""
    table = samples_of(capture.snapshot, ["prompt", "answer", "token_ids", "prompt_length"])
    ids = zip(table["token_ids"].to_pylist(), table["prompt_length"].to_pylist(), strict=True)
    found = {*table["prompt"].to_pylist(), *table["answer"].to_pylist()}
    found |= {json.dumps(tokens[:length]) for tokens, length in ids}  # as work that waits has them
    return {text for text in found if len(text) >= _LEAST_CHARACTERS}


def _forget(database: Database, name: str, keys: set[str]) -> None:
    """Delete what the database knows of a capture's answers."""
    with database.write() as cursor:
        for table in ("entries", "indexed", "held"):
            cursor.execute(f"DELETE FROM {table} WHERE capture = ?", (name,))
        every = [(key,) for key in keys]
        cursor.executemany("DELETE FROM items WHERE work IN (SELECT number FROM work WHERE key = ?)", every)
        cursor.executemany("DELETE FROM work WHERE key = ?", every)
    database.vacuum()


def _in_capture(folder: Path, keys: set[str], texts: set[str]) -> Iterator[str]:
    try:
        other = open_capture(folder)
        table = samples_of(other.snapshot, ["prompt", "answer"])
    except HiddenlakeError as error:
        yield f"{folder} cannot be read ({error})"
        return
    if same := len(keys.intersection(other.keys)):
        yield f"{folder} holds {same} of its samples"
    for column in ("prompt", "answer"):
        if same := len(texts.intersection(table[column].to_pylist())):
            yield f"{folder} holds {same} of its {column}s"


def _files(lake: Path, captures: set[str]) -> Iterator[Path]:
    """What is not a capture's, nor a link to elsewhere."""
    for entry in sorted(lake.iterdir()):
        if entry.name in captures or entry.is_symlink():
            continue
        yield from (
            f for f in ([entry] if entry.is_file() else sorted(entry.rglob("*"))) if f.is_file() and not f.is_symlink()
        )


def _needles(texts: set[str]) -> set[bytes]:
    """Some of the texts, as themselves and as JSON has them."""
    ordered = sorted(texts)
    chosen = ordered[:: -(-len(ordered) // _TEXTS) or 1]
    return {form.encode() for text in chosen for form in (text, json.dumps(text)[1:-1])}


def _in_file(file: Path, keys: set[bytes], needles: set[bytes]) -> Iterator[str]:
    overlap = max([32, *map(len, needles)])
    found_keys: set[bytes] = set()
    found_texts: set[bytes] = set()
    with suppress(FileNotFoundError), file.open("rb") as source:  # the server's own log of writes comes and goes
        before = b""
        while part := source.read(_PART_BYTES):
            data = before + part
            found_keys |= keys.intersection(match[1] for match in _KEY.finditer(data))
            found_texts |= {needle for needle in needles if needle in data}
            before = data[-overlap:]
    for number, what in ((len(found_keys), "keys of its samples"), (len(found_texts), "of its texts")):
        if number:
            yield f"{file} holds {number} {what}"
