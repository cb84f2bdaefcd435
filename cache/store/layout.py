"""The layout of one capture: its arrays, where each byte of a shard lies, its Zarr v3 metadata.

L layers, P positions, N samples, B samples a shard, W width of a site. Nothing here touches a file.
"""

import json
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from hiddenlake.cache.errors import CorruptError, StoreError
from hiddenlake.cache.positions import POOLS
from hiddenlake.cache.sites import SITES
from hiddenlake.cache.store.coverage import DTYPES, EMBED, Coverage
from hiddenlake.cache.store.files import crc32c

FORMAT_VERSION = 1

ROW_CRC = "row_crc"

# Every inner chunk starts on a page, as direct and GPU-direct reads want it.
ALIGNMENT = 4096

# Below this a read is dominated by its fixed costs; 256 samples of SmolLM2 and 32 of an 8B model reach it.
CHUNK_BYTES = 256 * 1024

# One buffer fills while the other is written.
BUFFERS = 2


@dataclass(frozen=True)
class ShardFile:
    """Where the bytes of one shard of one activation array lie.

    outer : chunks of a shard along the leading axes, (L, P), or (P,) for a site without layers.
    samples : B.  width : W.  dtype : name.

    The file is the chunks, each (B, W) with its crc32c and then zeros up to the next page, and the index.
    """

    outer: tuple[int, ...]
    samples: int
    width: int
    dtype: str

    @property
    def bits(self) -> np.dtype:
        return DTYPES[self.dtype][0]

    @property
    def row_bytes(self) -> int:
        return self.width * self.bits.itemsize

    @property
    def chunk_bytes(self) -> int:
        """Bytes of a chunk without its checksum."""
        return self.samples * self.row_bytes

    @property
    def pitch(self) -> int:
        """Bytes from the start of one chunk to the start of the next."""
        return -(-(self.chunk_bytes + 4) // ALIGNMENT) * ALIGNMENT

    @property
    def chunks(self) -> int:
        return math.prod(self.outer)

    @property
    def index_offset(self) -> int:
        return self.chunks * self.pitch

    @property
    def size(self) -> int:
        return self.index_offset + 16 * self.chunks + 4

    @property
    def shape(self) -> tuple[int, ...]:
        return (*self.outer, self.samples, self.width)

    @property
    def strides(self) -> tuple[int, ...]:
        """Of a view of the file as an array of `shape`, in bytes."""
        outer = tuple(self.pitch * math.prod(self.outer[axis + 1 :]) for axis in range(len(self.outer)))
        return (*outer, self.row_bytes, self.bits.itemsize)

    @cached_property
    def index(self) -> bytes:
        """The shard index of sharding_indexed: (offset, bytes) a chunk, little-endian uint64, and its crc32c."""
        table = np.empty((self.chunks, 2), "<u8")
        table[:, 0] = np.arange(self.chunks, dtype=np.uint64) * np.uint64(self.pitch)
        table[:, 1] = self.chunk_bytes + 4
        raw = table.tobytes()
        return raw + crc32c(raw).to_bytes(4, "little")


@dataclass(frozen=True)
class Layout:
    """Everything that coverage and B decide about a capture's files.

    coverage : what is stored.  samples : B.
    """

    coverage: Coverage
    samples: int
    files: dict[str, ShardFile] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        c = self.coverage
        files = {}
        for site in (*c.sites, EMBED):
            outer = (len(c.layers), len(c.positions)) if SITES[site].layered else (len(c.positions),)
            files[site] = ShardFile(outer, self.samples, c.widths[site], c.dtype)
        object.__setattr__(self, "files", files)

    @property
    def shard_bytes(self) -> int:
        """Bytes of one shard of all sites and `embed`: what one shard buffer takes in memory."""
        return sum(file.size for file in self.files.values())

    def data_file(self, site: str, shard: int) -> str:
        return f"{site}/c.{'0.' * len(self.files[site].outer)}{shard}.0"

    def row_crc_file(self, site: str, shard: int) -> str:
        return f"{ROW_CRC}/{site}/c.{'0.' * len(self.files[site].outer)}{shard}"

    @staticmethod
    def samples_file(shard: int) -> str:
        return f"samples/{shard}.parquet"

    def files_of(self, shard: int) -> list[str]:
        """The files that a commit vouches for."""
        return [
            *(self.data_file(site, shard) for site in self.files),
            *(self.row_crc_file(site, shard) for site in self.files),
            self.samples_file(shard),
        ]

    @staticmethod
    def derived_files(shard: int) -> dict[str, str]:
        """Chunks that repeat what samples/ and commits/ say, for readers that know Zarr only."""
        return {
            "token_index": f"token_index/c.0.{shard}",
            "in_answer": f"in_answer/c.0.{shard}",
            "committed": f"committed/c.{shard}",
            "sample": f"sample/c.{shard}",
        }

    def shard_of(self, file: str) -> int | None:
        """The shard that a file's path belongs to, or None when it belongs to no shard."""
        for number in re.findall(r"\d+", file)[-2:]:
            shard = int(number)
            if file in self.files_of(shard) or file in self.derived_files(shard).values():
                return shard
        return None

    def arrays(self, shards: int) -> dict[str, dict[str, Any]]:
        """The zarr.json of every array and sub-group, by path, for a sample axis of `shards` shards."""
        c, B, N = self.coverage, self.samples, self.samples * shards
        L, P = len(c.layers), len(c.positions)
        documents = {}
        for site, file in self.files.items():
            shape = (*file.outer, N, file.width)
            names = (*_outer_names(site), "sample", SITES[site].width)
            inner = (*(1 for _ in file.outer), B, file.width)
            documents[site] = _array(
                shape, c.dtype, (*file.outer, B, file.width), "NaN", names, [_sharding(inner)], SITES[site].meaning
            )
        documents[ROW_CRC] = {"zarr_format": 3, "node_type": "group", "attributes": {}}
        for site, file in self.files.items():
            documents[f"{ROW_CRC}/{site}"] = _array(
                (*file.outer, N), "uint32", (*file.outer, B), 0, (*_outer_names(site), "sample"), _BYTES,
                "crc32c of each row's bytes",
            )  # fmt: skip
        if L:
            documents["layer"] = _array((L,), "int64", (L,), 0, ("layer",), _BYTES, "0-based block index")
        # Captures without poolings keep the words that they were made with.
        token = "index into prompt + answer, -1 if absent" + ", -2 if pooled" * any(p in POOLS for p in c.positions)
        documents |= {
            "position": _array((P,), "string", (P,), "", ("position",), _STRINGS, "named token"),
            "sample": _array((N,), "string", (B,), "", ("sample",), _STRINGS, "sample key, empty in a free slot"),
            "token_index": _array((P, N), "int32", (P, B), -1, ("position", "sample"), _BYTES, token),
            "in_answer": _array(
                (P, N), "bool", (P, B), False, ("position", "sample"), _BYTES, "whether the token lies in the answer"
            ),
            "committed": _array((N,), "bool", (B,), False, ("sample",), _BYTES, "whether the slot holds a sample"),
        }
        return documents

    def root(self, shards: int, facts: dict[str, Any]) -> dict[str, Any]:
        """The capture's zarr.json: `facts` under one attribute, and the metadata of every array, consolidated."""
        return {
            "zarr_format": 3,
            "node_type": "group",
            "attributes": {"hiddenlake": facts},
            "consolidated_metadata": {
                "kind": "inline",
                "must_understand": False,
                "metadata": dict(sorted(self.arrays(shards).items())),
            },
        }

    def folders(self) -> Iterator[str]:
        """Folders that hold files other than arrays' chunks."""
        yield from ("samples", "labels", "failures", "claims", "commits", "writers")

    def coordinates(self) -> dict[str, bytes]:
        """Files of the two coordinates that never change."""
        c = self.coverage
        layers = {"layer/c.0": encode_numbers(np.asarray(c.layers, "<i8"))} if c.layers else {}
        return layers | {"position/c.0": encode_strings(c.positions)}


def encode_strings(values: tuple[str, ...] | list[str]) -> bytes:
    """A chunk of strings: vlen-utf8 and its crc32c."""
    # Local: numcodecs takes longer to import than the rest of this module.
    from numcodecs import VLenUTF8

    raw = bytes(VLenUTF8().encode(np.array(values, dtype=object)))
    return raw + crc32c(raw).to_bytes(4, "little")


def encode_numbers(values: np.ndarray) -> bytes:
    """A chunk of numbers: C order, little-endian, and its crc32c."""
    raw = np.ascontiguousarray(values).tobytes()
    return raw + crc32c(raw).to_bytes(4, "little")


def to_json_bytes(document: Any) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode() + b"\n"


def sign(body: dict[str, Any]) -> dict[str, Any]:
    """A JSON object with the crc32c of its canonical text beside its fields."""
    return body | {"crc32c": crc32c(_canonical(body))}


def check_signed(document: Any, file: str) -> dict[str, Any]:
    """The fields of a signed JSON object. Raises CorruptError that names `file`."""
    if not isinstance(document, dict) or "crc32c" not in document:
        raise CorruptError(f"{file}: no crc32c field: the file is damaged; restore it from a copy")
    body = {name: value for name, value in document.items() if name != "crc32c"}
    found = crc32c(_canonical(body))
    if found != document["crc32c"]:
        raise CorruptError(
            f"{file}: its content has crc32c {found:#010x}, but {document['crc32c']} was recorded in it: "
            f"the file is damaged; restore it from a copy"
        )
    return body


def _canonical(body: Any) -> bytes:
    return json.dumps(body, sort_keys=True, separators=(",", ":"), ensure_ascii=True).encode()


def shard_samples(coverage: Coverage, planned: int, buffer_bytes: int) -> int:
    """B: the smallest power of two that makes the narrowest site's chunk at least 256 KiB.

    It is no larger than the planned samples need, and small enough for two shard buffers in `buffer_bytes`.

    Raises StoreError when not even one sample a shard fits.
    """
    narrowest = min(ShardFile((1,), 1, width, coverage.dtype).row_bytes for width in coverage.widths.values())
    wanted = _power_of_two(-(-CHUNK_BYTES // narrowest))
    samples = min(wanted, _power_of_two(max(1, planned)))
    while samples > 1 and BUFFERS * Layout(coverage, samples).shard_bytes > buffer_bytes:
        samples //= 2
    check_buffers(Layout(coverage, samples), buffer_bytes)
    return samples


def check_buffers(layout: Layout, buffer_bytes: int) -> None:
    """Raise StoreError unless two shard buffers fit in `buffer_bytes`."""
    needed = BUFFERS * layout.shard_bytes
    if needed > buffer_bytes:
        c = layout.coverage
        raise StoreError(
            f"two shard buffers of {layout.samples} samples a shard x {len(c.layers)} layers x {len(c.positions)} "
            f"positions x {len(c.sites)} sites take {needed / 2**20:.1f} MiB, but the buffer may take "
            f"{buffer_bytes / 2**20:.1f} MiB: allow more buffer memory, or capture fewer layers, positions or sites"
        )


def _power_of_two(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _outer_names(site: str) -> tuple[str, ...]:
    return ("layer", "position") if SITES[site].layered else ("position",)


_BYTES = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
_STRINGS = [{"name": "vlen-utf8"}, {"name": "crc32c"}]


def _sharding(inner: tuple[int, ...]) -> dict[str, Any]:
    return {
        "name": "sharding_indexed",
        "configuration": {
            "chunk_shape": list(inner),
            "codecs": _BYTES,
            "index_codecs": _BYTES,
            "index_location": "end",
        },
    }


def _array(
    shape: tuple[int, ...],
    data_type: str,
    chunk: tuple[int, ...],
    fill: Any,
    names: tuple[str, ...],
    codecs: list[dict[str, Any]],
    meaning: str,
) -> dict[str, Any]:
    return {
        "zarr_format": 3,
        "node_type": "array",
        "shape": list(shape),
        "data_type": data_type,
        "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
        # Dots: all shards of an array lie in one folder, which is fsynced once a shard.
        "chunk_key_encoding": {"name": "default", "configuration": {"separator": "."}},
        "fill_value": fill,
        "codecs": codecs,
        "attributes": {"long_name": meaning},
        "dimension_names": list(names),
    }
