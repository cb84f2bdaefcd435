"""Export as safetensors shards and a Parquet index: the layout that users of the Hugging Face hub expect.

    index.parquet                                       a row a sample, with `shard` and `shard_row`
    <site>/layer_<l>-<shard>-of-<n>.safetensors         `activations` (sample, position, width)
    <site>/<site>-<shard>-of-<n>.safetensors            the same of a site without layers
    tokens/<site>/...                                   `activations` (token, width): `token_shard`, `token_row`
    README.md                                           a dataset card, whose viewer shows the index
    manifest.json                                       identity, coverage, and each file's bytes and SHA-256

Bits are those of the store, bfloat16 as BF16, float16 as F16. Neither torch nor safetensors is needed to write it.
"""

import json
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.exchange.card import card
from hiddenlake.cache.exchange.plan import Plan, Shards, cut, shard_name
from hiddenlake.cache.exchange.selection import Part, Selection, pack_even
from hiddenlake.cache.exchange.target import Target
from hiddenlake.cache.exchange.tensor_file import header
from hiddenlake.cache.exchange.values import NAMES

ACTIVATIONS = "activations"
_DTYPE = {own: name for name, own in NAMES.items()}

# A block is read as (position, sample, width) and turned into (sample, position, width): two copies, and what the
# reader holds while it checks them.
_COPIES = 4


def plan(selection: Selection, shard_bytes: int, memory_bytes: int) -> Plan:
    """The files of an export.

    shard_bytes : largest file of the widest site; whole samples, so a larger one has a file of its own.
    """
    shards = cut(selection, shard_bytes)
    block = memory_bytes // _COPIES
    largest = max(part.width for part in selection.parts) * selection.itemsize * len(selection.positions)
    if largest > block:
        raise BadInputError(
            f"one sample of one layer takes {largest} bytes, {_COPIES} times that does not fit in {memory_bytes} bytes "
            f"of memory: raise --memory-bytes, or name fewer positions"
        )
    return Plan(
        data_bytes=selection.values * selection.itemsize,
        files=shards.count * len(selection.parts),
        memory_bytes=memory_bytes,
        facts={"format": "safetensors", "dtype": selection.dtype} | layout_facts(shards),
        write=lambda target, progress: _write(selection, shards, target, progress, block),
        places=shards.places(selection),
        card=card(selection, shards),
    )


def layout_facts(shards: Shards) -> dict[str, int]:
    """What a program needs beside the sites and layers to name every file."""
    return {"cell_shards": len(shards.cells), "token_shards": len(shards.tokens)}


def cell_blocks(selection: Selection, part: Part, rows: range, limit: int) -> Iterator[np.ndarray]:
    """(sample, position, width) of some rows, as stored, at most about `limit` bytes at a time."""
    sample_bytes = len(selection.positions) * part.width * selection.itemsize
    for start, stop in pack_even(len(rows), sample_bytes, limit):
        block = selection.cells(part, rows[start:stop])
        yield np.ascontiguousarray(block.swapaxes(0, 1))


def _write(selection: Selection, shards: Shards, target: Target, progress: Callable[[int], None], block: int) -> None:
    dtype = _DTYPE[selection.dtype]
    keys = selection.samples["key"]
    for part in selection.parts:
        for number, rows in enumerate(shards.cells, 1):
            shape = (len(rows), len(selection.positions), part.width)
            facts = {"positions": json.dumps(selection.positions), "axes": "sample,position,width"}
            blocks = cell_blocks(selection, part, rows, block)
            name = shard_name(part.name, number, len(shards.cells), "safetensors")
            _write_file(selection, part, target, name, (dtype, shape), facts | _range(keys, rows), blocks, progress)
        for number, rows in enumerate(shards.tokens, 1):
            shape = (int(selection.lengths[rows.start : rows.stop].sum()), part.width)
            facts = {"tokens": str(selection.tokens), "axes": "token,width"}
            blocks = selection.token_blocks(part, rows, block)
            name = shard_name(f"tokens/{part.name}", number, len(shards.tokens), "safetensors")
            _write_file(selection, part, target, name, (dtype, shape), facts | _range(keys, rows), blocks, progress)


def _write_file(
    selection: Selection,
    part: Part,
    target: Target,
    name: str,
    tensor: tuple[str, tuple[int, ...]],
    facts: dict[str, str],
    blocks: Iterator[np.ndarray],
    progress: Callable[[int], None],
) -> None:
    metadata = {
        # the key that Hugging Face's own loaders look at: the tensors are laid out as torch lays them out
        "format": "pt",
        "identity": json.dumps(selection.capture.identity, ensure_ascii=False, sort_keys=True),
        "site": part.site,
        **({} if part.layer is None else {"layer": str(part.layer)}),
        **facts,
    }
    with target.open(name) as file:
        start = file.write(header({ACTIVATIONS: tensor}, metadata))
        for values in blocks:
            progress(file.write(values))
        expected = int(np.prod(tensor[1], dtype=np.int64)) * selection.itemsize
        if file.size - start != expected:
            raise RuntimeError(f"{name}: {file.size - start} bytes of activations were read, {expected} were planned")


def _range(keys: Any, rows: range) -> dict[str, str]:
    return {
        "first_row": str(rows.start),
        "rows": str(len(rows)),
        "first_key": keys[rows.start].as_py(),
        "last_key": keys[rows.stop - 1].as_py(),
    }
