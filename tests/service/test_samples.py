"""Samples: filtered, by key, by token; what the table holds, whatever its labels are."""

import datetime
import decimal
import json

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiddenlake.cache.store.labels import add_label
from hiddenlake.cache.testing import small

from .conftest import CAPTURES, SAMPLES, capture_of, in_process, problem

KEYS = [small.key(i) for i in range(SAMPLES)]
SAMPLE = [small.sample(i, small.POSITIONS) for i in range(SAMPLES)]


def find(client, name="cells", **query):
    response = client.get(f"/v1/captures/{name}/samples", params=query)
    assert response.status_code == 200, response.text
    return response.json()


def keys(page):
    return [sample["key"] for sample in page["samples"]]


@pytest.mark.parametrize("name", [name for name in CAPTURES if name != "theirs"])
def test_a_sample_is_what_was_captured(app, name):
    page = find(app, name)
    assert page["total"] == SAMPLES and keys(page) == KEYS
    for row, (found, sample) in enumerate(zip(page["samples"], SAMPLE, strict=True)):
        assert found["row"] == row
        for field in (
            "key",
            "index",
            "sample_index",
            "group",
            "prompt",
            "answer",
            "correct",
            "prompt_length",
            "total_length",
        ):
            assert found[field] == getattr(sample, field), field
        assert found["token_ids"] == list(sample.token_ids) and found["logprobs"] == list(sample.logprobs)
        if name == "tokens":
            assert found["positions"] == {}
        else:
            index = dict(zip(small.POSITIONS, sample.token_index, strict=True))
            assert found["positions"] == {p: None if token == -1 else token for p, token in index.items()}
        assert app.get(f"/v1/captures/{name}/samples/{sample.key}").json() == found
        assert not {"slot", "checksum", "token_index"} & found.keys()


@given(offset=st.integers(0, 20), limit=st.integers(1, 20))
def test_pages(app, offset, limit):
    page = find(app, offset=offset, limit=limit)
    assert (page["total"], page["offset"], keys(page)) == (SAMPLES, offset, KEYS[offset : offset + limit])


@given(
    text=st.sampled_from(["PROMPT", "é 1", "É", "answer 12", "swer", "nowhere", ".", "%", "\\d", "(", "prompt.1", ""])
)
def test_text_search_is_of_text_in_any_case(app, text):
    """No pattern: a dot is a dot."""
    expected = [s.key for s in SAMPLE if any(text.lower() in part.lower() for part in (s.prompt, s.answer))]
    page = find(app, text=text)
    assert keys(page) == expected and page["total"] == len(expected)


def test_filters_by_label_and_key(app):
    assert keys(find(app, label="correct", value="true")) == KEYS[::2]
    assert keys(find(app, label="group", value="group 1")) == KEYS[1::3]
    assert keys(find(app, label="sample_index", value="1")) == KEYS[1::2]
    assert keys(find(app, label="kind", value="x")) == [KEYS[0], KEYS[2]]
    assert keys(find(app, label="kind", value="")) == [KEYS[4]]
    assert keys(find(app, label="kind", value="null")) == KEYS[5:]
    assert keys(find(app, key=[KEYS[3], KEYS[1], "nothing"])) == [KEYS[1], KEYS[3]]
    assert keys(find(app, key=KEYS[:4], label="correct", value="true", text="prompt")) == [KEYS[0], KEYS[2]]
    assert find(app, label="judge", value="0.5")["total"] == 1
    assert find(app, text="nowhere", offset=5) == {"total": 0, "offset": 5, "samples": []}


def test_labels_that_are_no_numbers_are_null(app):
    page = find(app)
    assert [s["labels"]["judge"] for s in page["samples"]] == [i / 2 if i % 4 == 1 else None for i in range(SAMPLES)]
    assert [s["labels"]["kind"] for s in page["samples"]][:6] == ["x", "y", "x", "true", "", None]


