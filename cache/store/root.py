"""The capture's zarr.json: what it holds (value identity, coverage), how, and who made it."""

import json
from dataclasses import dataclass, replace
from typing import Any

from hiddenlake.cache.errors import CorruptError, IdentityError, StoreError
from hiddenlake.cache.identity import canonical_json
from hiddenlake.cache.store import metadata
from hiddenlake.cache.store.backend import Backend
from hiddenlake.cache.store.coverage import EMBED, Coverage
from hiddenlake.cache.store.files import trouble
from hiddenlake.cache.store.layout import TOKENS, Layout
from hiddenlake.cache.store.signing import check_signed, parse, sign, to_json_bytes

FILE = "zarr.json"

# 3: a commit holds the checksum of every chunk. (In 1 and 2 it held one of each file, which was the same number for all
# files of a layout. They were never released.)
FORMAT_VERSION = 3

# A hundred times what the metadata of many sites takes.
_MOST_BYTES = 16 << 20

# Room that is planned for one sample's tokens: a question and an answer. The axis grows when samples are longer.
_SAMPLE_TOKENS = 512


@dataclass(frozen=True, slots=True)
class Root:
    """The facts of one capture.

    identity : what makes two activations the same numbers; plain JSON.
    layout : which activations there are, and in which files.
    planned : samples that were planned when it was made.
    provenance : of the process that made it; each commit has its own.
    shards, token_shards : lengths of the sample axis and of the token axis, in shards.
    """

    identity: dict[str, Any]
    layout: Layout
    planned: int
    provenance: dict[str, Any]
    shards: int
    token_shards: int

    @property
    def coverage(self) -> Coverage:
        return self.layout.coverage

    def document(self) -> dict[str, Any]:
        facts = {
            "format_version": FORMAT_VERSION,
            "identity": self.identity,
            "coverage": self.coverage.to_json(),
            "shard_samples": self.layout.samples,
            "codec": self.layout.codec,
            "planned": self.planned,
            "provenance": self.provenance,
        }
        if self.coverage.tokens:
            facts |= {"chunk_tokens": self.layout.chunk_tokens, "shard_tokens": self.layout.shard_tokens}
        return metadata.root(self.layout, self.shards, self.token_shards, sign(facts))

    def files(self) -> dict[str, bytes]:
        """Every metadata document, by file, the root last: the order in which they are written."""
        arrays = metadata.arrays(self.layout, self.shards, self.token_shards)
        files = {f"{name}/{FILE}": to_json_bytes(document) for name, document in arrays.items()}
        return files | {FILE: to_json_bytes(self.document())}

    def check(self, place: Backend, identity: dict[str, Any], coverage: Coverage) -> None:
        """Raise IdentityError, naming every field that differs, unless both are the capture's own."""
        differences = [
            *_differences("identity", self.identity, identity),
            *_differences("coverage", self.coverage.to_json(), coverage.to_json()),
        ]
        if differences:
            raise IdentityError(
                f"{place} holds other activations than these: {'; '.join(differences)}. "
                f"Name another folder, or run with the capture's own settings"
            )


