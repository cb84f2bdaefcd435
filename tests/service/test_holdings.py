"""A quota: the least recently used of what was computed goes, what is pinned, used just now or a task's stays."""

import time

import pytest

from hiddenlake.cache.service import holdings as module
from hiddenlake.cache.service.keeping import Keeper
from hiddenlake.cache.service.plans import TASK
from hiddenlake.cache.store.reader import open_capture
from hiddenlake.cache.store.writer import open_writer

from .conftest import in_process, problem, write_capture


@pytest.fixture
def app(tmp_path):
    for name in ("a", "b", "c"):
        write_capture(tmp_path / "lake" / name, "cells", "bfloat16", "none", task=TASK)
    write_capture(tmp_path / "lake" / "cities", "cells", "bfloat16", "none")
    size = open_capture(tmp_path / "lake" / "a").nbytes
    with in_process(tmp_path / "lake", quota=2 * size + 10) as client:
        client.lake, client.size = tmp_path / "lake", size
        yield client


def use_at(app, **times):
    with app.parts.database.write() as cursor:
        for name, when in times.items():
            cursor.execute(
                "INSERT INTO held (capture, used) VALUES (?, ?) ON CONFLICT DO UPDATE SET used = ?", (name, when, when)
            )


def there(app):
    return sorted(path.name for path in app.lake.iterdir() if not path.name.startswith("."))


def test_the_least_recently_used_goes(app):
    use_at(app, a=30, b=10, c=20)
    Keeper(app.parts).keep()
    assert there(app) == ["a", "c", "cities"]
    assert "hiddenlake_evictions_total 1.0" in app.get("/metrics").text
    Keeper(app.parts).keep()
    assert there(app) == ["a", "c", "cities"]
    assert app.get("/v1/captures/b").status_code == 404


def test_what_is_pinned_stays(app):
    use_at(app, a=30, b=10, c=20)
    assert app.put("/v1/captures/b/pin").status_code == 204
    Keeper(app.parts).keep()
    assert there(app) == ["a", "b", "cities"]
    problem(app.delete("/v1/captures/b"), 409, "pinned")


def test_what_was_used_just_now_stays_even_beyond_the_quota(app):
    for name in ("a", "b", "c"):
        response = app.get(f"/v1/captures/{name}/activations", params={"site": "mlp_act", "format": "raw"})
        assert response.status_code == 200, response.text
    Keeper(app.parts).keep()
    assert there(app) == ["a", "b", "c", "cities"]
    assert app.parts.holdings.bytes_staying() == 3 * app.size
    used = [row["used"] for row in app.parts.database.read("SELECT used FROM held")]
    assert len(used) == 3 and all(time.time() - when < 60 for when in used)


def test_what_is_being_written_stays_for_now(app, monkeypatch):
    monkeypatch.setattr(module, "_JUST_USED_SECONDS", 0.0)
    use_at(app, a=30, b=10, c=20)
    capture = open_capture(app.lake / "b")
    with open_writer(app.lake / "b", identity=capture.identity, coverage=capture.coverage, provenance={}, planned=0):
        Keeper(app.parts).keep()
        assert there(app) == ["a", "b", "cities"]
        problem(app.delete("/v1/captures/b"), 409, "being_written")
    assert app.delete("/v1/captures/b").status_code == 204
