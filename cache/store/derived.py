"""Derived files: metadata and per-sample arrays that repeat what commits and samples say.

Readers that know only Zarr need them; ours does not. Whatever is missing or different is rebuilt.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from hiddenlake.cache.positions import ABSENT, in_answer
from hiddenlake.cache.store.commits import Commit, read_checked
from hiddenlake.cache.store.files import write_atomic
from hiddenlake.cache.store.layout import Layout, encode_numbers, encode_strings
from hiddenlake.cache.store.root import Root
from hiddenlake.cache.store.tables import decode


def derived_chunks(
    layout: Layout,
    shard: int,
    slots: Sequence[int],
    keys: Sequence[str],
    token_index: Sequence[Sequence[int]],
    prompt_length: Sequence[int],
) -> dict[str, bytes]:
    """The chunks of `sample`, `token_index`, `in_answer` and `committed` of one shard, by file.

    slots, keys, token_index, prompt_length : one entry a sample; token_index is (sample, position).
    """
    B = layout.samples
    names = [""] * B
    tokens = np.full((len(layout.coverage.positions), B), ABSENT, "<i4")
    lengths = np.zeros(B, np.int64)
    committed = np.zeros(B, bool)
    for slot, key, index, length in zip(slots, keys, token_index, prompt_length, strict=True):
        names[slot], tokens[:, slot], lengths[slot], committed[slot] = key, index, length, True
    files = layout.derived_files(shard)
    return {
        files["sample"]: encode_strings(names),
        files["token_index"]: encode_numbers(tokens),
        files["in_answer"]: encode_numbers(in_answer(layout.coverage.positions, tokens, lengths) & (tokens != ABSENT)),
        files["committed"]: encode_numbers(committed),
    }


def derived_chunks_of(path: Path, layout: Layout, commit: Commit) -> dict[str, bytes]:
    """The same, from what a commit vouches for. Raises CorruptError."""
    name = layout.samples_file(commit.shard)
    columns = ["slot", "key", "token_index", "prompt_length"]
    table = decode(read_checked(path, commit, name), path / name, columns)
    return derived_chunks(layout, commit.shard, *(table[column].to_pylist() for column in columns))


def differs(path: Path, name: str, data: bytes) -> bool:
    """Whether a derived file is missing or holds other bytes."""
    try:
        return (path / name).read_bytes() != data
    except FileNotFoundError:
        return True


def rebuild(path: Path, root: Root, commits: Sequence[Commit]) -> None:
    """Write every derived file that is missing or different. Call it under the capture's lock."""
    layout = root.layout
    for name, data in (root.files() | layout.coordinates()).items():
        if differs(path, name, data):
            write_atomic(path / name, data)
    for commit in commits:
        for name, data in derived_chunks_of(path, layout, commit).items():
            if differs(path, name, data):
                write_atomic(path / name, data)
