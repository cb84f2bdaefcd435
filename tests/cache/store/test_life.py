"""The life of a capture after it was written: select, merge, compact, label, repair, rm, gc."""

import os

import numpy as np
import pyarrow as pa
import pytest

from hiddenlake.cache.errors import BadInputError, CorruptError, IdentityError, StoreError, UnknownNameError
from hiddenlake.cache.store import open_capture
from hiddenlake.cache.store.backend import open_backend
from hiddenlake.cache.store.compact import compact
from hiddenlake.cache.store.copying import copy, plan_merge, plan_select
from hiddenlake.cache.store.labels import add_label
from hiddenlake.cache.store.removal import collect_garbage, remove_capture
from hiddenlake.cache.store.repair import repair
from hiddenlake.cache.store.verify import verify

SAMPLES = 30
KINDS = pytest.mark.parametrize("kind", ["cells", "both", "tokens"])


@pytest.fixture
def make(tiny, tmp_path):
    def write(kind="cells", name="c", samples=SAMPLES, **settings):
        tiny.write(tmp_path / name, samples, coverage=tiny.coverage(**tiny.KINDS[kind]), **settings)
        return open_capture(tmp_path / name)

    return write


def names(folder):
    return sorted(os.listdir(folder))


def bits(array):
    return np.ascontiguousarray(array).view(np.uint8)


@KINDS
def test_a_selection_holds_exactly_what_was_chosen(make, tmp_path, kind):
    capture = make(kind)
    c = capture.coverage
    some = {"layers": [5, 0], "samples": ["key-0003", 7, 12], "sites": c.sites[:1]}
    some |= {"positions": ["-1", "last_q"]} if c.positions else {}
    copy(plan_select(capture, **some), open_backend(tmp_path / "part"))
    part = open_capture(tmp_path / "part")
    assert part.keys == [capture.keys[row] for row in sorted(capture.rows(some["samples"])[0])]
    assert part.identity == capture.identity and verify(tmp_path / "part").ok
    for site in part.coverage.widths:
        layer = {"layer": [0, 5]} if site not in ("embed", "final_norm") else {}
        if c.positions:
            assert part.coverage.positions == ("last_q", "-1")
            whole = capture.read(site, position=["last_q", "-1"], samples=part.keys, **layer)
            assert np.array_equal(bits(part.read(site)), bits(whole))
        if c.tokens:
            mine, whole = part.read_tokens(site), capture.read_tokens(site, samples=part.keys, **layer)
            assert np.array_equal(bits(mine.values), bits(whole.values))
            assert mine.offsets.tolist() == whole.offsets.tolist()
    assert part.provenance["copied_from"][0]["provenance"] == [{"host": "test"}]


def test_selecting_what_is_not_there_says_what_is(make):
    capture = make("both")
    with pytest.raises(UnknownNameError, match="no layer 3: it has 0, 2, 5"):
        plan_select(capture, layers=[3])
    with pytest.raises(UnknownNameError, match="no site 'attn_z'"):
        plan_select(capture, sites=["attn_z"])
    with pytest.raises(UnknownNameError, match="no sample 'nobody'"):
        plan_select(capture, samples=["nobody"])
    with pytest.raises(BadInputError, match="nothing would be left"):
        plan_select(capture, positions=[], tokens=False)
    assert plan_select(capture, positions=[]).coverage.positions == ()


def test_a_copy_that_was_interrupted_goes_on(make, tmp_path):
    capture = make("both")
    out = open_backend(tmp_path / "copy")

    def interrupt(done, total):
        if done >= 8:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        copy(plan_select(capture), out, shard_samples=4, progress=interrupt)
    before = len(open_capture(out))
    assert 0 < before < SAMPLES
    assert copy(plan_select(capture), out, shard_samples=4) == SAMPLES - before
    assert open_capture(out).keys == capture.keys and verify(out).ok
    assert copy(plan_select(capture), out) == 0


@KINDS
def test_merged_captures_hold_all_samples_and_labels(tiny, make, tmp_path, assert_holds, kind):
    make(kind, "whole")
    whole = open_capture(tmp_path / "whole")
    for name, rows in (("a", range(0, 11)), ("b", range(11, SAMPLES))):
        copy(plan_select(whole, samples=rows), open_backend(tmp_path / name))
        part = open_capture(tmp_path / name)
        add_label(part, "score", pa.table({"key": part.keys, "v": [float(row) for row in rows]}))
    captures = [open_capture(tmp_path / name) for name in ("b", "a")]
    copy(plan_merge(captures), open_backend(tmp_path / "merged"))
    merged = assert_holds(tmp_path / "merged", complete=SAMPLES)
    assert merged.labels()["score"].num_rows == SAMPLES and verify(tmp_path / "merged").ok
    with pytest.raises(BadInputError, match=r"key-0000 is in .*a and in .*merged"):
        plan_merge([captures[1], merged])


