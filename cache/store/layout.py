"""The layout of one capture: which files it has, and where each byte of a shard lies.

L layers, P positions, N samples, B samples a shard, T tokens a chunk, W width of a site. Nothing here touches a file.
"""

import re
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field, replace

import numpy as np
from crc32c import crc32c

from hiddenlake.cache.sites import SITES
from hiddenlake.cache.store.coverage import EMBED, Coverage
from hiddenlake.cache.store.shard_file import CODECS, ShardFile

ROW_CRC = "row_crc"
TOKENS = "tokens"
SCALE = "scale"

# One buffer fills while the other is written.
BUFFERS = 2

# Samples, tokens and elements of a chunk, and chunks of a shard file: far beyond any model, and far below what a few bytes
# of damaged metadata could ask a reader to allocate.
_MOST = (1 << 16, 1 << 20, 1 << 22, 1 << 20)


@dataclass(frozen=True)
class Layout:
    """Everything that coverage and the sizes of shards decide about a capture's files.

    coverage : what is stored.  samples : B.
    chunk_tokens, shard_tokens : T, and tokens a token shard, a multiple of T; 0 without token-level data.
    codec : of all activations, one of CODECS.
    files, token_files : site -> its file in a sample shard, and in a token shard whose chunks are all there.
    """

    coverage: Coverage
    samples: int
    chunk_tokens: int = 0
    shard_tokens: int = 0
    codec: str = "none"
    files: dict[str, ShardFile] = field(init=False, compare=False)
    token_files: dict[str, ShardFile] = field(init=False, compare=False)

    def __post_init__(self) -> None:
        c, T, K = self.coverage, self.chunk_tokens, self.shard_tokens
        if (T < 1 or K < T or K % T) if c.tokens else (T or K):
            raise ValueError(
                f"{K} tokens a shard in chunks of {T}: expected a multiple of the chunk where the coverage has tokens, "
                f"and 0 where it has none"
            )
        if self.codec not in CODECS:
            raise ValueError(f"codec {self.codec!r}: expected one of {', '.join(CODECS)}")
        if any(type(number) is not int for number in (self.samples, T, K)):
            raise ValueError(f"samples {self.samples!r} and tokens {T!r} of {K!r}: expected whole numbers")
        chunks = max(1, len(c.layers)) * max(len(c.positions), K // T if T else 0)
        sizes = (self.samples, T, max(c.widths.values()), chunks)
        if self.samples < 1 or any(size > most for size, most in zip(sizes, _MOST, strict=True)):
            raise ValueError(f"samples, chunk_tokens, width and chunks a shard are {sizes}: expected at most {_MOST}")
        cells, tokens = {}, {}
        for site in (*c.sites, EMBED):
            layers = (len(c.layers),) if SITES[site].layered else ()
            if c.positions:
                cells[site] = ShardFile(
                    (*layers, len(c.positions)), self.samples, c.widths[site], c.dtype, None, self.codec
                )
            if T:
                tokens[site] = ShardFile((*layers, K // T), T, c.widths[site], c.dtype, None, self.codec)
        object.__setattr__(self, "files", cells)
        object.__setattr__(self, "token_files", tokens)

    @property
    def shard_bytes(self) -> int:
        """Bytes of one shard of all sites and `embed`, before a codec: what one shard buffer takes in memory."""
        return sum(replace(file, codec="none").size for file in self.files.values())

    @property
    def token_shard_bytes(self) -> int:
        """The same of a token shard whose chunks are all there."""
        return sum(replace(file, codec="none").size for file in self.token_files.values())

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of all layers and sites and `embed`, in token-level data."""
        return -(-self.token_shard_bytes // self.shard_tokens) if self.shard_tokens else 0

    @property
    def buffer_bytes(self) -> int:
        """Bytes that a writer's buffers take in memory."""
        return BUFFERS * (self.shard_bytes + self.token_shard_bytes)

    def data_file(self, site: str, shard: int) -> str:
        return f"{site}/c.{'0.' * len(self.files[site].outer)}{shard}.0"

    def row_crc_file(self, site: str, shard: int) -> str:
        return f"{ROW_CRC}/{site}/c.{'0.' * len(self.files[site].outer)}{shard}"

    def token_data_file(self, site: str, shard: int) -> str:
        return f"{TOKENS}/{site}/c.{'0.' * SITES[site].layered}{shard}.0"

    def token_row_crc_file(self, site: str, shard: int) -> str:
        return f"{ROW_CRC}/{TOKENS}/{site}/c.{'0.' * SITES[site].layered}{shard}"

    def scale_file(self, site: str, shard: int) -> str:
        return f"{SCALE}/{site}/c.{'0.' * len(self.files[site].outer)}{shard}"

    def token_scale_file(self, site: str, shard: int) -> str:
        return f"{SCALE}/{TOKENS}/{site}/c.{'0.' * SITES[site].layered}{shard}"

    def cell_names(self, site: str, shard: int) -> tuple[str, str, str]:
        """A site's files in a sample shard: data, row checksums, and scales, which only fp8 has."""
        return self.data_file(site, shard), self.row_crc_file(site, shard), self.scale_file(site, shard)

    def token_names(self, site: str, shard: int) -> tuple[str, str, str]:
        """The same in a token shard."""
        names = self.token_data_file(site, shard), self.token_row_crc_file(site, shard)
        return *names, self.token_scale_file(site, shard)

    @staticmethod
    def samples_file(shard: int) -> str:
        return f"samples/{shard}.parquet"

    def files_of(self, shard: int) -> list[str]:
        """The files of a sample shard, which its commit vouches for."""
        return [
            *(self.data_file(site, shard) for site in self.files),
            *(self.row_crc_file(site, shard) for site in self.files),
            *(self.scale_file(site, shard) for site in self.files if self.codec == "fp8"),
            self.samples_file(shard),
        ]

    def token_files_of(self, shard: int) -> list[str]:
        """The files of a token shard, for which every commit vouches that has tokens in it."""
        return [
            *(self.token_data_file(site, shard) for site in self.token_files),
            *(self.token_row_crc_file(site, shard) for site in self.token_files),
            *(self.token_scale_file(site, shard) for site in self.token_files if self.codec == "fp8"),
        ]

    def derived_files(self, shard: int) -> dict[str, str]:
        """Chunks that repeat what samples/ and commits/ say, for readers that know Zarr only."""
        files = {"committed": f"committed/c.{shard}", "sample": f"sample/c.{shard}"}
        if self.files:
            files |= {"token_index": f"token_index/c.0.{shard}", "in_answer": f"in_answer/c.0.{shard}"}
        if self.token_files:
            files |= {name: f"{TOKENS}/{name}/c.{shard}" for name in ("sample_start", "sample_length")}
        return files

    def shard_of(self, file: str) -> int | None:
        """The sample shard that a file's path belongs to, or None when it belongs to none."""
        return _number(file, lambda k: {*self.files_of(k), *self.derived_files(k).values()})

    def token_shard_of(self, file: str) -> int | None:
        """The token shard that a file's path belongs to, or None when it belongs to none."""
        return _number(file, self.token_files_of)

    def token_shards_of(self, start: int, length: int) -> range:
        """The token shards that a span of the token axis lies in."""
        if not length:
            return range(0)
        return range(start // self.shard_tokens, (start + length - 1) // self.shard_tokens + 1)

    def folders(self) -> Iterator[str]:
        """Folders that hold files other than arrays' chunks."""
        yield from ("samples", "labels", "failures", "claims", "commits", "writers")

    def coordinates(self) -> dict[str, bytes]:
        """Files of the two coordinates that never change."""
        c = self.coverage
        layers = {"layer/c.0": encode_numbers(np.asarray(c.layers, "<i8"))} if c.layers else {}
        return layers | ({"position/c.0": encode_strings(c.positions)} if c.positions else {})


def _number(file: str, files_of: Callable[[int], Container[str]]) -> int | None:
    for number in re.findall(r"\d+", file)[-2:]:
        if file in files_of(int(number)):
            return int(number)
    return None


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
