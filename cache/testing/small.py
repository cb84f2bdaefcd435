"""A small capture whose every bit is a function of a sample's number and a site."""

import zlib
from typing import Any

import ml_dtypes
import numpy as np

from hiddenlake.cache.positions import ABSENT, Tokens, resolve
from hiddenlake.cache.samples import Sample
from hiddenlake.cache.sites import SITES
from hiddenlake.cache.store import fp8
from hiddenlake.cache.store.backend import Backend
from hiddenlake.cache.store.coverage import DTYPES, Coverage
from hiddenlake.cache.store.writer import Writer, open_writer

SHARD_SAMPLES = 4
LAYERS = (0, 3)
POSITIONS = ("last_q", "second_answer", "-1")
KINDS = ("cells", "tokens", "both")
IDENTITY = {"model": "small", "task": "numbers"}
_WIDTHS = {"hidden": 24, "d_mlp": 40}


def coverage(kind: str, dtype: str = "bfloat16") -> Coverage:
    """kind : one of KINDS, what is stored."""
    sites = ("mlp_act", "resid_post")
    widths = {site: _WIDTHS[SITES[site].width] for site in ("embed", *sites)}
    tokens = None if kind == "cells" else Tokens("all", 1)
    return Coverage(sites, LAYERS, () if kind == "tokens" else POSITIONS, widths, dtype, tokens)


def key(i: int) -> str:
    return f"key-{i:04d}"


def sample(i: int, positions: tuple[str, ...]) -> Sample:
    """Prompts and answers of several lengths; answers of none or one token lack some positions."""
    prompt, answer = 2 + i % 3, 30 if i % 7 == 5 else i % 4
    total = prompt + answer
    index = tuple(resolve(positions, prompt, total, None).tolist())
    return Sample(
        key(i), i // 2, i % 2, f"group {i % 3}", f"prompt é {i}", f"answer {i}", ("a", "b"), i % 2 == 0, None, False,
        tuple(range(i, i + total)), (-0.5,) * answer, prompt, total, "stop", index,
    )  # fmt: skip


def _values(i: int, what: str, shape: tuple[int, ...], dtype: str) -> np.ndarray:
    """Values of a dtype, of any size, none of them special."""
    found = np.random.default_rng([i, zlib.crc32(what.encode())]).normal(size=shape).astype(np.float32)
    return found.astype(DTYPES[dtype][1])


def cells(i: int, c: Coverage) -> dict[str, np.ndarray]:
    """site -> ([layer,] position, width) of the coverage's dtype; NaN where the token is absent."""
    absent = np.array(sample(i, c.positions).token_index) == ABSENT
    found = {}
    for site, width in c.widths.items():
        layers = (len(c.layers),) * SITES[site].layered
        found[site] = _values(i, site, (*layers, len(c.positions), width), c.dtype)
        found[site].view(DTYPES[c.dtype][0])[..., absent, :] = DTYPES[c.dtype][2]
    return found


def tokens(i: int, c: Coverage) -> dict[str, np.ndarray]:
    """site -> ([layer,] token, width) of the coverage's dtype."""
    count = sample(i, c.positions).total_length
    return {
        site: _values(i, f"tokens {site}", (*(len(c.layers),) * SITES[site].layered, count, width), c.dtype)
        for site, width in c.widths.items()
    }


def through(values: np.ndarray, codec: str) -> np.ndarray:
    """What a codec keeps of values, as they are read back in their own dtype."""
    if codec != "fp8":
        return values
    name = {np.dtype(ml_dtypes.bfloat16): "bfloat16"}.get(values.dtype, values.dtype.name)
    return fp8.decode(*fp8.encode(np.ascontiguousarray(values)), name)


def open_small(place: Backend, samples: int, kind: str, dtype: str = "bfloat16", codec: str = "none") -> Writer:
    """A writer of the capture, of shards so small that there are several."""
    settings: dict[str, Any] = {} if kind == "cells" else {"shard_tokens": (4, 16)}
    return open_writer(
        place, identity=IDENTITY, coverage=coverage(kind, dtype), provenance={"host": "conformance"}, planned=samples,
        shard_samples=SHARD_SAMPLES, codec=codec, **settings,
    )  # fmt: skip


def add(writer: Writer, i: int) -> None:
    """Write one sample."""
    c = writer.coverage
    shard, slot = writer.slot()
    span = None
    if c.tokens:
        found = tokens(i, c)
        span = writer.span(found["embed"].shape[-2])
        while span.rest:
            piece = writer.piece(span)
            for site, view in piece.shard.views.items():
                part = found[site][..., piece.first : piece.first + piece.count, :]
                view[..., piece.rows, :] = part.view(view.dtype)
            writer.filled(piece)
    one = sample(i, c.positions)
    present = np.array(one.token_index, np.int64) != ABSENT
    found = cells(i, c)
    for site, view in shard.views.items():
        view[..., present, slot, :] = found[site][..., present, :].view(view.dtype)
    writer.add(shard, slot, one, span)


def write(place: Backend, samples: int, kind: str, dtype: str = "bfloat16", codec: str = "none") -> Writer:
    """Write what is missing of so many samples, not in their order. Returns the writer, closed."""
    with open_small(place, samples, kind, dtype, codec) as writer:
        while chosen := writer.reserve([key(i) for i in range(samples)], 3):
            for name in reversed(chosen):
                add(writer, int(name.removeprefix("key-")))
    return writer
