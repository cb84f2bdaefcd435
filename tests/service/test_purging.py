"""`hiddenlake purge`: a capture and every trace of its prompts are gone from its lake, or it is said where they are left."""

import json
import shutil

import pytest

from hiddenlake.cache.service import lake as lake_module
from hiddenlake.cache.service.database import Database
from hiddenlake.cache.service.lake import Lake
from hiddenlake.cache.service.lookup import Lookup
from hiddenlake.cache.service.plans import TASK
from hiddenlake.cache.service.purging import purge
from hiddenlake.cache.service.work import Work
from hiddenlake.cache.store.backend import open_backend
from hiddenlake.cache.store.reader import open_capture
from hiddenlake.cache.testing import small

from .conftest import add_key, hiddenlake, write_capture
from .working import WorkerProcess, chat

CANARY = "the marzipan of Luebeck, and what it weighs"


def holding(lake, *needles):
    """Files of a lake that hold one of these, by a search of the test's own."""
    files = [file for file in lake.rglob("*") if file.is_file()]
    assert files
    return {str(file.relative_to(lake)) for file in files if any(n.encode() in file.read_bytes() for n in needles)}


@pytest.fixture
def named(lake, monkeypatch):
    """Captures `mine` and `other` of the same prompts, with keys as a service's samples have them."""
    sample = small.sample
    import dataclasses

    def as_asked(i, positions):
        return dataclasses.replace(sample(i, positions), prompt=f"{CANARY} {i}", answer=f"{CANARY}, answered: {i}")

    with monkeypatch.context() as patch:
        patch.setattr(small, "sample", as_asked)
        patch.setattr(small, "key", lambda i: f"{i:032x}")
        for name in ("mine", "other"):
            small.write(open_backend(lake / name), 7, "cells", "bfloat16", "none")
    return lake


def test_what_is_left_is_named(named):
    notes = named / "notes"
    notes.mkdir()
    (notes / "one.json").write_text(json.dumps({"seen": [f"{3:032x}"]}))
    (notes / "two.txt").write_text(f"he asked about {CANARY} 5")
    (notes / "three.txt").write_text("nothing of it")
    found = purge(named / "mine")
    assert found.samples == 7 and found.files == 3 and found.bytes > 100
    other = named / "other"
    assert set(found.left) == {
        f"{other} holds 7 of its samples", f"{other} holds 7 of its prompts", f"{other} holds 7 of its answers",
        f"{notes / 'one.json'} holds 1 keys of its samples", f"{notes / 'two.txt'} holds 1 of its texts",
    }  # fmt: skip
    assert not (named / "mine").exists() and len(open_capture(other)) == 7
    shutil.rmtree(notes)
    done = hiddenlake("purge", other, "--yes", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)[0]["left"] == [] and "7 samples" in done.stderr
    assert not holding(named, CANARY)


def test_a_capture_of_a_damaged_neighbour_says_so(named):
    (named / "other" / "zarr.json").write_bytes(b"{")
    [left] = [what for what in purge(named / "mine").left if "cannot be read" in what]
    assert str(named / "other") in left


def test_nobody_is_purged_by_accident(named):
    done = hiddenlake("purge", named / "mine")
    assert done.returncode == 1 and "say --yes" in done.stderr and (named / "mine").exists()
    done = hiddenlake("purge", named / "nothing", "--yes")
    assert done.returncode == 1 and "is no capture" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("when", ["before", "while it is added"])
def test_a_server_that_saw_the_capture_a_moment_ago_does_not_know_it_again(when, tmp_path, monkeypatch):
    lake = tmp_path / "lake"
    write_capture(lake / "asked", "cells", "bfloat16", "none", task=TASK, decoding={"sampling": "greedy"})
    keys = open_capture(lake / "asked").keys
    monkeypatch.setattr(lake_module, "_FRESH_SECONDS", 1000.0)
    seen, database = Lake(lake), Database(lake)
    lookup = Lookup(database, seen)
    if when == "before":
        lookup.refresh()
        assert {row["key"] for row in database.read("SELECT key FROM entries")} == set(keys)
        purge(lake / "asked")
    else:
        add = lookup._add

        def purge_first(*arguments):
            if (lake / "asked").exists():
                purge(lake / "asked")
            add(*arguments)

        monkeypatch.setattr(lookup, "_add", purge_first)
    assert [name for name, _ in seen.all()] == ["asked"]
    lookup.refresh()
    assert not (lake / "asked").exists()
    assert not database.read("SELECT * FROM entries") and not database.read("SELECT * FROM indexed")


@pytest.mark.slow
@pytest.mark.timeout(300)
def test_nothing_of_a_computed_prompt_is_left_in_the_database(tmp_path, tiny_model, serve):
    lake = tmp_path / "lake"
    lake.mkdir()
    server = serve(lake, key=add_key(lake, "tests", "admin"))
    worker = WorkerProcess(lake, tiny_model, tmp_path / "worker").wait_ready()
    try:
        body = {"inputs": [chat(f"{CANARY} {i}") for i in range(5)], "generation": {"max_new_tokens": 4}, "wait": 60}
        answer = server.http.post("/v1/activations:resolve", json=body).json()
        assert answer["state"] == "complete"
    finally:
        assert worker.stop() == 0
    [name] = {entry["capture"] for entry in answer["entries"]}
    keys = [entry["key"] for entry in answer["entries"]]
    ids = json.dumps(list(open_capture(lake / name).samples()["token_ids"][0].as_py()))[:40]
    assert ".hiddenlake/service.sqlite" in {
        file.removesuffix("-wal") for file in holding(lake, *keys)
    }  # else there would be nothing to show
    # The server runs, and has the database open.
    found = purge(lake / name)
    assert found.left == () and found.samples == 5
    assert not holding(lake, CANARY, ids, *keys)
    assert not Database(lake).read("SELECT * FROM work") and Work(Database(lake)).counts().get("done", 0) == 0
    asked = server.http.post("/v1/activations:resolve", json=body | {"only_if_cached": True})
    assert asked.status_code == 404
