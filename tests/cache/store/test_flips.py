"""One flipped bit in any file of a capture: an error that names the file, or nothing changes; never another number."""

import random
import shutil
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from hiddenlake.cache.errors import CorruptError, HiddenlakeError
from hiddenlake.cache.positions import Tokens
from hiddenlake.cache.samples import Failure
from hiddenlake.cache.store import open_capture
from hiddenlake.cache.store.backend import open_backend
from hiddenlake.cache.store.catalog import describe
from hiddenlake.cache.store.opened import close_all
from hiddenlake.cache.store.tables import decode_loose, encode_failures
from hiddenlake.cache.store.verify import verify

SAMPLES = 7
OPEN_CLAIM = "claims/9"
CODECS = pytest.mark.parametrize("codec", ["none", "zstd", "fp8"])

# What repeats commits and samples for readers that know Zarr only; ours never looks at it, and a writer rebuilds it.
DERIVED = ("committed/", "sample/", "token_index/", "in_answer/", "layer/", "position/", "tokens/sample_")


@pytest.fixture(scope="module")
def make(tiny, tmp_path_factory):
    """Captures with a file of every class, one a codec."""
    made = {}

    def make(codec):
        if codec not in made:
            path = tmp_path_factory.mktemp(codec) / "numbers"
            coverage = tiny.coverage(sites=("mlp_out",), tokens=Tokens("all"))
            settings = {"coverage": coverage, "codec": codec, "shard_tokens": (4, 32)}
            with tiny.open_tiny(path, SAMPLES, **settings) as writer:
                for key in writer.reserve([tiny.key(i) for i in range(SAMPLES)], SAMPLES):
                    tiny.add(writer, int(key.removeprefix("key-")))
                writer.fail(Failure(tiny.key(8), 4, "out of memory", 2))
            # As a writer leaves it that claimed a shard and was killed.
            shutil.copy(path / "claims" / "0", path / OPEN_CLAIM)
            table = pa.table({"key": [tiny.key(i) for i in range(SAMPLES)], "odd": [i % 2 for i in range(SAMPLES)]})
            pq.write_table(table, path / "labels" / "odd.parquet", write_page_checksum=True)
            assert verify(path).ok
            made[codec] = path
        return made[codec]

    return make


def flip(file, offset, bit):
    raw = bytearray(file.read_bytes())
    raw[offset] ^= bit
    file.write_bytes(raw)


def everything(path):
    """What a user can read of a capture: bits of activations, and tables."""
    capture = open_capture(path)
    found = {"keys": capture.keys, "samples": capture.samples(), "failures": capture.failures()}
    found |= {f"labels {name}": table for name, table in capture.labels().items()}
    for site in capture.coverage.widths:
        found[site] = capture.read(site).tobytes()
        found[f"tokens {site}"] = capture.read_tokens(site).values.tobytes()
        # Single rows go by their own checksums where that is less to read.
        for row in range(0, len(capture), 3):
            found[f"{site} {row}"] = capture.read(site, samples=row).tobytes()
            found[f"tokens {site} {row}"] = capture.read_tokens(site, samples=row, tokens=slice(1, 2)).values.tobytes()
    found["about"] = describe(capture) | {"path": None}
    return found


def files_of(path):
    return sorted(file.relative_to(path).as_posix() for file in path.rglob("*") if file.is_file())


def flips_of(path, name, chance, count):
    """(offset, bit) of the first byte, the last, and some between."""
    size = (path / name).stat().st_size
    offsets = {0, size - 1, *(chance.randrange(size) for _ in range(count))} if size else set()
    return [(offset, 1 << chance.randrange(8)) for offset in sorted(offsets)]


@pytest.mark.slow
@CODECS
def test_a_flipped_bit_anywhere_never_changes_what_is_read(make, tmp_path, codec):
    intact, chance, count = make(codec), random.Random(codec), 0
    before = everything(intact)
    refused, reported = set(), set()
    for name in files_of(intact):
        for offset, bit in flips_of(intact, name, chance, 6):
            count += 1
            path = tmp_path / str(count) / "numbers"  # a path of its own, so that nothing is remembered for it
            shutil.copytree(intact, path)
            flip(path / name, offset, bit)
            where = (name, offset, bit)
            try:
                found = everything(path)
            except HiddenlakeError as error:
                assert str(path / name) in str(error) or (name == "zarr.json" and str(path) in str(error)), where
                refused.add(name)
            else:
                assert found.keys() == before.keys(), where
                assert [key for key in found if found[key] != before[key]] == [], where
            problems = {problem.file for problem in verify(path).problems} if name != "zarr.json" else {name}
            assert problems <= {name}, (where, problems)
            if name in problems:
                reported.add(name)
            elif name.startswith("claims/") or not name.startswith(("writers/", "labels/", "verify.json")):
                raise AssertionError(f"verify says nothing of {where}")
            close_all(open_backend(path))
            shutil.rmtree(path.parent)
    silent = {name for name in files_of(intact) if name not in reported}
    # The lock's file is empty, verify writes its own result anew, and labels are as safe as whoever wrote them made them.
    assert {name for name in silent if not name.startswith("labels/")} <= {"verify.json", "writers/lock"}
    assert {"verify.json", "zarr.json", "commits/0.json", "samples/0.parquet"} <= refused
    assert any(name.startswith("failures/") for name in refused)
    assert not {name for name in refused if name.startswith(DERIVED)}
    assert any(name.startswith("scale/") for name in refused) == (codec == "fp8")


