"""A small capture whose every bit is a function of the sample's number; also run as a writer process.

python process.py PATH SAMPLES SHARD_SAMPLES [SECONDS]   writes samples until none is left to reserve
"""

import sys
import time

import ml_dtypes
import numpy as np

from hiddenlake.cache.positions import resolve
from hiddenlake.cache.samples import Sample
from hiddenlake.cache.store import Coverage, open_writer
from hiddenlake.cache.store.layout import encode_strings
from hiddenlake.cache.store.tables import encode_samples

SITES = ("mlp_out", "resid_post")
LAYERS = (0, 2, 5)
POSITIONS = ("last_q", "exact_answer_first", "second_answer", "-1")
WIDTH = 24
IDENTITY = {"model": {"name": "tiny", "revision": "abc"}, "task": "numbers", "seed": 0}


def coverage(dtype="bfloat16", sites=SITES):
    return Coverage(sites, LAYERS, POSITIONS, dict.fromkeys(sites, WIDTH), dtype)


def key(i):
    return f"key-{i:04d}"


def sample(i):
    prompt, answer = 3 + i % 4, 1 + i % 5
    exact = (prompt, prompt) if i % 3 else None
    total = prompt + answer
    return Sample(
        key(i), i // 2, i % 2, f"group {i % 3}", f"prompt é {i}", f"answer {i}", ("a", "b"), i % 2 == 0,
        "a" if exact else None, exact is not None, tuple(range(i, i + total)), tuple([-0.25] * answer),
        prompt, total, "stop", tuple(resolve(POSITIONS, prompt, total, exact).tolist()),
    )  # fmt: skip


def rows(i, dtype="bfloat16"):
    """site -> bits (layer, position, width), or (position, width) for embed; NaN where the token is absent."""
    rng = np.random.default_rng(i)
    found = {}
    for site in (*SITES, "embed"):
        shape = (len(POSITIONS), WIDTH) if site == "embed" else (len(LAYERS), len(POSITIONS), WIDTH)
        values = rng.normal(size=shape).astype(np.float32)
        values[..., np.array(sample(i).token_index) < 0, :] = np.nan
        found[site] = values if dtype == "float32" else values.astype(ml_dtypes.bfloat16).view(np.uint16)
    return found


def add(writer, i):
    shard, slot = writer.slot()
    present = np.array(sample(i).token_index) >= 0
    bits = rows(i, writer.coverage.dtype)
    for site, view in shard.views.items():
        view[..., present, slot, :] = bits[site][..., present, :]
    writer.add(shard, slot, sample(i))


def open_tiny(path, samples, shard_samples=4, dtype="bfloat16", **settings):
    settings = {"identity": IDENTITY, "coverage": coverage(dtype), "provenance": {"host": "test"}} | settings
    return open_writer(path, planned=samples, shard_samples=shard_samples, **settings)


def write(path, samples, shard_samples=4, dtype="bfloat16", seconds=0.0, sites=SITES):
    """Write what is missing of samples 0 to `samples`, in an order that is not the task's."""
    keys = [key(i) for i in range(samples)]
    number = {name: i for i, name in enumerate(keys)}
    with open_tiny(path, samples, shard_samples, coverage=coverage(dtype, sites)) as writer:
        while chosen := writer.reserve(keys, 5):
            for name in reversed(chosen):
                add(writer, number[name])
                time.sleep(seconds)
    return writer


if __name__ == "__main__":
    # Everything is imported before the start is announced: what is to be interrupted is writing.
    encode_strings([""])
    encode_samples({0: sample(0)})
    print("ready", flush=True)
    sys.stdin.readline()
    write(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), seconds=float((*sys.argv, "0")[4]))
