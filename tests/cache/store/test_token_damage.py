"""Damage to token-level data: an error that names the file and what to do, never another token's activation."""

import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from crc32c import crc32c

from hiddenlake.cache.errors import CorruptError
from hiddenlake.cache.positions import Tokens
from hiddenlake.cache.store import open_capture
from hiddenlake.cache.store.backend import open_backend
from hiddenlake.cache.store.commits import ChunkRecord, FileRecord, read_commit
from hiddenlake.cache.store.layout import encode_numbers
from hiddenlake.cache.store.verify import verify

SAMPLES = 10


@pytest.fixture(scope="module")
def intact(tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("lake") / "numbers"
    tiny.write(path, SAMPLES, coverage=tiny.coverage(tokens=Tokens("all")))
    return path


@pytest.fixture
def path(intact, tmp_path):
    # Each test gets its own path, so that nothing that was checked before is remembered for it.
    return shutil.copytree(intact, tmp_path / "numbers")


@pytest.fixture
def layout(intact):
    return open_capture(intact).snapshot.layout


def flip(file, offset):
    raw = bytearray(file.read_bytes())
    raw[offset] ^= 0x10
    file.write_bytes(raw)


def commit_again(path, number, **changes):
    """Replace a commit by one whose own checksum is right."""
    place = open_backend(path)
    commit = dataclasses.replace(read_commit(place, number), **changes)
    (path / "commits" / f"{number}.json").unlink()
    commit.publish(place)


def use_everything(path):
    """Read all tokens as a user would: at once, of one sample, and single ones."""
    capture = open_capture(path)
    for site in capture.coverage.widths:
        for row in range(len(capture)):
            capture.read_tokens(site, samples=row)
            capture.read_tokens(site, samples=row, tokens=slice(1, 2))
        capture.read_tokens(site)


def problem_files(path):
    return {problem.file for problem in verify(path).problems}


@pytest.mark.parametrize(
    ("name", "offset"),
    [
        ("tokens/mlp_out/c.0.0.0", 5),  # a value
        ("tokens/resid_post/c.0.1.0", 4096 * 7 + 100),  # a value of another layer
        ("tokens/embed/c.1.0", 9),
    ],
)
def test_a_flipped_bit_is_an_error_that_names_the_file_and_every_commit(path, name, offset):
    flip(path / name, offset % (path / name).stat().st_size)
    with pytest.raises(CorruptError) as error:
        use_everything(path)
    shard = int(re.findall(r"\d+", name)[-2])
    for commit in open_capture(path).commits:
        named = f"commits/{commit.shard}.json" in str(error.value)
        assert named == (shard in commit.token_shards)
    assert str(path / name) in str(error.value) and "hiddenlake verify" in str(error.value)
    assert name in problem_files(path)


@pytest.mark.parametrize("offset", [8, -2])
def test_damaged_row_checksums_are_noticed_when_they_are_used(path, offset):
    name = "row_crc/tokens/mlp_out/c.0.1"
    flip(path / name, offset % (path / name).stat().st_size)
    assert name in problem_files(path)
    capture = open_capture(path)
    start = capture.snapshot.token_start.tolist()
    # One row of each layer, which with the row checksums is less to read than the chunks.
    row = next(i for i, at in enumerate(start) if 16 < at < 30)
    with pytest.raises(CorruptError, match="row_crc/tokens"):
        capture.read_tokens("mlp_out", samples=row, tokens=slice(0, 1))


def test_every_bit_of_a_token_file_is_guarded(path, layout):
    """verify notices a flip anywhere: values of samples, holes, padding, index."""
    name = layout.token_data_file("embed", max(open_capture(path).commits[-1].token_shards))
    size = (path / name).stat().st_size
    for offset in [*range(0, size, 997), size - 1]:
        flip(path / name, offset)
        assert name in problem_files(path), offset
        flip(path / name, offset)
    assert verify(path).ok


@pytest.mark.parametrize("name", ["tokens/mlp_out/c.0.1.0", "tokens/embed/c.0.0", "row_crc/tokens/mlp_out/c.0.0"])
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
    assert name in problem_files(path)


@pytest.mark.parametrize(
    "name",
    [
        "tokens/sample_start/c.0", "tokens/sample_length/c.2", "tokens/zarr.json", "tokens/mlp_out/zarr.json",
        "tokens/sample_start/zarr.json", "row_crc/tokens/zarr.json", "row_crc/tokens/embed/zarr.json",
    ],
)  # fmt: skip
@pytest.mark.parametrize("missing", [False, True])
def test_derived_files_are_reported_and_rebuilt(path, tiny, name, missing, assert_holds):
    before = (path / name).read_bytes()
    if missing:
        (path / name).unlink()
    else:
        flip(path / name, len(before) // 2)
    assert problem_files(path) == {name}
    assert_holds(path, complete=SAMPLES)
    tiny.open_tiny(path, SAMPLES, coverage=open_capture(path).coverage).close()
    assert (path / name).read_bytes() == before
    assert verify(path).ok


def test_the_remedy_works(path, tiny, assert_holds):
    """What the error says to do brings the samples back."""
    flip(path / "tokens" / "mlp_out" / "c.0.1.0", 5)
    with pytest.raises(CorruptError) as error:
        open_capture(path).read_tokens("mlp_out")
    named = re.findall(r"commits/\d+\.json", str(error.value))
    assert named
    for name in named:
        (path / name).unlink()
    assert_holds(path)
    tiny.write(path, SAMPLES, coverage=tiny.coverage(tokens=Tokens("all")))
    assert_holds(path, complete=SAMPLES)
    assert verify(path).ok


def test_a_row_that_is_not_finite_is_found_whatever_its_checksums_say(path, layout):
    name, row_crc = layout.token_data_file("embed", 0), layout.token_row_crc_file("embed", 0)
    file = layout.token_files["embed"]
    raw = bytearray((path / name).read_bytes())
    raw[48:50] = (0x7F80).to_bytes(2, "little")  # infinite, in the second row
    raw[file.chunk_bytes : file.chunk_bytes + 4] = crc32c(bytes(raw[: file.chunk_bytes])).to_bytes(4, "little")
    (path / name).write_bytes(raw)
    rows = np.frombuffer((path / row_crc).read_bytes(), "<u4")[:-1].copy()
    rows[1] = crc32c(bytes(raw[48:96]))
    (path / row_crc).write_bytes(encode_numbers(rows))
    first = open_capture(path).commits[0].files[name].crcs
    records = {
        name: ChunkRecord(len(raw), crc32c(bytes(raw[: file.chunk_bytes])).to_bytes(4, "little") + first[4:]),
        row_crc: FileRecord.of((path / row_crc).read_bytes()),
    }
    for commit in open_capture(path).commits:
        if 0 in commit.token_shards:
            commit_again(path, commit.shard, files=commit.files | records)
    assert [str(problem) for problem in verify(path).problems] == [
        f"{name} at byte 48: row 1 of the chunk is not finite"
    ]


def test_commits_that_contradict_each_other_are_refused(path, layout):
    first, second = (commit for commit in open_capture(path).commits if 1 in commit.token_shards)
    name = layout.token_data_file("mlp_out", 1)
    other = ChunkRecord(second.files[name].size, second.files[name].crcs[::-1])
    commit_again(path, second.shard, files=second.files | {name: other})
    with pytest.raises(CorruptError, match=re.escape(f"{path / name}: the commits of the shards")):
        open_capture(path).read_tokens("mlp_out")
    found = f"commits/{second.shard}.json: differs from commits/{first.shard}.json on token shard 1"
    assert found in [str(problem) for problem in verify(path).problems]


@pytest.mark.parametrize(
    ("change", "found"),
    [
        (lambda start, length: (start - 1, length), "its tokens overlap another sample's in token shard"),
        (lambda start, length: (start + 2, length), "its tokens overlap another sample's in token shard"),
        (lambda start, length: (start, length - 1), "tokens of a sample are stored: expected the"),
        (lambda start, length: (16 * 16, length), "token shard 16 lacks some of its tokens"),
    ],
)
def test_spans_that_cannot_be_are_found(path, change, found):
    commit = read_commit(open_backend(path), 1)
    spans = list(commit.spans)
    spans[1] = change(*spans[1])
    commit_again(path, 1, spans=tuple(spans))
    assert any(found in str(problem) for problem in verify(path).problems)


def test_tokens_that_a_file_does_not_have_cannot_be_read(path, layout):
    """A row behind the chunks that are there would otherwise be the next layer's."""
    capture = open_capture(path)
    shard = max(capture.commits[-1].token_shards)
    columns = capture.commits[-1].token_shards[shard]
    assert columns < layout.shard_tokens // layout.chunk_tokens, "the last shard is full"
    spans = list(capture.commits[-1].spans)
    at = shard * layout.shard_tokens + columns * layout.chunk_tokens
    spans[0] = at, spans[0][1]
    commit_again(path, capture.commits[-1].shard, spans=tuple(spans))
    key = capture.commits[-1].keys[0]
    with pytest.raises(CorruptError, match="lacks some of its tokens"):
        open_capture(path).read_tokens("mlp_out", samples=key)


def test_verify_counts_token_shards(path):
    capture, seen = open_capture(path), []
    report = verify(path, progress=lambda done, total: seen.append((done, total)))
    total = len(capture.commits) + len({shard for commit in capture.commits for shard in commit.token_shards})
    assert seen == [(n, total) for n in range(1, total + 1)]
    assert (report.shards, report.samples, report.bytes) == (3, SAMPLES, capture.nbytes)
    assert json.loads((path / "verify.json").read_text())["ok"] is True
