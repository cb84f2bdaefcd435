"""The store benchmark's arms: each reads what was written, whatever is asked for, and a wrong row is noticed."""

import importlib
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import store_files
from store_arm import StoreArm
from store_raw import Raw
from store_rows import Rows, Shape, Want

SHAPE = {"layers": 3, "positions": 4, "samples": 10, "hidden": 16, "shard": 4}

WANTS = {
    "cell": {"layers": [1, 2], "positions": [2, 3], "samples": None},
    "one sample, a position": {"layers": None, "positions": [3, 4], "samples": [9]},
    "one sample": {"layers": None, "positions": None, "samples": [4]},
    "some samples": {"layers": [0, 1], "positions": [0, 1], "samples": [1, 2, 7, 8]},
    "slab": {"layers": None, "positions": [1, 4], "samples": None},
}

ARMS = {
    "hiddenlake": ("Hiddenlake", {"arrival": "task"}, ["checked", "unchecked"]),
    "hiddenlake, shuffled": ("Hiddenlake", {"arrival": "shuffled"}, ["checked"]),
    "tensorstore": ("TensorStore", {"checksums": True}, ["no cache", "its index cached", "its chunks cached"]),
    "tensorstore, plain": ("TensorStore", {"checksums": False}, ["no cache"]),
    "zarr": ("ZarrPython", {}, [""]),
    "memmap": ("Memmap", {}, [""]),
    "safetensors": ("Safetensors", {}, [""]),
}


def make(name: str, folder) -> StoreArm:
    kind, more, _ = ARMS[name]
    for package in {"tensorstore": ["tensorstore"], "zarr": ["zarr"], "safetensors": ["torch", "safetensors"]}.get(
        name.partition(",")[0], []
    ):
        pytest.importorskip(package)
    module = importlib.import_module(f"store_{name.partition(',')[0]}")
    return getattr(module, kind)({"shape": SHAPE, "folder": str(folder / name), **more})


def ask(arm: StoreArm, **round):
    return arm.report(round, arm.run(arm.prepare(round)))


@pytest.mark.parametrize("name", ARMS)
def test_an_arm_reads_what_it_wrote(name, tmp_path):
    arm = make(name, tmp_path)
    for _ in range(2):  # over what is there
        written = ask(arm, op="write", fsync=True)
    assert written["bytes"] >= Shape(**SHAPE).bytes and written["durable"] >= written["shipped"] > 0
    for way in ARMS[name][2]:
        for cold in (False, True):
            for want in WANTS.values():
                # arms compare what they read with what they wrote
                answer = ask(
                    arm, op="read", wants=[{**want, "at": 0.1}, {**want, "at": 0.7}], way=way, cold=cold, seconds=9
                )
                assert len(answer["walls"]) == len(answer["cpus"]) == len(answer["fetched"]) == 2
    ask(arm, op="delete")
    assert list(tmp_path.iterdir()) == []


def test_a_read_of_other_rows_is_noticed(tmp_path):
    arm = make("memmap", tmp_path)
    ask(arm, op="write", fsync=True)
    file = arm.folder / "rows"
    rows = np.fromfile(file, np.uint16).reshape(3, 4, 10, 16)
    rows[1, 2] = rows[1, 2, ::-1]
    rows.tofile(file)
    with pytest.raises(RuntimeError, match="layer 1, position 2, sample . is another row"):
        ask(arm, op="read", wants=[{**WANTS["cell"], "at": 0}], way="", cold=False, seconds=9)
    ask(arm, op="read", wants=[{**WANTS["some samples"], "at": 0}], way="", cold=False, seconds=9)


def test_the_budget_ends_a_round_after_one_read(tmp_path):
    arm = make("memmap", tmp_path)
    ask(arm, op="write", fsync=True)
    answer = ask(arm, op="read", wants=[{**WANTS["cell"], "at": 0}] * 5, way="", cold=False, seconds=0)
    assert len(answer["walls"]) == 1


@pytest.mark.parametrize(("files", "count"), [("one a shard", 3), ("one", 1)])
def test_the_limit_writes_as_many_bytes(files, count, tmp_path):
    arm = Raw({"shape": SHAPE, "folder": str(tmp_path / "raw"), "files": files})
    assert ask(arm, op="write", fsync=True)["bytes"] == Shape(**SHAPE).bytes
    assert len(list(arm.folder.iterdir())) == count
    if files == "one":
        for want in WANTS.values():
            [nbytes] = ask(arm, op="read", wants=[{**want, "at": 0.99}], way="into a buffer", cold=False, seconds=9)[
                "bytes"
            ]
            assert nbytes == Want.of({**want, "at": 0}, Shape(**SHAPE)).bytes(Shape(**SHAPE))


def test_rows_differ_and_are_finite():
    rows = Rows(Shape(2, 3, 5000, 8, 4))
    first = np.stack([rows.sample(i) for i in range(5000)])
    assert len(np.unique(first.reshape(5000, -1), axis=0)) == 5000
    assert not ((first & 0x7F80) == 0x7F80).any()
    assert np.array_equal(rows.sample(77), first[77])


def test_what_is_evicted_is_read_from_the_disk_again(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(os.urandom(4 << 20))
    store_files.make_durable(tmp_path)
    counts = []
    for cold in (True, False):
        if cold:
            store_files.evict(tmp_path)
        before = store_files.fetched()
        file.read_bytes()
        counts.append(store_files.fetched() - before)
    if counts[0] == 0:
        pytest.skip("this file system keeps its files in memory")
    assert counts[0] >= 4 << 20 and counts[1] == 0


PEAK = """
import numpy as np, store_files
before = store_files.forget_peak()
block = np.ones(64 << 20, np.uint8)
del block
assert 60 << 20 <= store_files.peak() - before <= 90 << 20
again = store_files.forget_peak()
assert store_files.peak() - again < 8 << 20
"""


def test_peak_memory_is_of_what_came_since():
    # A process of its own: one that ran other tests has memory left that they freed, and needs no more.
    path = os.pathsep.join(sys.path)
    subprocess.run([sys.executable, "-c", PEAK], env=os.environ | {"PYTHONPATH": path}, check=True)


def test_a_want_survives_json():
    want = Want.of(json.loads(json.dumps({**WANTS["slab"], "at": 0.5})), Shape(**SHAPE))
    assert want.index == (slice(0, 3), slice(1, 4), slice(0, 10)) and want.bytes(Shape(**SHAPE)) == 3 * 3 * 10 * 32


def test_a_capture_that_was_read_is_cold_again(tmp_path):
    """Its reader keeps files open and mapped, and mapped pages are not thrown out."""
    shape = {**SHAPE, "hidden": 4096, "samples": 64, "shard": 64}
    arm = importlib.import_module("store_hiddenlake").Hiddenlake(
        {"shape": shape, "folder": str(tmp_path / "ours"), "arrival": "task"}
    )
    ask(arm, op="write", fsync=False)
    cell = {**WANTS["cell"], "at": 0}
    for cold in (False, True, False, True):
        answer = ask(arm, op="read", wants=[cell, cell], way="checked", cold=cold, seconds=9)
        if cold and max(answer["fetched"]) == 0:
            pytest.skip("this file system keeps its files in memory")
        assert all(
            (fetched >= nbytes) is cold for fetched, nbytes in zip(answer["fetched"], answer["bytes"], strict=True)
        )
