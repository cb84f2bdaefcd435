"""A small capture whose every bit is a function of the sample's number; also run as a writer process.

python process.py PATH SAMPLES SHARD_SAMPLES SECONDS KIND   writes samples until none is left to reserve
python process.py fork   for each line `PATH SAMPLES KIND SAID` forks a process whose threads write samples, and prints
    its number; the process appends to the file SAID what was acknowledged

TEST_LEASE_SECONDS : after so long a writer to object storage is taken for dead, and after a half of it a lock for lost.
"""

import os
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor

import ml_dtypes
import numpy as np

from hiddenlake.cache.errors import StoreError
from hiddenlake.cache.positions import ABSENT, Tokens, resolve
from hiddenlake.cache.samples import Sample
from hiddenlake.cache.sites import SITES as ALL_SITES
from hiddenlake.cache.store import Coverage, open_writer
from hiddenlake.cache.store.coverage import DTYPES
from hiddenlake.cache.store.layout import encode_strings
from hiddenlake.cache.store.tables import encode_samples

SITES = ("mlp_out", "resid_post")
LAYERS = (0, 2, 5)
POSITIONS = ("last_q", "exact_answer_first", "second_answer", "-1")
WIDTH = 24
WIDTHS = {"hidden": WIDTH, "d_attn": 40, "d_mlp": 56}
# What a capture may hold: cells, tokens, or both.
KINDS = {
    "cells": {},
    "both": {"tokens": Tokens("all")},
    "tokens": {"tokens": Tokens("all", 2), "positions": (), "sites": ("attn_z", "final_norm")},
}
IDENTITY = {"model": {"name": "tiny", "revision": "abc"}, "task": "numbers", "seed": 0}


def coverage(dtype="bfloat16", sites=SITES, positions=POSITIONS, tokens=None):
    widths = {site: WIDTHS[ALL_SITES[site].width] for site in ("embed", *sites)}
    return Coverage(sites, LAYERS, positions, widths, dtype, tokens)


def full_coverage(c):
    """The coverage that a part was selected from."""
    return coverage(
        c.dtype,
        **next(
            kind
            for kind in KINDS.values()
            if set(c.sites) <= set(kind.get("sites", SITES)) and kind.get("tokens") == c.tokens
        ),
    )


def key(i):
    return f"key-{i:04d}"


def sample(i, positions=POSITIONS):
    # Now and then an answer that is longer than two token shards.
    prompt, answer = 3 + i % 4, 40 if i % 11 == 7 else i % 5
    exact = (prompt, prompt) if i % 3 and answer else None
    total = prompt + answer
    return Sample(
        key(i), i // 2, i % 2, f"group {i % 3}", f"prompt é {i}", f"answer {i}", ("a", "b"), i % 2 == 0,
        "a" if exact else None, exact is not None, tuple(range(i, i + total)), tuple([-0.25] * answer),
        prompt, total, "stop", tuple(resolve(positions, prompt, total, exact).tolist()),
    )  # fmt: skip


def bits(i, kind, site, shape, dtype):
    values = np.random.default_rng([i, kind, list(ALL_SITES).index(site)]).normal(size=shape).astype(np.float32)
    if dtype == "float32":
        return values
    return values.astype(ml_dtypes.bfloat16 if dtype == "bfloat16" else np.float16).view(np.uint16)


def rows(i, c=None):
    """site -> bits (layer, position, width), or (position, width) without layers; NaN where the token is absent."""
    c = c or coverage()
    absent = np.array(sample(i, c.positions).token_index) == ABSENT
    found = {}
    for site, width in c.widths.items():
        outer = (len(c.layers),) if ALL_SITES[site].layered else ()
        found[site] = bits(i, 0, site, (*outer, len(c.positions), width), c.dtype)
        found[site][..., absent, :] = DTYPES[c.dtype][2]
    return found


def tokens(i, c):
    """site -> bits (layer, token, width), or (token, width) without layers, of the sample's stored tokens."""
    one = sample(i, c.positions)
    chosen = np.array(c.tokens.indices(one.prompt_length, one.total_length), np.int64)
    found = {}
    for site, width in c.widths.items():
        outer = (len(c.layers),) if ALL_SITES[site].layered else ()
        found[site] = bits(i, 1, site, (*outer, one.total_length, width), c.dtype)[..., chosen, :]
    return found