def new_root(identity: dict[str, Any], layout: Layout, planned: int, provenance: dict[str, Any]) -> Root:
    """A capture that is to be made, with axes as long as `planned` samples may need."""
    tokens = layout.shard_tokens and max(1, -(-planned * _SAMPLE_TOKENS // layout.shard_tokens))
    return Root(identity, layout, planned, provenance, max(1, -(-planned // layout.samples)), tokens)


def grow(place: Backend, shards: int, token_shards: int) -> None:
    """Make the axes at least so long: arrays first, the consolidated root last. Under the capture's lock."""
    while True:
        raw = _read_raw(place)
        root = _parse(place, raw)
        longer = {}
        # By an eighth, so that a run of unplanned length rewrites its metadata a few times only.
        if shards > root.shards:
            longer["shards"] = max(shards, root.shards + root.shards // 8)
        if token_shards > root.token_shards:
            longer["token_shards"] = max(token_shards, root.token_shards + root.token_shards // 8)
        if not longer:
            return
        *derived, (name, document) = replace(root, **longer).files().items()
        for file, data in derived:
            place.write(file, data)
        # Another process may have been faster where a lock can be lost.
        if place.replace(name, raw, document):
            return


def has_root(place: Backend) -> bool:
    """Whether there is something that claims to be a capture, readable or not."""
    try:
        place.size(FILE)
    except (FileNotFoundError, NotADirectoryError):
        return False
    except OSError as error:
        raise trouble(f"{place}/{FILE}", error) from error
    return True


def is_capture(place: Backend) -> bool:
    """Whether a folder says that it is a capture. Raises nothing for a folder that is none, or cannot be read."""
    try:
        return "hiddenlake" in parse(place.read(FILE, _MOST_BYTES))["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_root(place: Backend) -> Root:
    """Read and check a capture's zarr.json.

    Raises StoreError where there is no capture or one of another format version, CorruptError where it
    says other things than were written.
    """
    return _parse(place, _read_raw(place))


def _read_raw(place: Backend) -> bytes:
    try:
        return place.read(FILE, _MOST_BYTES)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(f"{place} is no capture: it has no {FILE}; `hiddenlake ls` lists the captures") from error
    except OSError as error:
        raise trouble(f"{place}/{FILE}", error) from error


def _parse(place: Backend, raw: bytes) -> Root:
    file = f"{place}/{FILE}"
    try:
        document = parse(raw)
    except ValueError as error:
        raise CorruptError(f"{file}: not JSON ({error}): the file is damaged; restore it from a copy") from error
    try:
        facts = document["attributes"]["hiddenlake"]
        version = facts["format_version"]
    except (KeyError, TypeError) as error:
        raise StoreError(f"{place} is no capture: its {FILE} has no `hiddenlake` attribute with a version") from error
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{place} has format version {version!r}, but this hiddenlake reads version {FORMAT_VERSION}: "
            f"install the hiddenlake that wrote it, or capture again"
        )
    facts = check_signed(facts, file)
    try:
        coverage = Coverage.from_json(facts["coverage"])
        layout = Layout(
            coverage,
            facts["shard_samples"],
            facts.get("chunk_tokens", 0),
            facts.get("shard_tokens", 0),
            facts["codec"],
        )
        arrays = document["consolidated_metadata"]["metadata"]
        root = Root(
            facts["identity"],
            layout,
            facts["planned"],
            facts["provenance"],
            arrays["committed"]["shape"][0] // layout.samples,
            arrays[f"{TOKENS}/{EMBED}"]["shape"][0] // layout.shard_tokens if coverage.tokens else 0,
        )
        _check(root)
    except (KeyError, TypeError, ValueError, IndexError, AttributeError, ArithmeticError) as error:
        raise CorruptError(f"{file}: {error!r}: the file is damaged; restore it from a copy") from error
    if root.document() != document:
        raise CorruptError(
            f"{file}: its array metadata differs from what its coverage means: the file is damaged; "
            f"restore it from a copy"
        )
    return root


def _check(root: Root) -> None:
    """Raise ValueError for what no capture says of itself."""
    for name in ("planned", "shards", "token_shards"):
        value = getattr(root, name)
        if type(value) is not int or not 0 <= value < 1 << 48:
            raise ValueError(f"{name} is {value!r}: expected a number of samples or shards")
    for name in ("identity", "provenance"):
        if not isinstance(getattr(root, name), dict):
            raise ValueError(f"{name} is {getattr(root, name)!r}: expected an object")
    canonical_json(root.identity)  # raises for NaN, of which there is no digest


_MISSING = object()


def _differences(name: str, stored: Any, given: Any) -> list[str]:
    """Each leaf that differs, with both values."""
    if isinstance(stored, dict) and isinstance(given, dict):
        return [
            difference
            for key in dict.fromkeys([*stored, *given])
            for difference in _differences(f"{name}.{key}", stored.get(key, _MISSING), given.get(key, _MISSING))
        ]
    if stored == given and type(stored) is type(given):
        return []
    return [f"{name} is {_show(stored)} there and {_show(given)} here"]


def _show(value: Any) -> str:
    if value is _MISSING:
        return "absent"
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}... ({len(text)} characters)"
