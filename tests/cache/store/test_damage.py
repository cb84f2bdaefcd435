import json
import shutil

import numpy as np
import pytest
import zarr

from hiddenlake.cache.errors import CorruptError
from hiddenlake.cache.store import open_capture
from hiddenlake.cache.store.backend import open_backend
from hiddenlake.cache.store.verify import kept_report, verify

SAMPLES = 10


@pytest.fixture(scope="module")
def intact(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("lake") / "numbers"
    tiny.write(path, SAMPLES)
    return path


@pytest.fixture
def path(intact, tmp_path):
    # Each test gets its own path, so that nothing that was checked before is remembered for it.
    return shutil.copytree(intact, tmp_path / "numbers")


def flip(file, offset):
    raw = bytearray(file.read_bytes())
    raw[offset] ^= 0x10
    file.write_bytes(raw)


def use_everything(path):
    """Read a capture as a user would: all of it, and single rows of it."""
    capture = open_capture(path)
    for site in (*capture.coverage.sites, "embed"):
        for row in range(len(capture)):
            capture.read(site, samples=[row], layer=None)
        capture.read(site)
    capture.samples()
    capture.failures()


@pytest.mark.parametrize(
    ("name", "offset"),
    [
        ("mlp_out/c.0.0.0.0", 5),  # a value
        ("mlp_out/c.0.0.1.0", 4096 * 7 + 100),  # a value of another cell
        ("embed/c.0.1.0", 9),
        ("samples/0.parquet", 60),
        ("samples/2.parquet", -9),
        ("commits/0.json", 40),
        ("commits/1.json", -40),
        ("zarr.json", 300),
    ],
)
def test_a_flipped_bit_is_an_error_that_names_the_file(path, name, offset):
    size = (path / name).stat().st_size
    flip(path / name, offset % size)
    with pytest.raises(CorruptError) as error:
        use_everything(path)
    assert str(path / name) in str(error.value)
    assert "restore" in str(error.value) or "hiddenlake verify" in str(error.value)
    report = verify(path)
    assert not report.ok and name in {problem.file for problem in report.problems}
    assert json.loads((path / "verify.json").read_text())["ok"] is False


@pytest.mark.parametrize("offset", [24 * 2 * 4 + 1, -20, -1], ids=["chunk's checksum", "index", "index's checksum"])
def test_a_flipped_bit_that_only_other_readers_see_is_found_and_changes_nothing(path, offset, assert_holds):
    """Our reads go by the commit, which repeats both."""
    name = "mlp_out/c.0.0.0.0"
    flip(path / name, offset % (path / name).stat().st_size)
    use_everything(path)
    assert_holds(path, complete=SAMPLES)
    assert [problem.file for problem in verify(path).problems] == [name]
    group = zarr.open_group(path, mode="r")
    with pytest.raises(ValueError, match="checksum"):
        group["mlp_out"][:]


def test_a_file_of_another_shard_is_no_file_of_this_one(path):
    """All its own checksums are right, but they are not those that were committed."""
    for name in ("mlp_out/c.0.0.{}.0", "row_crc/mlp_out/c.0.0.{}", "samples/{}.parquet"):
        shutil.copy(path / name.format(1), path / name.format(0))
    assert {problem.file for problem in verify(path).problems} >= {
        "mlp_out/c.0.0.0.0", "row_crc/mlp_out/c.0.0.0", "samples/0.parquet"
    }  # fmt: skip
    capture = open_capture(path)
    row = int(np.flatnonzero(capture.snapshot.shard == 0)[0])
    for samples in (None, row):
        with pytest.raises(CorruptError, match="was committed"):
            capture.read("mlp_out", samples=samples)
    with pytest.raises(CorruptError, match=r"samples/0\.parquet"):
        capture.samples()


def test_an_open_capture_never_reads_what_was_captured_later_in_its_place(path, tiny):
    """A commit that was deleted, and its shard captured again with other samples in its slots."""
    before = open_capture(path)
    (path / "commits" / "0.json").unlink()
    keys = [key for key in before.commits[0].keys if key is not None]
    with tiny.open_tiny(path, SAMPLES) as writer:
        assert sorted(writer.reserve(sorted(keys), len(keys))) == sorted(keys)
        for name in sorted(keys, reverse=True)[1:] + sorted(keys)[-1:]:
            tiny.add(writer, int(name.removeprefix("key-")))
    assert open_capture(path).commits[0].keys != before.commits[0].keys
    for samples in (None, keys[0]):
        with pytest.raises(CorruptError, match="was committed"):
            before.read("mlp_out", samples=samples)


@pytest.mark.parametrize("offset", [8, -2])
def test_damaged_row_checksums_are_noticed_when_they_are_used(path, offset):
    name = "row_crc/mlp_out/c.0.0.0"
    flip(path / name, offset % (path / name).stat().st_size)
    assert name in {problem.file for problem in verify(path).problems}
    capture = open_capture(path)
    capture.read("mlp_out")  # whole chunks have their own checksum
    with pytest.raises(CorruptError, match="row_crc"):
        # One row of each cell, which with the row checksums is less to read than the cells.
        capture.read("mlp_out", samples=[capture.commits[0].keys[1]])


def test_every_bit_of_a_small_shard_is_guarded(path):
    """verify notices a flip anywhere: values, padding, index."""
    name = "embed/c.0.0.0"
    size = (path / name).stat().st_size
    for offset in [*range(0, size, 997), size - 1]:
        flip(path / name, offset)
        assert name in {problem.file for problem in verify(path).problems}, offset
        flip(path / name, offset)
    assert verify(path).ok


@pytest.mark.parametrize("name", ["mlp_out/c.0.0.0.0", "embed/c.0.0.0", "samples/0.parquet"])
@pytest.mark.parametrize("keep", [0, 100, None])
def test_a_truncated_or_missing_file_is_an_error_that_says_where_it_ends(path, name, keep):
    if keep is None:
        (path / name).unlink()
    else:
        (path / name).write_bytes((path / name).read_bytes()[:keep])
    with pytest.raises(CorruptError) as error:
        use_everything(path)
    assert str(path / name) in str(error.value)
    assert "committed with it" in str(error.value) if keep is None else f"ends at byte {keep}" in str(error.value)
    assert name in {problem.file for problem in verify(path).problems}


@pytest.mark.parametrize(
    "name",
    [
        "token_index/c.0.0", "in_answer/c.0.1", "committed/c.0", "sample/c.2", "layer/c.0", "position/c.0",
        "mlp_out/zarr.json", "row_crc/embed/zarr.json", "row_crc/zarr.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("missing", [False, True])
def test_derived_files_are_reported_and_rebuilt(path, tiny, name, missing, assert_holds):
    before = (path / name).read_bytes()
    if missing:
        (path / name).unlink()
    else:
        flip(path / name, len(before) // 2)
    assert [problem.file for problem in verify(path).problems] == [name]
    assert_holds(path, complete=SAMPLES)
    tiny.open_tiny(path, SAMPLES).close()
    assert (path / name).read_bytes() == before
    assert verify(path).ok


def test_a_damaged_failure_list_is_an_error(path):
    (path / "failures" / "x.parquet").write_bytes(b"PAR1 but not really PAR1")
    with pytest.raises(CorruptError, match=r"x\.parquet"):
        open_capture(path).failures()


def test_the_remedy_works(path, tiny, assert_holds):
    """What the error says to do brings the samples back."""
    flip(path / "mlp_out" / "c.0.0.1.0", 5)
    (path / "commits" / "1.json").unlink()
    assert_holds(path)
    tiny.write(path, SAMPLES)
    assert_holds(path, complete=SAMPLES)
    assert verify(path).ok


def test_rules_are_verified_beyond_checksums(path, tiny):
    """A commit whose checksums are right vouches for nothing that breaks the store's rules."""
    from crc32c import crc32c

    from hiddenlake.cache.store.commits import ChunkRecord, Commit, read_commit

    place = open_backend(path)
    commit = read_commit(place, 0)
    layout = open_capture(path).snapshot.layout
    name, file = layout.data_file("embed", 0), layout.files["embed"]
    raw = bytearray((path / name).read_bytes())
    raw[0:2] = (0x7F80).to_bytes(2, "little")  # infinite
    raw[file.chunk_bytes : file.chunk_bytes + 4] = crc32c(bytes(raw[: file.chunk_bytes])).to_bytes(4, "little")
    (path / name).write_bytes(raw)
    crcs = crc32c(bytes(raw[: file.chunk_bytes])).to_bytes(4, "little") + commit.files[name].crcs[4:]
    files = commit.files | {name: ChunkRecord(len(raw), crcs)}
    other = commit.keys[:-1] + (read_commit(place, 1).keys[0],)
    (path / "commits" / "0.json").unlink()
    Commit(0, commit.writer, 1, {}, other, commit.order, files, commit.time).publish(place)
    found = [str(problem) for problem in verify(path).problems]
    assert any("embed/c.0.0.0 at byte 0: row 0 of the chunk differs from its row_crc" in text for text in found)
    assert any("is in shard 0 too" in text for text in found)
    assert any("samples/0.parquet: slots, keys or order differ" in text for text in found)


def test_verify_says_how_far_it_is_and_what_it_checked(path):
    seen = []
    report = verify(path, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    assert (report.shards, report.samples, report.bytes) == (3, SAMPLES, open_capture(path).nbytes)
    assert report.ok and report.kept
    assert kept_report(open_backend(path)) == report.to_json() | {"problems": []}