def fill(writer, span, found):
    """Write a sample's tokens, one piece behind the other."""
    while span.rest:
        piece = writer.piece(span)
        if piece is None:
            time.sleep(0.0005)  # other threads fill what was asked for before
            continue
        for site, view in piece.shard.views.items():
            view[..., piece.rows, :] = found[site][..., piece.first : piece.first + piece.count, :]
        writer.filled(piece)


def add(writer, i, slot=None):
    c = writer.coverage
    shard, slot = slot or writer.slot()
    span = None
    if c.tokens:
        found = tokens(i, c)
        span = writer.span(found["embed"].shape[-2])
        fill(writer, span, found)
    one = sample(i, c.positions)
    present = np.array(one.token_index) != ABSENT
    cells = rows(i, c)
    for site, view in shard.views.items():
        view[..., present, slot, :] = cells[site][..., present, :]
    writer.add(shard, slot, one, span)


def open_tiny(path, samples, shard_samples=4, dtype="bfloat16", **settings):
    settings = {"identity": IDENTITY, "coverage": coverage(dtype), "provenance": {"host": "test"}} | settings
    if settings["coverage"].tokens:
        settings = {"shard_tokens": (4, 16)} | settings
    return open_writer(path, planned=samples, shard_samples=shard_samples, **settings)


def write(path, samples, shard_samples=4, dtype="bfloat16", seconds=0.0, **settings):
    """Write what is missing of samples 0 to `samples`, in an order that is not the task's."""
    keys = [key(i) for i in range(samples)]
    number = {name: i for i, name in enumerate(keys)}
    with open_tiny(path, samples, shard_samples, dtype, **settings) as writer:
        while chosen := writer.reserve(keys, 5):
            for name in reversed(chosen):
                add(writer, number[name])
                time.sleep(seconds)
    return writer


def write_together(path, samples, kind, say, threads=3):
    """Write what is missing of samples 0 to `samples`, several threads to one writer.

    say : called with `published N` now and then, N of this writer's samples being acknowledged, and with `flushed`
        and the keys that a flush acknowledged.
    """
    keys = [key(i) for i in range(samples)]
    number = {name: i for i, name in enumerate(keys)}
    with (
        open_tiny(path, samples, coverage=coverage(**KINDS[kind])) as writer,
        ThreadPoolExecutor(threads) as pool,
    ):

        def one(name):
            while True:
                try:
                    slot = writer.slot()
                    break
                except StoreError as error:
                    if "wait for those that are" not in str(error):
                        raise
                    time.sleep(0.0005)  # other threads add what both shards wait for
            add(writer, number[name], slot)
            say(f"published {writer.published}")

        added = []
        while chosen := writer.reserve(keys, 5 * threads):
            for future in [pool.submit(one, name) for name in chosen]:
                future.result()
            added += chosen
            if len(added) % (2 * len(chosen)) == 0:
                writer.flush()
                say(f"flushed {' '.join(added)}")


def fork_for_each_line():
    for line in sys.stdin:
        path, samples, kind, said = line.split()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                file = os.open(said, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
                write_together(path, int(samples), kind, lambda text: os.write(file, f"{text}\n".encode()))
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(code)
        print(child, flush=True)


if __name__ == "__main__":
    # Everything is imported before the start is announced: what is to be interrupted is writing.
    encode_strings([""])
    encode_samples({0: sample(0)})
    if lease := float(os.environ.get("TEST_LEASE_SECONDS", 0)):
        from hiddenlake.cache.store import objects

        objects._LEASE_SECONDS, objects._BEAT_SECONDS, objects._LOCK_SECONDS = lease, lease / 8, lease / 2
    print("ready", flush=True)
    if sys.argv[1:] == ["fork"]:
        fork_for_each_line()
    else:
        sys.stdin.readline()
        path, number, shard_samples, pause, kind = sys.argv[1:]
        write(path, int(number), int(shard_samples), seconds=float(pause), coverage=coverage(**KINDS[kind]))
