"""Export as .npy files, which anything that knows NumPy maps into memory.

    <site>/layer_<l>.npy          (position, sample, width), float32: a cell `[p]` is one contiguous matrix
    <site>/<site>.npy             the same of a site without layers
    tokens/<site>/layer_<l>.npy   (token, width), float32
    keys.parquet                  a row a sample, with `row`, and `token_row` and `token_count`
    manifest.json                 identity, positions, and each file's bytes and SHA-256

NumPy has no bfloat16: what is half as wide is widened to float32, exactly, which doubles it. The file says so nowhere, the manifest does.
"""

import io
from collections.abc import Callable, Iterator

import numpy as np

from hiddenlake.cache.exchange.plan import Plan
from hiddenlake.cache.exchange.selection import Part, Selection, pack_even
from hiddenlake.cache.exchange.target import Target

# A block as float32, and beside it the stored bits and what the reader holds while it checks them.
_COPIES = 4


def plan(selection: Selection, shard_bytes: int, memory_bytes: int) -> Plan:
    """The files of an export: one a site and layer, whatever `shard_bytes` is, so that one map holds a cell."""
    facts = {"format": "npy", "dtype": "float32", "stored_dtype": selection.dtype}
    kinds = bool(selection.positions) + bool(selection.tokens)
    places = {}
    if selection.tokens:
        places = {"token_row": np.cumsum(selection.lengths) - selection.lengths, "token_count": selection.lengths}
    widened = "" if selection.itemsize == 4 else f"{selection.dtype} is widened to float32, exactly: twice the bytes"
    return Plan(
        data_bytes=selection.values * 4,
        files=kinds * len(selection.parts),
        memory_bytes=memory_bytes,
        facts=facts,
        write=lambda target, progress: _write(selection, target, progress, memory_bytes // _COPIES),
        places=places,
        index="keys.parquet",
        note=widened,
    )


def _write(selection: Selection, target: Target, progress: Callable[[int], None], block: int) -> None:
    count = len(selection)
    for part in selection.parts:
        if selection.positions:
            shape = (len(selection.positions), count, part.width)
            _write_file(target, f"{part.name}.npy", shape, _cells(selection, part, block), progress)
        if selection.tokens:
            shape = (int(selection.lengths.sum()), part.width)
            rows = selection.token_blocks(part, range(count), block, "float32")
            _write_file(target, f"tokens/{part.name}.npy", shape, rows, progress)


def _cells(selection: Selection, part: Part, block: int) -> Iterator[np.ndarray]:
    """A position behind the other, so that the file is written front to back."""
    for position in selection.positions:
        for start, stop in pack_even(len(selection), part.width * 4, block):
            yield selection.cells(part, range(start, stop), "float32", [position])[0]


def _write_file(
    target: Target, name: str, shape: tuple[int, ...], blocks: Iterator[np.ndarray], progress: Callable[[int], None]
) -> None:
    # Written and not mapped: on a full disk a write fails, where a map would kill the process.
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f4", "fortran_order": False, "shape": shape})
    with target.open(name) as file:
        start = file.write(head.getvalue())
        for values in blocks:
            progress(file.write(np.ascontiguousarray(values)))
        if file.size - start != 4 * int(np.prod(shape, dtype=np.int64)):
            raise RuntimeError(f"{name}: {file.size - start} bytes were read, expected those of {shape}")