def test_captures_of_another_identity_are_not_merged(tiny, make, tmp_path):
    make("cells", "a")
    tiny.write(tmp_path / "b", 2, identity=tiny.IDENTITY | {"seed": 1})
    with pytest.raises(IdentityError, match=r"identity\.seed is 1 there and 0 here"):
        plan_merge([open_capture(tmp_path / "a"), open_capture(tmp_path / "b")])


@KINDS
def test_compaction_makes_few_full_shards_and_changes_no_bit(tiny, make, tmp_path, assert_holds, kind):
    capture = make(kind)
    add_label(capture, "mine", pa.table({"key": capture.keys, "v": list(range(SAMPLES))}))
    done = compact(tmp_path / "c", shard_samples=16)
    assert (done.samples, done.shards[1]) == (SAMPLES, 2) and done.shards[0] >= 8
    after = assert_holds(tmp_path / "c", complete=SAMPLES)
    assert after.shard_samples == 16 and after.labels()["mine"].num_rows == SAMPLES
    assert verify(tmp_path / "c").ok and names(tmp_path) == ["c"]
    with pytest.raises(StoreError, match="removed or replaced since it was opened"):
        capture.read_tokens("embed") if kind == "tokens" else capture.read("embed")
    # Writing goes on in it.
    tiny.write(tmp_path / "c", SAMPLES + 3, coverage=after.coverage)
    assert_holds(tmp_path / "c", complete=SAMPLES + 3)
    with pytest.raises(BadInputError, match="nothing to gain"):
        compact(tmp_path / "c", shard_samples=16)


def test_a_capture_that_is_written_is_neither_compacted_nor_removed_nor_repaired(tiny, make, tmp_path, assert_holds):
    make()
    with tiny.open_tiny(tmp_path / "c", 40) as writer:
        for action in (compact, remove_capture, repair):
            with pytest.raises(StoreError, match="is being written by 1 processes"):
                action(tmp_path / "c")
        writer.reserve([tiny.key(35)], 1)
        tiny.add(writer, 35)
    assert len(assert_holds(tmp_path / "c")) == SAMPLES + 1


def test_what_is_written_during_a_compaction_is_not_lost(tiny, make, tmp_path, assert_holds):
    make()

    def meanwhile(done, total):
        if done == total and len(open_capture(tmp_path / "c")) == SAMPLES:
            tiny.write(tmp_path / "c", SAMPLES + 1)

    with pytest.raises(StoreError, match="was written to meanwhile, and is as it was"):
        compact(tmp_path / "c", shard_samples=16, progress=meanwhile)
    assert_holds(tmp_path / "c", complete=SAMPLES + 1)
    compact(tmp_path / "c", shard_samples=16)
    assert_holds(tmp_path / "c", complete=SAMPLES + 1)


def test_labels_are_checked(make, tmp_path):
    capture = make()
    keys = capture.keys
    csv = tmp_path / "score.csv"
    csv.write_text("key,score\n" + "".join(f"{key},{i / 10}\n" for i, key in enumerate(keys[:7])))
    assert add_label(capture, "score", csv) == 7
    values = open_capture(tmp_path / "c").dataset()["score"].values
    assert np.allclose(values[:7], np.arange(7) / 10) and np.isnan(values[7:]).all()
    for table, match in [
        (pa.table({"key": [*keys[:2], "nobody"], "v": [1, 2, 3]}), r"1 of 3 keys are not in .*nobody"),
        (pa.table({"key": [keys[0], keys[0]], "v": [1, 2]}), "1 keys occur twice"),
        (pa.table({"key": pa.array([None, keys[0]], pa.string()), "v": [1, 2]}), "1 rows have no key"),
        (pa.table({"name": keys, "v": keys}), "expected `key`"),
        (pa.table({"key": keys}), "at least one more"),
    ]:
        with pytest.raises(BadInputError, match=match):
            add_label(capture, "other", table)
    good = pa.table({"key": keys, "v": list(range(len(keys)))})
    for name in ("../x", "a b", "", "1a", "x/y"):
        with pytest.raises(BadInputError, match="expected letters"):
            add_label(capture, name, good)
    for name in ("mlp_out", "correct", "token_index", "score_v"):
        if name == "score_v":
            add_label(capture, "score", pa.table({"key": keys, "v": keys, "w": keys}), replace=True)
        with pytest.raises(BadInputError, match="has already"):
            add_label(capture, name, good)
    with pytest.raises(StoreError, match="has labels 'score' already"):
        add_label(capture, "score", csv)
    assert names(tmp_path / "c" / "labels") == ["score.parquet"]
    assert open_capture(tmp_path / "c").dataset()["score_w"].values.tolist() == keys
    (tmp_path / "bad.csv").write_text("a,b\n1")
    with pytest.raises(BadInputError, match=r"bad\.csv: cannot be read"):
        add_label(capture, "bad", tmp_path / "bad.csv")


