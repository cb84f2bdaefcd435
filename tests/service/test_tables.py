"""All samples and labels as Parquet, and reads of each sample's own tokens: what the client asks for, asked for plainly."""

import io
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from hiddenlake.cache.service import tables, wire
from hiddenlake.cache.store.blocks import blocks
from hiddenlake.cache.store.snapshot import samples_of
from hiddenlake.cache.store.tables import SAMPLE_COLUMNS
from hiddenlake.cache.testing import small

from .conftest import CAPTURES, SAMPLES, capture_of, in_process, problem

SEEN = [name for name in CAPTURES if name != "theirs"]


def table_of(response):
    assert response.status_code == 200, response.text
    assert response.headers["content-type"] == "application/vnd.apache.parquet"
    return pq.read_table(io.BytesIO(response.content))


@pytest.mark.parametrize("name", SEEN)
def test_all_samples(app, name, monkeypatch):
    monkeypatch.setattr(tables, "_ROWS", 5)  # several parts
    capture = capture_of(app.lake, name)
    found = table_of(app.get(f"/v1/captures/{name}/samples.parquet"))
    assert found.select(SAMPLE_COLUMNS).replace_schema_metadata(None).equals(capture.samples())
    facts = json.loads(found.schema.metadata[b"hiddenlake"])
    assert facts["coverage"] == capture.coverage.to_json() and facts["identity"] == capture.identity
    assert facts["snapshot"] == capture.snapshot.name and facts["samples"] == SAMPLES
    commits = found[wire.COMMIT].cast(pa.string()).to_pylist()
    assert commits == [capture.snapshot.commit_name(shard) for shard in capture.snapshot.shard.tolist()]
    if capture.coverage.tokens:
        assert found[wire.STORED_TOKENS].to_pylist() == capture.snapshot.token_length.tolist()
    assert "".join(found.column_names).count("path") == 0 and str(app.lake) not in json.dumps(facts)


def test_some_columns(app):
    found = table_of(app.get("/v1/captures/cells/samples.parquet", params={"columns": ["correct", "key", "key"]}))
    assert found.column_names == ["correct", "key", wire.COMMIT]
    body = problem(
        app.get("/v1/captures/cells/samples.parquet", params={"columns": ["key", "secret text"]}), 422, "bad_input"
    )
    assert "prompt_length" in body["remedy"]


def test_none_yet(tmp_path):
    from hiddenlake.cache.store.backend import open_backend

    with small.open_small(open_backend(tmp_path / "lake" / "empty"), 4, "both"):
        with in_process(tmp_path / "lake") as client:
            found = table_of(client.get("/v1/captures/empty/samples.parquet"))
    assert len(found) == 0 and found.column_names[0] == "key"


def test_a_part_reads_its_own_shards_alone(lake, monkeypatch):
    """A hundred thousand samples are never in memory together."""
    capture = capture_of(lake, "cells")
    read = []
    place_read = type(capture.place).read
    monkeypatch.setattr(
        type(capture.place), "read", lambda self, name, most=None: read.append(name) or place_read(self, name, most)
    )
    rows = np.flatnonzero(capture.snapshot.shard == 1)[::-1]
    found = samples_of(capture.snapshot, ["key"], rows)
    assert found["key"].to_pylist() == [capture.keys[row] for row in rows]
    assert [name for name in read if name.startswith("samples/")] == [capture.snapshot.layout.samples_file(1)]


def test_damage_breaks_the_table_off(lake, serve, monkeypatch):
    """Whatever was sent before: a Parquet file ends with what says where all is."""
    capture = capture_of(lake, "cells")
    (lake / "cells" / capture.snapshot.layout.samples_file(2)).write_bytes(b"x")
    with in_process(lake) as client:
        problem(client.get("/v1/captures/cells/samples.parquet"), 500, "corrupt")
        monkeypatch.setattr(tables, "_ROWS", 4)
        try:
            content = client.get("/v1/captures/cells/samples.parquet").content
        except Exception:  # the connection broke
            return
        with pytest.raises(pa.ArrowInvalid):
            pq.read_table(io.BytesIO(content))


def test_labels(app):
    capture = capture_of(app.lake, "cells")
    for label, expected in capture.labels().items():
        found = table_of(app.get(f"/v1/captures/cells/labels/{label}"))
        assert found.schema.equals(expected.schema) and repr(found.to_pydict()) == repr(expected.to_pydict())
    problem(app.get("/v1/captures/cells/labels/nothing"), 404, "not_found")
    problem(app.get("/v1/captures/cells/labels/..%2Fsamples%2F0"), 404, "not_found")
    problem(app.get("/v1/captures/tokens/labels/judge"), 404, "not_found")


