"""What is exported of a capture: names that are not there are refused, and blocks stay within their bound."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hiddenlake.cache.errors import BadInputError, CorruptError, UnknownNameError
from hiddenlake.cache.exchange.exporting import FORMATS, export_capture
from hiddenlake.cache.exchange.selection import pack, select
from hiddenlake.cache.store import open_capture


@given(st.lists(st.integers(0, 50), max_size=40), st.integers(1, 60))
def test_runs_cover_everything_once_and_stay_within_the_limit(sizes, limit):
    runs = pack(np.array(sizes, np.int64), limit)
    assert [i for start, stop in runs for i in range(start, stop)] == list(range(len(sizes)))
    for start, stop in runs:
        assert sum(sizes[start:stop]) <= limit or stop == start + 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sites": ["attn_out"]}, "has no site 'attn_out': it has mlp_out, resid_post, embed"),
        ({"layers": "1"}, "has no layer 1: it has 0, 2, 5"),
        ({"layers": [7]}, "has no layer 7"),
        ({"layers": "-1"}, "name captured layers by their numbers"),
        ({"sites": ["embed"], "layers": "0"}, "have no layers"),
        ({"positions": "-2"}, "has no position '-2': it has last_q"),
        ({"positions": "nonsense"}, "unknown position"),
        ({"positions": "all/2"}, "does not hold the tokens all/2: it holds all"),
    ],
)
def test_what_was_not_captured_is_refused(captures, tmp_path, arguments, message):
    with pytest.raises(UnknownNameError, match=message):
        export_capture(captures(), tmp_path / "out", **arguments)
    assert list(tmp_path.iterdir()) == []


def test_tokens_of_a_capture_without_any(captures):
    with pytest.raises(UnknownNameError, match="does not hold the tokens all: it holds none"):
        select(captures("cells"), positions="all")


def test_other_refusals(captures, tmp_path, tiny):
    with pytest.raises(UnknownNameError, match="unknown format 'pickle': expected one of safetensors"):
        export_capture(captures(), tmp_path / "out", "pickle")
    with pytest.raises(BadInputError, match="expected 1 or more"):
        export_capture(captures(), tmp_path / "out", shard_bytes=0)
    tiny.open_tiny(tmp_path / "empty", 4).close()
    with pytest.raises(BadInputError, match="holds no samples yet"):
        export_capture(tmp_path / "empty", tmp_path / "out")


@pytest.mark.parametrize("format", ["safetensors", "torch", "datasets"])
def test_a_sample_that_does_not_fit_in_the_memory_is_refused(captures, tmp_path, format):
    with pytest.raises(BadInputError, match="does not fit in 100 bytes of memory: raise --memory-bytes"):
        export_capture(captures(), tmp_path / "out", format, memory_bytes=100)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("format", FORMATS)
def test_a_damaged_capture_is_not_exported(tiny, tmp_path, format):
    tiny.write(tmp_path / "lake", 8)
    (file,) = [p for p in (tmp_path / "lake/resid_post").rglob("*") if p.is_file() and p.stat().st_size > 4000][:1]
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(CorruptError):
        export_capture(open_capture(tmp_path / "lake"), tmp_path / "out", format)
    assert [path.name for path in tmp_path.iterdir()] == ["lake"]


def test_labels_that_hide_a_column_are_refused(tiny, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    tiny.write(tmp_path / "lake", 4)
    (tmp_path / "lake/labels").mkdir(exist_ok=True)
    for name, format in {"correct": "npy", "shard": "safetensors", "mlp_out_0": "datasets"}.items():
        file = tmp_path / f"lake/labels/{name}.parquet"
        pq.write_table(pa.table({"key": ["key-0001"], "value": [1]}), file)
        with pytest.raises(BadInputError, match=name):
            export_capture(tmp_path / "lake", tmp_path / "out", format)
        file.unlink()
    pq.write_table(pa.table({"key": ["key-0001"] * 2, "value": [1, 2]}), tmp_path / "lake/labels/twice.parquet")
    with pytest.raises(BadInputError, match="a key occurs twice"):
        export_capture(tmp_path / "lake", tmp_path / "out", "npy")
    assert [path.name for path in tmp_path.iterdir()] == ["lake"]