def test_a_removed_capture_is_gone_and_its_readers_get_errors(tiny, make, tmp_path):
    capture = make("both")
    capture.read("mlp_out")
    view = capture.dataset()
    remove_capture(tmp_path / "c")
    assert names(tmp_path) == []
    with pytest.raises(StoreError, match="is no capture"):
        remove_capture(tmp_path / "c")
    # Another one of the same name, with other numbers in the same places.
    tiny.write(tmp_path / "c", SAMPLES, coverage=capture.coverage, identity=tiny.IDENTITY | {"seed": 1})
    for use in (
        lambda: capture.read("mlp_out"),
        lambda: capture.read_tokens("mlp_out", samples=0),
        lambda: view["mlp_out"].values,
        capture.refresh,
    ):
        with pytest.raises(StoreError, match="removed or replaced since it was opened"):
            use()


@KINDS
def test_garbage_is_what_the_dead_left_and_nothing_else(tiny, make, tmp_path, assert_holds, kind):
    make(kind)
    path = tmp_path / "c"
    left = [path / ".zarr.json.00ff.partial", path / "claims" / ".7.ab.partial", path / "samples" / "19.parquet"]
    for file in left:
        file.write_bytes(b"x" * 100)
    for folder in (".c.ab.removing", ".c.compacting/commits"):
        (tmp_path / folder).mkdir(parents=True)
        os.utime(tmp_path / folder.split("/")[0], (0, 0))
    (tmp_path / "notes").mkdir()
    said = {leftover.path for leftover in collect_garbage(tmp_path, dry=True)}
    assert said == {*map(str, left), str(tmp_path / ".c.ab.removing"), str(tmp_path / ".c.compacting")}
    assert all(file.exists() for file in left)
    assert {leftover.path for leftover in collect_garbage(tmp_path)} == said
    assert collect_garbage(tmp_path) == [] and names(tmp_path) == ["c", "notes"]
    assert_holds(path, complete=SAMPLES)
    assert verify(path).ok
    with tiny.open_tiny(path, 40, coverage=open_capture(path).coverage) as writer:
        shard, slot = writer.slot()
        held = path / "samples" / f"{shard.number}.parquet"
        held.write_bytes(b"half")
        assert collect_garbage(tmp_path) == [] and held.exists()
        writer.release(shard, slot)


def flip(file, offset):
    raw = bytearray(file.read_bytes())
    raw[offset] ^= 0x10
    file.write_bytes(raw)


@KINDS
def test_what_follows_from_intact_activations_is_made_again(make, tmp_path, assert_holds, kind):
    capture = make(kind)
    path, layout = tmp_path / "c", capture.snapshot.layout
    before = {name: (path / name).read_bytes() for commit in capture.commits for name in commit.files}
    files, row_crc = (
        (layout.token_files, layout.token_row_crc_file) if kind == "tokens" else (layout.files, layout.row_crc_file)
    )
    data = layout.token_data_file if kind == "tokens" else layout.data_file
    site = next(iter(files))
    flip(path / data(site, 0), -20)  # the index
    flip(path / data(site, 1), files[site].chunk_bytes + 2)  # a chunk's checksum
    flip(path / data("embed", 1), files["embed"].pitch - 1)  # what fills the page
    flip(path / row_crc(site, 0), 9)
    (path / row_crc("embed", 1)).unlink()
    (path / "committed" / "c.0").unlink()
    assert len({problem.file for problem in verify(path).problems}) >= 5
    done = repair(path)
    assert (done.moved, done.lost) == (0, [])
    assert {name: (path / name).read_bytes() for name in before} == before
    assert_holds(path, complete=SAMPLES)
    assert verify(path).ok, verify(path).problems