def read(app, capture, **request):
    return app.post("/v1/activations:read", json={"capture": capture, "site": "mlp_act", **request})


@given(data=st.data())
def test_each_samples_own_tokens(app, data):
    capture = capture_of(app.lake, "exact")
    rows = data.draw(st.lists(st.integers(0, SAMPLES - 1), min_size=1, max_size=6))
    total = [small.sample(i, capture.coverage.positions).total_length for i in range(SAMPLES)]
    tokens = [data.draw(st.lists(st.integers(-total[row], total[row] - 1), max_size=5)) for row in rows]
    found = read(app, "exact", tokens=tokens, samples=rows, format="raw")
    assert found.status_code == 200, found.text
    values = np.frombuffer(found.content, np.float16).reshape(2, -1, 40)
    assert found.headers[wire.SHAPE] == ",".join(map(str, values.shape))
    expected = [
        capture.read_tokens("mlp_act", None, row).values[:, some] for row, some in zip(rows, tokens, strict=True)
    ]
    np.testing.assert_array_equal(values, np.concatenate(expected, axis=1))


def test_each_samples_own_tokens_as_safetensors(app):
    from safetensors.numpy import load

    found = load(read(app, "exact", tokens=[[0, -1], [], [1]], samples=[3, 0, small.key(5)]).content)
    total = small.sample(3, ()).total_length
    assert found["offsets"].tolist() == [0, 2, 2, 3] and found["token_index"].tolist() == [0, total - 1, 1]
    assert found["activations"].shape == (2, 3, 40)


def test_lists_of_tokens_that_do_not_fit(app):
    problem(read(app, "exact", tokens=[[0], [1]], samples=[1]), 422, "bad_input")
    problem(read(app, "exact", tokens=[[0], 1], samples=[1, 2]), 422, "bad_input")
    body = problem(read(app, "exact", tokens=[[0], [1, 1000]], samples=[4, 5]), 409, "not_captured")
    assert "key-0005: 1 of the 2 tokens" in body["message"]


def test_rows_of_another_moment_are_refused(app):
    capture = capture_of(app.lake, "cells")
    fine = read(app, "cells", samples=[0], snapshot=capture.snapshot.name)
    assert fine.status_code == 200 and fine.headers[wire.SNAPSHOT] == capture.snapshot.name
    for samples in ([0], None):
        body = problem(read(app, "cells", samples=samples, snapshot="0" * 32), 409, wire.OTHER_SNAPSHOT)
        assert body["there"] == {"snapshot": capture.snapshot.name}


def test_commits_name_what_holds_the_samples(app):
    capture = capture_of(app.lake, "cells")
    assert wire.COMMITS not in read(app, "cells").headers

    def named(rows):
        header = read(app, "cells", samples=[capture.keys[row] for row in rows]).headers[wire.COMMITS]
        assert header == capture.snapshot.commits_name(np.array(rows, np.int64))
        return header

    first = np.flatnonzero(capture.snapshot.shard == capture.snapshot.shard[0]).tolist()
    other = np.flatnonzero(capture.snapshot.shard != capture.snapshot.shard[0]).tolist()
    assert named(first) == named(first[:1]) != named(other[:1]) != named([first[0], other[0]])


@given(
    axes=st.lists(st.lists(st.integers(0, 9), max_size=4), max_size=3),
    rows=arrays.arrays(np.int64, st.integers(0, 12), elements=st.integers(0, 99)),
    row_bytes=st.integers(1, 50), most_bytes=st.integers(1, 600), most_rows=st.none() | st.integers(1, 12),
)  # fmt: skip
def test_blocks_are_a_read_in_its_order(axes, rows, row_bytes, most_bytes, most_rows):
    def cells(outer, part):
        grid = np.meshgrid(*[np.asarray(axis, np.int64) for axis in (*outer, part)], indexing="ij")
        return np.stack([axis.ravel() for axis in grid], axis=-1)

    parts = [cells(*part) for part in blocks(axes, rows, row_bytes, most_bytes, most_rows)]
    np.testing.assert_array_equal(np.concatenate([np.empty((0, len(axes) + 1), np.int64), *parts]), cells(axes, rows))
    for outer, part in blocks(axes, rows, row_bytes, most_bytes, most_rows):
        assert len(part) <= (most_rows or len(part))
        count = int(np.prod([len(axis) for axis in (*outer, part)], dtype=np.int64))
        assert count <= 1 or count * row_bytes <= most_bytes
