import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cache.store import open_capture, ranges, tables
from hiddenlake.cache.store.verify import verify

SAMPLES = 14


@pytest.fixture(scope="module")
def path(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("lake") / "numbers"
    tiny.write(path, SAMPLES, shard_samples=4)
    pq.write_table(
        pa.table({"key": [tiny.key(3), tiny.key(0)], "score": [0.5, 2.0]}), path / "labels" / "hallucinated.parquet"
    )
    pq.write_table(
        pa.table({"key": [tiny.key(i) for i in range(SAMPLES)], "kind": ["x"] * SAMPLES, "fold": range(SAMPLES)}),
        path / "labels" / "error.parquet",
    )
    return path


@pytest.fixture
def data(path):
    return open_capture(path).dataset()


def test_coordinates_and_variables(data, tiny):
    assert data["mlp_out"].dims == ("layer", "position", "sample", "hidden")
    assert data["embed"].dims == ("position", "sample", "hidden")
    assert data["layer"].values.tolist() == list(tiny.LAYERS)
    assert data["position"].values.tolist() == list(tiny.POSITIONS)
    assert data["sample"].values.tolist() == [tiny.key(i) for i in range(SAMPLES)]
    assert data["mlp_out"].dtype == np.float32
    assert data.attrs["model.name"] == "tiny" and data.attrs["task"] == "numbers"
    for i in range(SAMPLES):
        one = data.isel(sample=i)
        sample = tiny.sample(i)
        assert one["token_index"].values.tolist() == list(sample.token_index)
        assert one["correct"].item() == sample.correct
        # xarray's missing value is NaN, also among strings.
        assert one["exact_answer"].item() == sample.exact_answer or bool(one["exact_answer"].isnull())
        assert tuple(one["token_ids"].item()) == sample.token_ids and one["answers"].item() == sample.answers
    assert not data["in_answer"].sel(position="last_q").any()


def test_labels_are_joined_by_key(data):
    labels = data["hallucinated"].values
    assert labels[3] == 0.5 and labels[0] == 2.0 and np.isnan(np.delete(labels, [0, 3])).all()
    assert data["error_kind"].values.tolist() == ["x"] * SAMPLES
    assert data["error_fold"].values.tolist() == list(range(SAMPLES))


def test_label_files_that_cannot_be_joined_are_named(tiny, tmp_path):
    path = tmp_path / "numbers"
    tiny.write(path, 4)
    pq.write_table(pa.table({"key": ["a", "a"], "v": [1, 2]}), path / "labels" / "twice.parquet")
    with pytest.raises(BadInputError, match=r"twice\.parquet.*twice"):
        open_capture(path).dataset()
    (path / "labels" / "twice.parquet").unlink()
    pq.write_table(pa.table({"key": [tiny.key(0)], "v": [1]}), path / "labels" / "group.parquet")
    with pytest.raises(BadInputError, match=r"group\.parquet"):
        open_capture(path).dataset()


def test_selecting_reads_only_what_is_asked_for(path, monkeypatch):
    wanted = []
    read = ranges._read_chunk
    monkeypatch.setattr(
        ranges,
        "_read_chunk",
        lambda chunk, *a, **k: (wanted.append(chunk[0].committed.name), read(chunk, *a, **k))[1],
    )
    data = open_capture(path).dataset()
    cell = data["mlp_out"].sel(layer=2, position="-1")
    assert wanted == []
    cell.load()
    # One chunk of each shard, each at most tried once before it is waited for.
    assert {name.split("/")[0] for name in wanted} == {"mlp_out"} and len(set(wanted)) == len(data.sample) // 4 + 1
    assert len(wanted) <= 2 * len(set(wanted))


@pytest.mark.parametrize(
    "select",
    [
        lambda a: a.sel(layer=2, position="-1"),
        lambda a: a.sel(layer=[5, 0]).isel(sample=slice(None, None, -3)),
        lambda a: a.isel(sample=[5, 1, 1], hidden=slice(3, 9)),
        lambda a: a.isel(layer=-1, sample=-2),
        lambda a: a.sel(sample="key-0007"),
        lambda a: a.isel(sample=a["sample"].isin(["key-0002", "key-0011"])),
        lambda a: a.isel(hidden=3).transpose("sample", "layer", "position"),
    ],
)
def test_lazy_selection_equals_selecting_in_memory(data, select):
    assert select(data["mlp_out"]).identical(select(data["mlp_out"].copy(deep=True).load()))


def test_xarray_operations(data):
    cells = data["mlp_out"]
    absent = data["token_index"] < 0
    assert bool((cells.isnull().all("hidden") == absent).all()) and bool(absent.any())
    values = cells.values
    np.testing.assert_allclose(cells.mean("sample").values, np.nanmean(values, axis=2), rtol=1e-5)
    assert np.array_equal(cells.where(data["correct"], drop=True).values, values[:, :, ::2], equal_nan=True)
    longer = cells.sel(position="last_q").reindex(layer=[0, 1, 2])
    assert longer.sel(layer=1).isnull().all() and not longer.sel(layer=2).isnull().any()
    means = cells.sel(layer=0, position="last_q").groupby(data["group"]).mean()
    for group in ("group 0", "group 2"):
        rows = data["group"].values == group
        np.testing.assert_allclose(means.sel(group=group).values, values[0, 0, rows].mean(0), rtol=1e-5)
    assert bool(data.isnull()["correct"].any()) is False
    assert set(data.where(data["exact_answer_valid"], drop=True)["exact_answer"].values) == {"a"}


def test_samples_that_were_written_when_correct_could_not_be_null_are_read_beside_newer_ones(
    tiny, tmp_path, monkeypatch
):
    schema = tables.sample_schema()
    older = schema.set(schema.get_field_index("correct"), schema.field("correct").with_nullable(False))
    with monkeypatch.context() as patch:
        patch.setattr(tables, "sample_schema", lambda: older)
        tiny.write(tmp_path / "c", 4)
    tiny.write(tmp_path / "c", 6)
    schemas = [pq.read_schema(tmp_path / "c" / "samples" / f"{k}.parquet") for k in (0, 1)]
    assert [schema.field("correct").nullable for schema in schemas] == [False, True]
    data = open_capture(tmp_path / "c").dataset()
    assert data["correct"].values.tolist() == [tiny.sample(i).correct for i in range(6)]
    assert verify(tmp_path / "c").ok


def test_stored_bits_are_widened_exactly(path):
    capture = open_capture(path)
    stored = capture.dataset(dtype="stored")["mlp_out"]
    assert stored.dtype.name == "bfloat16"
    assert np.array_equal(stored.values.astype(np.float32), capture.dataset()["mlp_out"].values, equal_nan=True)
    with pytest.raises(BadInputError, match="float16"):
        capture.dataset(dtype="float16")
