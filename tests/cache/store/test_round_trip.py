import json
import subprocess
import sys

import numpy as np
import pytest

from hiddenlake.cache.store import open_capture
from hiddenlake.cache.store.layout import Layout
from hiddenlake.cache.store.shard_file import ALIGNMENT

SAMPLES = 10  # two full shards and half of a third


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def capture(request, tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("lake") / "numbers"
    tiny.write(path, SAMPLES, dtype=request.param)
    return open_capture(path)


def slots_of(capture):
    """Slots on disk of samples 0 to n."""
    return capture.snapshot.shard * capture.shard_samples + capture.snapshot.slot


def same_bits(left, right):
    left, right = np.ascontiguousarray(left), np.ascontiguousarray(right)
    return left.shape == right.shape and left.tobytes() == right.tobytes()


def test_read_returns_what_was_written(capture, expected, assert_holds):
    assert_holds(capture.path, complete=SAMPLES)
    assert capture.read("mlp_out").dtype.name == capture.coverage.dtype
    wide = capture.read("mlp_out", dtype="float32")
    assert wide.dtype == np.float32
    assert np.array_equal(wide, capture.read("mlp_out").astype(np.float32), equal_nan=True)


def test_samples_are_in_task_order(capture, tiny):
    assert capture.keys == [tiny.key(i) for i in range(SAMPLES)]
    table = capture.samples()
    for row, i in zip(table.to_pylist(), range(SAMPLES), strict=True):
        sample = tiny.sample(i)
        for name in ("key", "index", "sample_index", "group", "prompt", "answer", "correct", "checksum", "status"):
            assert row[name] == getattr(sample, name)
        assert tuple(row["token_ids"]) == sample.token_ids and tuple(row["logprobs"]) == sample.logprobs


def test_zarr_reads_the_same_bits(capture, expected):
    import zarr

    group = zarr.open(capture.path, mode="r")
    assert group.metadata.consolidated_metadata is not None
    slots = slots_of(capture)
    for site, bits in expected(SAMPLES, capture.coverage).items():
        array = group[site]
        assert array.dtype.name == capture.coverage.dtype
        stored = array[...]
        assert same_bits(stored[..., slots, :], bits)
        free = np.setdiff1d(np.arange(stored.shape[-2]), slots)
        assert np.isnan(stored[..., free, :].astype(np.float32)).all()
    assert group["committed"][...].nonzero()[0].tolist() == sorted(slots.tolist())
    assert group["sample"][...][slots].tolist() == capture.keys
    assert group["layer"][...].tolist() == list(capture.coverage.layers)
    assert group["position"][...].tolist() == list(capture.coverage.positions)
    # Without consolidated metadata, array by array.
    assert same_bits(zarr.open_array(f"{capture.path}/embed", mode="r")[...], group["embed"][...])


def test_xarray_opens_the_folder(capture, tiny):
    import xarray

    data = xarray.open_zarr(capture.path)
    data = data.isel(sample=data["committed"].values)
    assert data["mlp_out"].dims == ("layer", "position", "sample", "hidden")
    assert data["embed"].dims == ("position", "sample", "hidden")
    one = data["mlp_out"].sel(layer=5, position="-1", sample=tiny.key(3))
    assert same_bits(one.values, capture.read("mlp_out", 5, "-1", tiny.key(3)))
    index = data["token_index"].sel(sample=capture.keys).values
    assert index.T.tolist() == [list(tiny.sample(i).token_index) for i in range(SAMPLES)]
    inside = data["in_answer"].sel(sample=capture.keys).values
    lengths = np.array([tiny.sample(i).prompt_length for i in range(SAMPLES)])
    assert np.array_equal(inside, index >= lengths)


def test_tensorstore_reads_the_same_bits(capture, expected):
    tensorstore = pytest.importorskip("tensorstore")

    def read(name):
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{capture.path}/{name}"}}
        return tensorstore.open(spec).result().read().result()

    slots = slots_of(capture)
    for site, bits in expected(SAMPLES, capture.coverage).items():
        assert same_bits(read(site)[..., slots, :], bits)
    assert read("committed").nonzero()[0].tolist() == sorted(slots.tolist())
    assert read("row_crc/mlp_out").dtype == np.uint32


def test_chunks_start_on_pages(capture):
    layout = Layout(capture.coverage, capture.shard_samples)
    for site, file in layout.files.items():
        raw = capture.place.read(layout.data_file(site, 0))
        index = np.frombuffer(raw[-(16 * len(file.present) + 4) : -4], "<u8").reshape(-1, 2)
        assert (index[:, 0] % ALIGNMENT == 0).all() and (index[:, 1] == file.chunk_bytes + 4).all()
        view = np.ndarray(file.shape, file.bits, raw, 0, file.strides)
        assert view.shape[:-2] == file.outer


def test_bfloat16_is_registered_when_zarr_is_imported_later(capture):
    script = (
        "import sys, hiddenlake; assert 'zarr' not in sys.modules; import zarr; "
        "assert type(zarr.__spec__.loader).__module__ == '_frozen_importlib_external'; "
        "import json; print(json.dumps([str(zarr.open(sys.argv[1], mode='r')['mlp_out'].dtype), len(sys.meta_path)]))"
    )
    out = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(capture.path)], capture_output=True, text=True, check=True
    )
    assert json.loads(out.stdout)[0] == capture.coverage.dtype


def test_importing_the_store_imports_nothing_heavy():
    script = (
        "import sys, hiddenlake.cache.store; heavy = {'zarr', 'xarray', 'pyarrow', 'torch', 'pandas', 'numcodecs'}; "
        "print(*heavy & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""


def test_reading_needs_neither_zarr_nor_torch(capture):
    script = (
        "import sys; from hiddenlake.cache.store import open_capture; c = open_capture(sys.argv[1]); "
        "c.read('embed'); c.samples(); c.dataset(); print(*{'zarr', 'torch'} & set(sys.modules))"
    )
    out = subprocess.run([sys.executable, "-c", script, str(capture.path)], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == ""
