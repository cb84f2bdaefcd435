"""To a device: the same numbers, through the same code on a CPU; the parts that need CUDA are marked."""

import threading
import time

import numpy as np
import pytest
import torch

from hiddenlake.cache.errors import CorruptError, StoreError
from hiddenlake.cache.store import direct, open_capture

SAMPLES = 19
DTYPES = ("bfloat16", "float16", "float32")
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DTYPES)
def capture(request, tiny, tmp_path):
    tiny.write(tmp_path / "c", SAMPLES, dtype=request.param)
    return open_capture(tmp_path / "c")


@pytest.mark.parametrize("device", DEVICES)
def test_a_read_to_a_device_has_the_same_bits(capture, device):
    for question in [
        {"layer": 2, "position": "-1"}, {"layer": [5, 0]}, {"position": "last_q", "samples": 3},
        {"samples": [7, 7, 1]}, {},
    ]:  # fmt: skip
        host = capture.read("mlp_out", **question)
        sent = capture.read("mlp_out", device=device, **question)
        assert sent.dtype == getattr(torch, capture.coverage.dtype) and tuple(sent.shape) == host.shape
        bits = torch.int32 if host.dtype.itemsize == 4 else torch.int16
        assert np.array_equal(
            sent.contiguous().view(bits).cpu().numpy(), np.ascontiguousarray(host).view(f"i{host.dtype.itemsize}")
        )
        wide = capture.read("mlp_out", device=device, dtype="float32", **question)
        assert wide.dtype == torch.float32
        assert np.array_equal(wide.cpu().numpy(), capture.read("mlp_out", dtype="float32", **question), equal_nan=True)


@pytest.mark.parametrize("device", DEVICES)
def test_a_data_array_moves_to_a_device(capture, device):
    data = capture.dataset()
    for array in [
        data["mlp_out"].sel(layer=2, position="-1"),
        data["resid_post"].isel(sample=slice(None, None, -2), layer=[2, 0]),
        data["embed"].isel(position=0),
        data["mlp_out"].sel(layer=5, position="last_q").load(),
        data["mlp_out"].isel(layer=1, position=1, hidden=slice(3, 9)),
    ]:
        moved = array.hl.to_gpu(device)
        assert moved.dims == array.dims and moved.dtype == np.float32 and set(moved.coords) == set(array.coords)
        values = moved.data if device == "cpu" else moved.data.get()
        assert np.array_equal(values, array.values, equal_nan=True)


def test_a_lazy_array_is_read_as_it_is_stored(capture, monkeypatch):
    wanted = []
    read = type(capture.snapshot).read_cells
    monkeypatch.setattr(
        type(capture.snapshot), "read_cells", lambda self, *a, **k: (wanted.append(a[3]), read(self, *a, **k))[1]
    )
    capture.dataset()["mlp_out"].sel(layer=2, position="-1").hl.to_gpu("cpu")
    assert wanted == ["stored"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_a_device_that_is_missing_is_named(capture):
    for use in (
        lambda: capture.read("mlp_out", 0, "-1", device="cuda"),
        lambda: capture.dataset()["mlp_out"].sel(layer=2, position="-1").hl.to_gpu(),
    ):
        with pytest.raises(StoreError, match="no CUDA device"):
            use()
    with pytest.raises(StoreError, match="'gpu' is no device"):
        capture.read("mlp_out", 0, "-1", device="gpu")
    with pytest.raises(ValueError, match="both `out` and `device`"):
        capture.read("mlp_out", 0, "-1", device="cpu", out=np.empty((SAMPLES, 24)))


def test_cells_come_in_order_and_are_read_ahead(capture, monkeypatch):
    every = [(layer, position) for layer in capture.coverage.layers for position in capture.coverage.positions]
    seen = []
    for layer, position, X in capture.cells("mlp_out"):
        seen.append((layer, position))
        assert np.array_equal(X.view(np.uint8), capture.read("mlp_out", layer, position).view(np.uint8))
    assert seen == every
    assert [(layer, position) for layer, position, _ in capture.cells("embed", positions=["-1"])] == [(None, "-1")]
    started, read = [], capture.read

    def recorded(site, layer, position, samples):
        started.append((layer, position))
        return read(site, layer, position, samples)

    monkeypatch.setattr(capture, "read", recorded)
    cells = capture.cells("mlp_out", ahead=3)
    next(cells)
    deadline = time.monotonic() + 10
    while len(started) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.05)
    # The one in work and three ahead, and no more.
    assert started == every[:4]
    cells.close()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hiddenlake-prefetch")]


def test_an_error_comes_with_its_cell(tiny, tmp_path):
    tiny.write(tmp_path / "c", 4)
    capture = open_capture(tmp_path / "c")
    file = capture.snapshot.layout.files["mlp_out"]
    name = tmp_path / "c" / "mlp_out" / "c.0.0.0.0"
    raw = bytearray(name.read_bytes())
    raw[5 * file.pitch] ^= 1
    name.write_bytes(raw)
    seen = []
    with pytest.raises(CorruptError, match=r"mlp_out/c\.0\.0\.0\.0"):
        for layer, position, _ in capture.cells("mlp_out"):
            seen.append((layer, position))
    assert len(seen) == 5


class PlainFile:
    """What kvikio's CuFile does, for memory of the host."""

    def __init__(self, path, mode):
        self.file = open(path, "rb")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def pread(self, buffer, size, file_offset):
        self.file.seek(file_offset)
        buffer[:size] = torch.frombuffer(bytearray(self.file.read(size)), dtype=torch.uint8)
        return type("Future", (), {"get": staticmethod(lambda: size)})


def test_the_ranges_of_direct_reads_are_those_of_the_others(capture):
    """The way around the CPU, with files of the host in the place of cuFile's."""
    snapshot = capture.snapshot
    full = [k for k, commit in snapshot.commits.items() if all(commit.keys)]
    rows = np.flatnonzero(np.isin(snapshot.shard, full))
    for outer in ([[2, 0], [3]], [[0, 1, 2], [0, 1, 2, 3]]):
        reads = snapshot._cell_reads("mlp_out", [np.asarray(axis) for axis in outer], rows)
        assert direct.can_read(reads)
        out = torch.empty((len(outer[0]) * len(outer[1]), len(rows), 24), dtype=getattr(torch, capture.coverage.dtype))
        direct.read(reads, out, PlainFile)
        found = out.view(torch.int32 if out.element_size() == 4 else torch.int16).numpy()
        truth = snapshot.read_cells("mlp_out", outer, rows, "stored")
        assert np.array_equal(found, truth.reshape(found.shape).view(found.dtype))
    assert not direct.can_read(snapshot._cell_reads("mlp_out", [np.arange(1), np.arange(1)], rows[:1]))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is CUDA")
def test_nothing_is_direct_without_kvikio():
    assert not direct.available()
