"""Export as torch files that are read without running anything: `torch.load(file, weights_only=True)`.

The layout is that of the safetensors export, with `.pt` for `.safetensors`. Each file is a dict of plain things: the
tensor `activations`, and `site`, `layer`, `positions` (or `tokens`), `keys` and `first_row` as str, int and lists.

torch has no file of tensors without a pickle program in it: `torch.save` writes a zip archive whose `data.pkl` says how
tensors are put together from the raw bytes beside it. What makes pickle dangerous is that a program may name any
function; `weights_only=True`, torch's default since 2.6, refuses all but a fixed list. The programs written here name
torch's own tensor rebuilder, storage type and OrderedDict and nothing else, which is tested. Where no pickle at all may
be read, the safetensors export is the one to take: `safetensors.torch.load_file` needs none.
"""

import io
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.exchange.plan import Plan, Shards, cut, shard_name
from hiddenlake.cache.exchange.safetensors import cell_blocks, layout_facts
from hiddenlake.cache.exchange.selection import Selection
from hiddenlake.cache.exchange.target import Target

# The tensor, the archive in memory while it grows, and the block being read.
_COPIES = 5


def plan(selection: Selection, shard_bytes: int, memory_bytes: int) -> Plan:
    """The files of an export. A file is made in memory, so it is no larger than a fifth of `memory_bytes`.

    Raises BadInputError without torch, or where one sample does not fit.
    """
    try:
        import torch  # noqa: F401
    except ImportError as error:
        raise BadInputError(
            f"torch files need torch, which cannot be imported ({error}): install `hiddenlake[transformers]`, or export "
            f"safetensors, which torch reads with `safetensors.torch.load_file`"
        ) from error
    limit = min(shard_bytes, memory_bytes // _COPIES)
    row_bytes = max(part.width for part in selection.parts) * selection.itemsize
    largest = max(len(selection.positions), int(selection.lengths.max())) * row_bytes
    if largest > memory_bytes // _COPIES:
        raise BadInputError(
            f"one sample of one layer takes {largest} bytes, {_COPIES} times that does not fit in {memory_bytes} bytes "
            f"of memory: raise --memory-bytes, name fewer positions, or export safetensors"
        )
    shards = cut(selection, limit)
    return Plan(
        data_bytes=selection.values * selection.itemsize,
        files=shards.count * len(selection.parts),
        memory_bytes=memory_bytes,
        facts={"format": "torch", "dtype": selection.dtype} | layout_facts(shards),
        write=lambda target, progress: _write(selection, shards, target, progress, limit),
        places=shards.places(selection),
        note="read them with torch.load(file, weights_only=True)",
    )


def _write(selection: Selection, shards: Shards, target: Target, progress: Callable[[int], None], limit: int) -> None:
    keys = selection.samples["key"]
    for part in selection.parts:
        facts: dict[str, Any] = {"site": part.site} | ({} if part.layer is None else {"layer": part.layer})
        for number, rows in enumerate(shards.cells, 1):
            shape = (len(rows), len(selection.positions), part.width)
            _write_file(
                target,
                shard_name(part.name, number, len(shards.cells), "pt"),
                _gathered(selection, shape, cell_blocks(selection, part, rows, max(1, limit // 4))),
                selection.dtype,
                facts | {"positions": list(selection.positions)} | _rows(keys, rows),
                progress,
            )
        for number, rows in enumerate(shards.tokens, 1):
            shape = (int(selection.lengths[rows.start : rows.stop].sum()), part.width)
            _write_file(
                target,
                shard_name(f"tokens/{part.name}", number, len(shards.tokens), "pt"),
                _gathered(selection, shape, selection.token_blocks(part, rows, max(1, limit // 4))),
                selection.dtype,
                facts | {"tokens": str(selection.tokens)} | _rows(keys, rows),
                progress,
            )


def _gathered(selection: Selection, shape: tuple[int, ...], blocks: Iterable[np.ndarray]) -> np.ndarray:
    """All blocks as one array of bits: int16 for the half-wide types, which torch can take over without a copy."""
    out = np.empty(shape, np.float32 if selection.itemsize == 4 else np.int16)
    done = 0
    for values in blocks:
        out[done : done + len(values)] = values.view(out.dtype)
        done += len(values)
    if done != len(out):
        raise RuntimeError(f"{done} rows of activations were read, {len(out)} were planned")
    return out


def _write_file(
    target: Target, name: str, bits: np.ndarray, dtype: str, facts: dict[str, Any], progress: Callable[[int], None]
) -> None:
    import torch

    tensor = torch.from_numpy(bits).view(getattr(torch, dtype))
    archive = io.BytesIO()
    torch.save({"activations": tensor, **facts}, archive)
    with target.open(name) as file:
        file.write(archive.getbuffer())
    progress(bits.nbytes)


def _rows(keys: Any, rows: range) -> dict[str, Any]:
    return {"first_row": rows.start, "keys": keys.slice(rows.start, len(rows)).to_pylist()}