LABELS = {
    "moments": pa.array([datetime.datetime(2026, 1, 1)] * SAMPLES),
    "dates": pa.array([datetime.date(2026, 1, 1)] * SAMPLES),
    "times": pa.array([datetime.timedelta(seconds=1)] * SAMPLES),
    "bytes": pa.array([b"\xff\x00"] * SAMPLES),
    "lists": pa.array([[1.0, float("nan"), float("inf")]] * SAMPLES),
    "texts": pa.array([["a", None]] * SAMPLES),
    "deep": pa.array([[[1.0, float("nan")]]] * SAMPLES),
    "some lists": pa.array([[1, 2], None, []] * 4 + [[3]]),
    "lists of truths": pa.array([[True, None]] * SAMPLES),
    "structs": pa.array([{"a": float("nan"), "b": b"\xff"}] * SAMPLES),
    "decimals": pa.array([decimal.Decimal("1.50"), None] * 6 + [decimal.Decimal(3)]),
    "infinite": pa.array([float("inf")] * SAMPLES),
    "large": pa.array([(1 << 63) - 1] * SAMPLES),
    "words": pa.array(["x"] * SAMPLES).dictionary_encode(),
    "nothing": pa.nulls(SAMPLES),
    "half": pa.array(np.full(SAMPLES, np.nan, np.float16)),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_of_every_type(lake, kind):
    """A label is a user's own file: no type of it makes the listing fail."""
    try:
        add_label(capture_of(lake, "cells"), "odd", pa.table({"key": KEYS, "odd": LABELS[kind]}))
    except (NotImplementedError, pa.ArrowException):
        pytest.skip("Parquet cannot hold it")
    with in_process(lake) as client:
        page = find(client)
        json.dumps(page, allow_nan=False)
        assert page["total"] == SAMPLES and all("odd" in sample["labels"] for sample in page["samples"])
        assert client.get("/v1/captures/cells/samples", params={"label": "odd", "value": "x"}).status_code == 200


def test_a_label_that_is_not_there(app):
    body = problem(app.get("/v1/captures/cells/samples", params={"label": "what I wrote", "value": "x"}), 409)
    assert "what I wrote" not in json.dumps(body) and "judge" in json.dumps(body["there"])
    for label in ("prompt", "answer", "token_ids", "key", "__class__"):
        problem(app.get("/v1/captures/cells/samples", params={"label": label, "value": "x"}), 409)


@pytest.mark.parametrize(
    "query",
    [{"limit": 0}, {"limit": 1001}, {"limit": -1}, {"offset": -1}, {"offset": 1 << 41}, {"limit": "x"}, {"label": "kind"},
     {"value": "x"}, {"text": "x" * 1001}, {"label": "x" * 129, "value": ""}, {"key": ["x"] * 1001}, {"tex": "a"}],
)  # fmt: skip
def test_limits_of_a_listing(app, query):
    problem(app.get("/v1/captures/cells/samples", params=query), 422, "bad_input")


def test_labels_are_seen_at_once(lake):
    with in_process(lake) as client:
        assert "late" not in find(client)["samples"][0]["labels"]
        add_label(capture_of(lake, "cells"), "late", pa.table({"key": KEYS, "late": [*range(SAMPLES)]}))
        assert find(client)["samples"][3]["labels"]["late"] == 3
        assert "late" in client.get("/v1/captures/cells").json()["labels"]


# Tokens.


def occurrences(name, token, captured):
    found = []
    for row, sample in enumerate(SAMPLE):
        positions = dict(zip(small.POSITIONS, sample.token_index, strict=True)) if name != "tokens" else {}
        for at in (at for at, id in enumerate(sample.token_ids) if id == token):
            if not captured or name != "cells" or at in positions.values():
                names = [p for p, where in positions.items() if where == at]
                entry = {"sample": sample.key, "row": row, "token_index": at, "in_answer": at >= sample.prompt_length}
                found.append(entry | {"positions": names})
    return found


@given(
    name=st.sampled_from(["cells", "tokens", "both"]), token=st.integers(0, 60), captured=st.booleans(), limit=st.integers(1, 20)
)  # fmt: skip
def test_where_a_token_occurs(app, name, token, captured, limit):
    response = app.get(f"/v1/captures/{name}/tokens", params={"id": token, "captured": captured, "limit": limit})
    expected = occurrences(name, token, captured)
    assert response.json() == {"total": len(expected), "tokens": expected[:limit]}


@pytest.mark.parametrize(
    "query", [{}, {"id": -1}, {"id": 1 << 31}, {"id": 1, "limit": 0}, {"id": 1, "limit": 5000}, {"id": "x"}]
)
def test_limits_of_tokens(app, query):
    problem(app.get("/v1/captures/cells/tokens", params=query), 422, "bad_input")


def test_a_capture_without_samples(lake):
    from hiddenlake.cache.store.backend import open_backend

    small.write(open_backend(lake / "empty"), 0, "both")
    with in_process(lake) as client:
        assert find(client, "empty") == {"total": 0, "offset": 0, "samples": []}
        assert client.get("/v1/captures/empty/tokens?id=3").json() == {"total": 0, "tokens": []}
        assert client.get("/v1/captures/empty").json()["samples"] == 0
        for fields in ({}, {"tokens": "all"}, {"tokens": [0]}, {"samples": []}):
            body = {"capture": "empty", "site": "mlp_act"} | fields
            response = client.post("/v1/activations:read", json=body)
            assert response.status_code == 200 and "0" in response.headers["x-hiddenlake-shape"].split(",")


def test_a_folder_of_a_strange_name_is_named_and_does_not_hide_the_others(lake):
    import os

    os.rename(lake / "both", os.fsencode(lake) + b"/bad \xff name")
    with in_process(lake) as client:
        listed = {entry["name"]: entry for entry in client.get("/v1/captures").json()["captures"]}
        assert {"cells", "tokens", "exact"} < listed.keys()
        [odd] = listed.keys() - {"cells", "tokens", "exact"}
        assert "rename" in listed[odd]["error"]
