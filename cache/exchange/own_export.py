"""Our own safetensors export, e.g. from the hub, as a source: what was exported can be a capture again."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hiddenlake.cache.errors import BadInputError, CorruptError
from hiddenlake.cache.exchange.importing import Progress, no_progress
from hiddenlake.cache.exchange.jsonl import JsonlSource, TensorFiles
from hiddenlake.cache.exchange.plan import shard_name
from hiddenlake.cache.exchange.records import Lines, known_fields
from hiddenlake.cache.exchange.safetensors import ACTIVATIONS
from hiddenlake.cache.exchange.selection import part_name
from hiddenlake.cache.exchange.target import MANIFEST
from hiddenlake.cache.exchange.tensor_file import TensorFile, inside
from hiddenlake.cache.samples import Sample, token_checksum
from hiddenlake.cache.sites import SITES
from hiddenlake.cache.store.tables import parquet_table

# Far above what a manifest of a million files takes.
_MANIFEST_BYTES = 1 << 30


class OwnExport(JsonlSource):
    """A folder that `hiddenlake export --format safetensors` made; see `Source`. Files are hashed when first opened.

    identity : the value identity of the capture that was exported.

    progress : is called with (done, total) while it is checked, in rows.

    Raises BadInputError where it is no such folder, CorruptError where a file is not what was written.
    """

    format = "export"

    def __init__(self, folder: str | Path, *, progress: Progress = no_progress) -> None:
        folder = Path(folder)
        manifest = _manifest(folder)
        self.compute_dtype, self._embedding = None, None
        files = _HashedFiles(folder, manifest["files"])
        files.check("index.parquet")
        self.identity = {
            name: value for name, value in manifest["identity"].items() if name not in ("stored_dtype", "imported")
        }
        positions = [*manifest["positions"], *([manifest["tokens"]] if manifest["tokens"] else [])]
        self._check_all(
            _IndexLines(folder, manifest), files, manifest["layers"], positions, manifest["dtype"], progress
        )
        self.provenance = {"source": folder.resolve().name, "exported": manifest.get("provenance")}

    def sample(self, number: int) -> Sample:
        sample = super().sample(number)
        line, where = self._lines.read(number)
        if line["checksum"] != token_checksum(sample.token_ids):
            raise CorruptError(f"{where}: token_ids differ from their checksum: fetch the export again")
        return sample


class _HashedFiles(TensorFiles):
    """Files whose SHA-256 is known."""

    def __init__(self, root: Path, records: dict[str, Any]) -> None:
        super().__init__(root)
        self._records = records
        self._checked: set[str] = set()

    def get(self, name: str) -> TensorFile:
        self.check(name)
        return super().get(name)

    def check(self, name: str) -> None:
        if name in self._checked:
            return
        path = inside(self.root, name)
        try:
            with path.open("rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise BadInputError(f"{path}: {error.strerror}: fetch the export again") from error
        record = self._records.get(name)
        if not isinstance(record, dict) or record.get("sha256") != found:
            raise CorruptError(f"{path}: its SHA-256 is not that of {MANIFEST}: fetch the export again")
        self._checked.add(name)


class _IndexLines(Lines):
    """The rows of index.parquet in the place of a JSONL file's lines."""

    def __init__(self, folder: Path, manifest: dict[str, Any]) -> None:
        import pyarrow as pa

        path = folder / "index.parquet"
        super().__init__(path)
        try:
            self._table = parquet_table(path)
        except (pa.ArrowException, OSError) as error:
            raise BadInputError(f"{path}: {error}: fetch the export again") from error
        self._manifest = manifest
        needed = {"key", "token_ids", "prompt_length", "checksum"}
        needed |= {"shard", "shard_row"} if manifest["positions"] else set()
        needed |= {"token_shard", "token_row", "token_count"} if manifest["tokens"] else set()
        if missing := needed - set(self._table.column_names):
            raise BadInputError(f"{path} lacks {', '.join(sorted(missing))}: expected the index of an export")
        for name in needed:
            kind, nulls = self._table[name].type, self._table[name].null_count
            if nulls or not (pa.types.is_integer(kind) or name in ("key", "checksum", "token_ids")):
                raise BadInputError(
                    f"{path}: column {name} is {kind} with {nulls} nulls: expected the index of an export"
                )
        self.ignored = set(self._table.column_names) - known_fields() - needed - {"row"}

    def scan(self) -> Iterator[tuple[int, dict[str, Any], str]]:
        for row in range(self._table.num_rows):
            line, where = self.read(row)
            self.progress = (row + 1, self._table.num_rows)
            yield row, line, where

    def read(self, row: int) -> tuple[dict[str, Any], str]:
        line = self._table.slice(row, 1).to_pylist()[0]
        for kind, start, stop in (
            ("activations", "shard_row", None),
            ("tokens", "token_row", "token_count"),
        ):
            if start not in line or not self._manifest["positions" if kind == "activations" else "tokens"]:
                continue
            prefix, shard, count = (
                ("", line["shard"], self._manifest["cell_shards"])
                if kind == "activations"
                else ("tokens/", line["token_shard"], self._manifest["token_shards"])
            )
            rows = {"row": line[start]} if stop is None else {"rows": [line[start], line[start] + line[stop]]}
            line[kind] = {
                site: {"file": shard_name(prefix + part_name(site, "{layer}"), shard, count, "safetensors")}
                | {"tensor": ACTIVATIONS}
                | rows
                for site in self._manifest["sites"]
            }
        return line, f"{self.path}, row {row}"


def _manifest(folder: Path) -> dict[str, Any]:
    path = inside(folder, MANIFEST)
    try:
        if path.stat().st_size > _MANIFEST_BYTES:
            raise BadInputError(f"{path} has {path.stat().st_size} bytes: expected the manifest of an export")
        manifest = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise BadInputError(f"{path}: {error}: expected a folder that `hiddenlake export` made") from error
    types = {
        "hiddenlake_export": int, "format": str, "dtype": str, "identity": dict, "sites": dict, "layers": list,
        "positions": list, "tokens": str | None, "cell_shards": int, "token_shards": int, "files": dict,
    }  # fmt: skip
    if not isinstance(manifest, dict) or manifest.get("format") != "safetensors":
        raise BadInputError(f"{path} is not that of a safetensors export: only those can be imported again")
    if wrong := [name for name, kind in types.items() if name not in manifest or not isinstance(manifest[name], kind)]:
        raise BadInputError(f"{path}: {', '.join(wrong)}: not as an export writes it")
    if unknown := manifest["sites"].keys() - SITES.keys():
        raise BadInputError(f"{path}: unknown sites {', '.join(sorted(unknown))}: expected some of {', '.join(SITES)}")
    if not all(type(layer) is int for layer in manifest["layers"]):
        raise BadInputError(f"{path}: layers {manifest['layers']}: expected whole numbers")
    return manifest
