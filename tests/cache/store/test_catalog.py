import json

import pytest

from hiddenlake.cache.errors import StoreError
from hiddenlake.cache.positions import Tokens
from hiddenlake.cache.samples import Failure
from hiddenlake.cache.store import open_capture
from hiddenlake.cache.store.catalog import describe, list_captures
from hiddenlake.cache.store.verify import verify


@pytest.fixture
def lake(tiny, tmp_path):
    tiny.write(tmp_path / "b", 6)
    with tiny.open_tiny(tmp_path / "a", 10) as writer:
        writer.reserve([tiny.key(0), tiny.key(1)], 2)
        tiny.add(writer, 0)
        writer.fail(Failure(tiny.key(1), 1, "not finite", 2))
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "zarr.json").write_text('{"zarr_format": 3, "attributes": {}}')
    (tmp_path / "readme.txt").write_text("no capture")
    return tmp_path


def test_captures_are_listed_by_name_and_nothing_else_is(lake):
    a, b = list_captures(lake)
    assert (a["name"], a["model"], a["task"], a["samples"], a["planned"], a["failures"]) == (
        "a", "tiny", "numbers", 1, 10, 1,
    )  # fmt: skip
    assert (b["name"], b["samples"], b["failures"], b["sites"]) == ("b", 6, 0, ["mlp_out", "resid_post"])
    assert b["bytes"] == open_capture(lake / "b").nbytes
    assert list_captures(lake / "b") == [b]
    json.dumps([a, b])


def test_tokens_are_listed(tiny, tmp_path):
    tiny.write(tmp_path / "c", 6, coverage=tiny.coverage(positions=(), tokens=Tokens("all_generated", 2)))
    (entry,) = list_captures(tmp_path)
    assert (entry["tokens"], entry["positions"], entry["samples"]) == ("all_generated/2", 0, 6)
    assert entry["bytes"] == sum(
        file.stat().st_size
        for folder in ("tokens", "row_crc", "samples")
        for file in (tmp_path / "c" / folder).rglob("*")
        if file.is_file() and file.name != "zarr.json" and file.parent.name not in ("sample_start", "sample_length")
    )


@pytest.mark.parametrize("damage", ["zarr.json", "commits/0.json"])
def test_a_broken_capture_is_listed_with_its_error(lake, damage):
    (lake / "b" / damage).write_text("{")
    a, b = list_captures(lake)
    assert "error" not in a and damage in b["error"]


def test_a_lake_that_does_not_exist_is_an_error(tmp_path):
    with pytest.raises(StoreError, match="is no folder"):
        list_captures(tmp_path / "absent")
    assert list_captures(tmp_path) == []


def test_describe_says_everything_as_json(lake, tiny):
    facts = describe(open_capture(lake / "a"))
    assert facts["tokens"] is None
    assert facts["identity"] == tiny.IDENTITY and facts["provenance"] == [{"host": "test"}]
    assert facts["layers"] == [0, 2, 5] and facts["positions"] == list(tiny.POSITIONS)
    assert facts["failure_causes"] == {"not finite": 1} and facts["verified"] is None
    verify(lake / "a")
    assert describe(open_capture(lake / "a"))["verified"]["ok"] is True
    json.dumps(facts)
