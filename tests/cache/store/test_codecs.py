"""Codecs and data types: what is stored is what was written, or as near as the codec says."""

import json

import ml_dtypes
import numpy as np
import pytest
import tensorstore
import zarr

from hiddenlake.cache.errors import CorruptError, IdentityError
from hiddenlake.cache.positions import Tokens
from hiddenlake.cache.store import codecs, fp8, open_capture, opened
from hiddenlake.cache.store.codecs import decompress
from hiddenlake.cache.store.coverage import DTYPES
from hiddenlake.cache.store.verify import verify

SAMPLES = 10
DTYPE_NAMES = ("bfloat16", "float16", "float32")


@pytest.fixture(params=DTYPE_NAMES)
def dtype(request):
    return request.param


@pytest.fixture(params=["none", "zstd", "fp8"])
def codec(request):
    return request.param


@pytest.fixture
def path(tiny, tmp_path, dtype, codec):
    tiny.write(tmp_path / "c", SAMPLES, coverage=tiny.coverage(dtype, tokens=Tokens("all")), codec=codec)
    return tmp_path / "c"


def wanted(bits, dtype, codec):
    """The values of bits as float32, through the codec."""
    values = bits.view(DTYPES[dtype][1])
    if codec != "fp8":
        return values.astype(np.float32)
    return fp8.decode(*fp8.encode(np.ascontiguousarray(values)))


def test_every_way_of_reading_gives_what_was_written(path, expected, tiny, dtype, codec):
    capture = open_capture(path)
    every = expected(SAMPLES, capture.coverage)
    for site, bits in every.items():
        whole = wanted(bits, dtype, codec)
        for read, truth in [
            (capture.read(site, dtype="float32"), whole),
            (capture.read(site, samples=[3], dtype="float32"), whole[..., [3], :]),
            (capture.read(site, samples=[7, 2, 2], dtype="float32"), whole[..., [7, 2, 2], :]),
        ]:
            assert np.array_equal(read, truth, equal_nan=True)
        stored = capture.read(site)
        assert stored.dtype == DTYPES[dtype][1]
        assert np.array_equal(stored.astype(np.float32), whole.astype(stored.dtype).astype(np.float32), equal_nan=True)
        assert np.array_equal(capture.dataset()[site].values, whole, equal_nan=True)
    for row in (0, 7):
        for site, bits in tiny.tokens(row, capture.coverage).items():
            found = capture.read_tokens(site, samples=row, dtype="float32").values
            assert np.array_equal(found, wanted(bits, dtype, codec), equal_nan=True)
    report = verify(path)
    assert report.ok, report.problems


def test_other_readers_read_the_same(path, dtype, codec):
    capture = open_capture(path)
    group = zarr.open_group(path, mode="r")
    committed = np.flatnonzero(group["committed"][:])
    order = [list(group["sample"][:][committed]).index(key) for key in capture.keys]
    for site in capture.coverage.widths:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": f"{path}/{site}"}}
        other = tensorstore.open(spec, read=True).result().read().result()
        found = group[site][:]
        assert np.array_equal(found.view(np.uint8), np.asarray(other).view(np.uint8))
        if codec == "fp8":
            attributes = group[site].attrs
            assert attributes["encoding"] == "float8_e4m3fn"
            found = fp8.decode(found, group[attributes["scale"]][:])
        found = found[..., committed, :][..., order, :].astype(np.float32)
        assert np.array_equal(found, capture.read(site, dtype="float32"), equal_nan=True)


@pytest.mark.parametrize("codec", ["zstd", "fp8"], indirect=True)
@pytest.mark.parametrize("dtype", ["bfloat16"], indirect=True)
def test_a_flipped_bit_is_an_error(path, codec):
    names = ["mlp_out/c.0.0.0.0", "tokens/embed/c.0.0"]
    names += ["scale/mlp_out/c.0.0.0", "scale/tokens/embed/c.0"] if codec == "fp8" else []
    for name in names:
        raw = bytearray((path / name).read_bytes())
        raw[11] ^= 4
        (path / name).write_bytes(raw)
        assert name in {problem.file for problem in verify(path).problems}
        opened._arrays.clear()  # what was read before is remembered, and was right
        capture = open_capture(path)
        with pytest.raises(CorruptError, match=name):
            capture.read_tokens("embed") if "tokens" in name else capture.read("mlp_out")
        raw[11] ^= 4
        (path / name).write_bytes(raw)
    assert verify(path).ok


@pytest.mark.parametrize("codec", ["fp8"], indirect=True)
@pytest.mark.parametrize("dtype", ["bfloat16"], indirect=True)
def test_what_fp8_lost_is_stated(path, expected):
    capture = open_capture(path)
    bits = expected(SAMPLES, capture.coverage)["mlp_out"].view(ml_dtypes.bfloat16).astype(np.float64)
    there = ~np.isnan(bits).any(-1)
    read = capture.read("mlp_out", dtype="float32").astype(np.float64)
    relative = np.linalg.norm(bits - read, axis=-1)[there] / np.linalg.norm(bits, axis=-1)[there]
    loss = capture.losses()["mlp_out"]
    assert loss.rows == there.sum()
    assert np.isclose(loss.relative, relative.max(), rtol=1e-3) and 0 < loss.relative < 0.04
    assert set(capture.losses()) == {*capture.coverage.widths, *(f"tokens/{site}" for site in capture.coverage.widths)}
    assert json.loads((path / "zarr.json").read_text())["attributes"]["hiddenlake"]["codec"] == "fp8"


def test_a_frame_of_another_size_is_refused_before_it_is_decoded():
    from numcodecs.zstd import compress

    for size in (1, 5, 300, 70_000, 3 << 20):
        data = np.frombuffer(compress(bytes(size), 1), np.uint8)
        assert codecs._content_bytes(data) == size
        out = np.empty(size, np.uint8)
        decompress(data, out)
        assert not out.any()
        with pytest.raises(ValueError, match="were expected"):
            decompress(data, np.empty(size + 1, np.uint8))
    with pytest.raises(ValueError):
        decompress(np.zeros(40, np.uint8), np.empty(40, np.uint8))


def test_a_capture_keeps_its_codec(tiny, tmp_path):
    tiny.write(tmp_path / "c", 2, codec="zstd")
    tiny.write(tmp_path / "c", 4)
    assert open_capture(tmp_path / "c").codec == "zstd" and verify(tmp_path / "c").ok
    with pytest.raises(IdentityError, match="is stored with the codec zstd, not fp8"):
        tiny.write(tmp_path / "c", 6, codec="fp8")