@KINDS
def test_intact_samples_of_a_damaged_shard_are_kept(tiny, make, tmp_path, assert_holds, kind):
    capture = make(kind)
    path, layout, snapshot = tmp_path / "c", capture.snapshot.layout, capture.snapshot
    if kind == "tokens":
        row = int(np.flatnonzero(snapshot.token_length)[3])
        shard, at = divmod(int(snapshot.token_start[row]), layout.shard_tokens)
        file = layout.token_files["embed"]
        chunk, slot = divmod(at, layout.chunk_tokens)
        flip(path / layout.token_data_file("embed", shard), chunk * file.pitch + slot * file.row_bytes)
        others = [commit.shard for commit in capture.commits if shard in commit.token_shards]
    else:
        row = 9
        file = layout.files["mlp_out"]
        shard = int(snapshot.shard[row])
        flip(path / layout.data_file("mlp_out", shard), file.pitch * 2 + int(snapshot.slot[row]) * file.row_bytes)
        others = [shard]
    lost = capture.keys[row]
    there = [key for commit in capture.commits if commit.shard in others for key in commit.keys if key]
    done = repair(path)
    assert done.lost == [lost] and done.moved == len(there) - 1
    after = assert_holds(path)
    assert after.keys == [key for key in capture.keys if key != lost]
    assert verify(path).ok, verify(path).problems
    tiny.write(path, SAMPLES, coverage=capture.coverage)
    assert_holds(path, complete=SAMPLES)
    assert verify(path).ok


def test_samples_that_are_damaged_beyond_repair_are_named_and_captured_again(tiny, make, tmp_path, assert_holds):
    capture = make()
    path = tmp_path / "c"
    flip(path / "samples" / "1.parquet", 60)
    flip(path / "commits" / "2.json", 40)
    flip(path / "claims" / "0", 3)
    done = repair(path)
    gone = [key for commit in capture.commits if commit.shard == 1 for key in commit.keys if key]
    assert done.lost == ["all samples of shard 2, whose commit is damaged", *sorted(gone)]
    assert verify(path).ok
    assert len(assert_holds(path)) == SAMPLES - 8
    tiny.write(path, SAMPLES)
    assert_holds(path, complete=SAMPLES)


@KINDS
def test_several_shards_may_be_damaged_in_other_ways(tiny, make, tmp_path, assert_holds, kind):
    """One lost its table of samples, so that all of it is lost; another a row, behind which the first must not stand."""
    capture = make(kind)
    path, layout, snapshot = tmp_path / "c", capture.snapshot.layout, capture.snapshot
    flip(path / "samples" / "5.parquet", 60)
    if kind == "tokens":
        row = next(row for row in range(SAMPLES) if snapshot.token_length[row] and snapshot.shard[row] == 0)
        shard, at = divmod(int(snapshot.token_start[row]), layout.shard_tokens)
        file, (chunk, slot) = layout.token_files["embed"], divmod(at, layout.chunk_tokens)
        flip(path / layout.token_data_file("embed", shard), chunk * file.pitch + slot * file.row_bytes)
    else:
        row = int(np.flatnonzero(snapshot.shard == 0)[0])
        file = layout.files["mlp_out"]
        flip(path / layout.data_file("mlp_out", 0), file.pitch + int(snapshot.slot[row]) * file.row_bytes)
    gone = {key for commit in capture.commits if commit.shard == 5 for key in commit.keys if key}
    done = repair(path)
    assert set(done.lost) == gone | {capture.keys[row]} and done.moved
    assert set(assert_holds(path).keys) == set(capture.keys) - set(done.lost)
    assert verify(path).ok
    tiny.write(path, SAMPLES, coverage=capture.coverage)
    assert_holds(path, complete=SAMPLES)


def test_row_checksums_of_a_token_shard_that_is_not_full_are_made_again(make, tmp_path):
    capture = make("both", samples=10)
    path, layout = tmp_path / "c", capture.snapshot.layout
    shard, columns = max((shard, n) for commit in capture.commits for shard, n in commit.token_shards.items())
    assert columns < layout.shard_tokens // layout.chunk_tokens, "the last shard is full"
    name = layout.token_row_crc_file("mlp_out", shard)
    before = (path / name).read_bytes()
    flip(path / name, 9)
    assert repair(path).rebuilt == [name] and (path / name).read_bytes() == before
    assert verify(path).ok


def test_a_capture_with_a_loss_is_not_compacted(make, tmp_path):
    make(name="f", codec="fp8")
    with pytest.raises(BadInputError, match="would lose a second time: `hiddenlake select"):
        compact(tmp_path / "f", shard_samples=16)


def test_repair_of_a_healthy_capture_changes_nothing(make, tmp_path):
    make("both")
    before = {file: file.read_bytes() for file in (tmp_path / "c").rglob("*") if file.is_file()}
    done = repair(tmp_path / "c")
    assert (done.rebuilt, done.moved, done.lost) == ([], 0, [])
    assert {file: file.read_bytes() for file in (tmp_path / "c").rglob("*") if file.is_file()} == before


def test_a_root_that_is_damaged_cannot_be_guessed(make, tmp_path):
    make()
    flip(tmp_path / "c" / "zarr.json", 300)
    with pytest.raises(CorruptError, match=r"zarr\.json"):
        repair(tmp_path / "c")
