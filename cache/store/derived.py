"""Derived files: metadata and per-sample arrays that repeat what commits and samples say.

Readers that know only Zarr need them; ours does not. Whatever is missing or different is rebuilt.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from hiddenlake.cache.errors import CorruptError
from hiddenlake.cache.positions import ABSENT, in_answer
from hiddenlake.cache.store.backend import Backend
from hiddenlake.cache.store.commits import Commit, read_checked, remedy
from hiddenlake.cache.store.layout import Layout, encode_numbers, encode_strings
from hiddenlake.cache.store.root import Root
from hiddenlake.cache.store.tables import check_rows, decode

if TYPE_CHECKING:
    import pyarrow


def derived_chunks(layout: Layout, commit: Commit, cells: Mapping[int, tuple[Sequence[int], int]]) -> dict[str, bytes]:
    """The chunks that repeat what is known of one shard's samples, by file.

    cells : slot -> token_index, (position,), and prompt length of each sample.
    """
    B, positions = layout.samples, layout.coverage.positions
    files = layout.derived_files(commit.shard)
    chunks = {
        files["sample"]: encode_strings([key or "" for key in commit.keys]),
        files["committed"]: encode_numbers(np.array([key is not None for key in commit.keys])),
    }
    if positions:
        index, lengths = np.full((len(positions), B), ABSENT, "<i4"), np.zeros(B, np.int64)
        for slot, (token_index, length) in cells.items():
            index[:, slot], lengths[slot] = token_index, length
        inside = in_answer(positions, index, lengths) & (index != ABSENT)
        chunks |= {files["token_index"]: encode_numbers(index), files["in_answer"]: encode_numbers(inside)}
    if layout.coverage.tokens:
        spans = np.array([span or (-1, 0) for span in commit.spans])
        chunks |= {
            files["sample_start"]: encode_numbers(spans[:, 0].astype("<i8")),
            files["sample_length"]: encode_numbers(spans[:, 1].astype("<i4")),
        }
    return chunks


def cells_of(table: "pyarrow.Table") -> dict[int, tuple[Sequence[int], int]]:
    """What `derived_chunks` wants to know, from samples/<shard>.parquet."""
    columns = (table[name].to_pylist() for name in ("slot", "token_index", "prompt_length"))
    return {slot: (index, length) for slot, index, length in zip(*columns, strict=True)}


def _derived_chunks_of(place: Backend, layout: Layout, commit: Commit) -> dict[str, bytes]:
    name = layout.samples_file(commit.shard)
    raw = read_checked(place, name, commit.files[name], [commit.shard])
    table = decode(raw, f"{place}/{name}", ["slot", "token_index", "prompt_length"])
    try:
        check_rows(table, layout)
    except ValueError as error:
        raise CorruptError(f"{place}/{name}: {error}: {remedy(place, [commit.shard])}") from error
    return derived_chunks(layout, commit, cells_of(table))


def differs(place: Backend, name: str, data: bytes) -> bool:
    """Whether a derived file is missing or holds other bytes."""
    try:
        return place.size(name) != len(data) or place.read(name) != data
    except FileNotFoundError:
        return True


def rebuild(place: Backend, root: Root, commits: Sequence[Commit]) -> list[str]:
    """Write every derived file that is missing or different. Call it under the capture's lock. Returns which."""
    layout, wrong = root.layout, {}
    for name, data in (root.files() | layout.coordinates()).items():
        if differs(place, name, data):
            wrong[name] = data
    for commit in commits:
        if commit.files:
            for name, data in _derived_chunks_of(place, layout, commit).items():
                if differs(place, name, data):
                    wrong[name] = data
    for name, data in wrong.items():
        place.write(name, data)
    return list(wrong)