@pytest.mark.parametrize("bit", [1, 16, 128])
def test_every_bit_of_an_open_claim_is_guarded(make, tiny, tmp_path, bit):
    """Nobody takes over, or goes on with, what a damaged claim may say to be another's."""
    intact = make("none")
    raw = (intact / OPEN_CLAIM).read_bytes()
    path = shutil.copytree(intact, tmp_path / "numbers")
    settings = {"coverage": open_capture(path).coverage, "shard_tokens": (4, 32)}
    (path / OPEN_CLAIM).rename(path / "claims" / "2")  # the shard that is next
    for offset in range(len(raw) - 1):  # the last byte is the end of the line, which means nothing
        damaged = bytearray(raw)
        damaged[offset] ^= bit
        (path / "claims" / "2").write_bytes(damaged)
        with pytest.raises(CorruptError, match="claims/2: not a claim"):
            with tiny.open_tiny(path, 20, **settings) as writer:
                writer.slot()
    (path / "claims" / "2").write_bytes(raw)
    tiny.write(path, 9, **settings)
    assert verify(path).ok


def test_every_bit_of_a_list_of_failures_is_guarded():
    """Its footer too, which says what the columns are: Parquet itself has checksums for pages alone."""
    raw = encode_failures([(Failure("key-0001", 3, "out of memory", 2), datetime.now(UTC))])
    good = decode_loose(raw, "x")
    assert pq.read_table(pa.BufferReader(raw)).equals(good)
    errors = 0
    for offset in range(len(raw)):
        for bit in (1, 16, 128):
            damaged = bytearray(raw)
            damaged[offset] ^= bit
            try:
                # Only in the mark itself does it change nothing.
                assert decode_loose(bytes(damaged), "x").equals(good), (offset, bit)
            except CorruptError:
                errors += 1
    assert errors > 3 * (len(raw) - 30)


@pytest.mark.parametrize("where", ["failures", "labels"])
def test_a_damaged_table_is_an_error_that_names_it(make, tmp_path, where):
    path = shutil.copytree(make("none"), tmp_path / "numbers")
    (file,) = (path / where).glob("*.parquet")
    flip(file, 40, 16)  # in the first page
    for use in (lambda: getattr(open_capture(path), where)(), lambda: everything(path)):
        with pytest.raises(CorruptError) as error:
            use()
        assert str(file) in str(error.value)
    assert [problem.file for problem in verify(path).problems] == [f"{where}/{file.name}"]


@pytest.mark.parametrize("name", ["data", "scale"])
@pytest.mark.parametrize("tokens", [False, True])
def test_a_flipped_bit_of_fp8_is_an_error_however_it_is_read(make, tmp_path, name, tokens):
    path = shutil.copytree(make("fp8"), tmp_path / "numbers")
    layout = open_capture(path).snapshot.layout
    file_of = {
        ("data", False): layout.data_file, ("scale", False): layout.scale_file,
        ("data", True): layout.token_data_file, ("scale", True): layout.token_scale_file,
    }[name, tokens]  # fmt: skip
    file = file_of("mlp_out", 0)
    flip(path / file, 2, 4)
    capture = open_capture(path)
    for dtype in ("stored", "float32"):
        with pytest.raises(CorruptError) as error:
            (capture.read_tokens if tokens else capture.read)("mlp_out", dtype=dtype)
        assert str(path / file) in str(error.value)
    assert file in {problem.file for problem in verify(path).problems}


def test_half_a_line_of_reservations_is_taken_back(tiny, tmp_path, monkeypatch):
    """A disk that fills up in the middle of a line would else stop every other writer."""
    import errno
    import os

    from hiddenlake.cache.store import files

    class Full:
        def __getattr__(self, name):
            return getattr(os, name)

        def write(self, descriptor, data):
            if os.fstat(descriptor).st_size >= 5:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            return os.write(descriptor, data[:5])

    keys = [tiny.key(i) for i in range(6)]
    with tiny.open_tiny(tmp_path / "c", 6) as first, tiny.open_tiny(tmp_path / "c", 6) as second:
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", Full())
            with pytest.raises(HiddenlakeError, match="disk is full"):
                first.reserve(keys, 2)
        assert second.reserve(keys, 2) == keys[:2]
        assert first.reserve(keys, 2) == keys[2:4]


def test_damaged_reservations_of_a_living_writer_are_an_error(tiny, tmp_path):
    keys = [tiny.key(i) for i in range(6)]
    with tiny.open_tiny(tmp_path / "c", 6) as first, tiny.open_tiny(tmp_path / "c", 6) as second:
        first.reserve(keys, 2)
        flip(Path(tmp_path / "c" / "writers" / f"{first._claims.writer}.jsonl"), 0, 1)
        with pytest.raises(CorruptError, match=first._claims.writer):
            second.reserve(keys, 2)
