"""The capture's zarr.json: what it holds (value identity, coverage), how, and who made it."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hiddenlake.cache.errors import CorruptError, IdentityError, StoreError
from hiddenlake.cache.store.coverage import Coverage
from hiddenlake.cache.store.layout import FORMAT_VERSION, Layout, check_signed, sign, to_json_bytes

FILE = "zarr.json"


@dataclass(frozen=True, slots=True)
class Root:
    """The facts of one capture.

    identity : what makes two activations the same numbers; plain JSON.
    coverage : which cells there are.
    shard_samples : B.
    planned : samples that were planned when it was made.
    provenance : of the process that made it; each commit has its own.
    shards : length of the sample axis, in shards.
    """

    identity: dict[str, Any]
    coverage: Coverage
    shard_samples: int
    planned: int
    provenance: dict[str, Any]
    shards: int

    @property
    def layout(self) -> Layout:
        return Layout(self.coverage, self.shard_samples)

    def document(self) -> dict[str, Any]:
        facts = sign(
            {
                "format_version": FORMAT_VERSION,
                "identity": self.identity,
                "coverage": self.coverage.to_json(),
                "shard_samples": self.shard_samples,
                "planned": self.planned,
                "provenance": self.provenance,
            }
        )
        return self.layout.root(self.shards, facts)

    def files(self) -> dict[str, bytes]:
        """Every metadata document, by file, the root last: the order in which they are written."""
        arrays = {
            f"{name}/{FILE}": to_json_bytes(document) for name, document in self.layout.arrays(self.shards).items()
        }
        return arrays | {FILE: to_json_bytes(self.document())}

    def check(self, path: Path, identity: dict[str, Any], coverage: Coverage) -> None:
        """Raise IdentityError, naming every field that differs, unless both are the capture's own."""
        differences = [
            *_differences("identity", self.identity, identity),
            *_differences("coverage", self.coverage.to_json(), coverage.to_json()),
        ]
        if differences:
            raise IdentityError(
                f"{path} holds other activations than these: {'; '.join(differences)}. "
                f"Name another folder, or run with the capture's own settings"
            )


def is_capture(path: Path) -> bool:
    """Whether a folder says that it is a capture. Raises nothing for a folder that is none, or cannot be read."""
    try:
        text = (path / FILE).read_text()
        return "hiddenlake" in json.loads(text)["attributes"]
    except (OSError, ValueError, KeyError, TypeError):
        return False


def read_root(path: Path) -> Root:
    """Read and check a capture's zarr.json.

    Raises StoreError where there is no capture or one of another format version, CorruptError where it
    says other things than were written.
    """
    file = path / FILE
    try:
        raw = file.read_bytes()
    except (FileNotFoundError, NotADirectoryError) as error:
        raise StoreError(f"{path} is no capture: it has no {FILE}; `hiddenlake ls` lists the captures") from error
    except OSError as error:
        raise StoreError(f"{file}: {error.strerror}: check the folder's permissions and the disk") from error
    try:
        document = json.loads(raw)
    except ValueError as error:
        raise CorruptError(f"{file}: not JSON ({error}): the file is damaged; restore it from a copy") from error
    try:
        facts = document["attributes"]["hiddenlake"]
        version = facts["format_version"]
    except (KeyError, TypeError) as error:
        raise StoreError(f"{path} is no capture: its {FILE} has no `hiddenlake` attribute with a version") from error
    if version != FORMAT_VERSION:
        raise StoreError(
            f"{path} has format version {version!r}, but this hiddenlake reads version {FORMAT_VERSION}: "
            f"install the hiddenlake that wrote it, or capture again"
        )
    facts = check_signed(facts, str(file))
    try:
        coverage = Coverage.from_json(facts["coverage"])
        shape = document["consolidated_metadata"]["metadata"]["committed"]["shape"]
        root = Root(
            facts["identity"],
            coverage,
            facts["shard_samples"],
            facts["planned"],
            facts["provenance"],
            shape[0] // facts["shard_samples"],
        )
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CorruptError(f"{file}: {error!r}: the file is damaged; restore it from a copy") from error
    if root.document() != document:
        raise CorruptError(
            f"{file}: its array metadata differs from what its coverage means: the file is damaged; "
            f"restore it from a copy"
        )
    return root


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
