"""Where a writer puts tokens: spans, pieces, token shards, and what is left of all that goes wrong."""

import dataclasses
import json
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from hiddenlake.cache.errors import CaptureError, StoreError
from hiddenlake.cache.positions import Tokens
from hiddenlake.cache.store import attach, open_capture
from hiddenlake.cache.store.local import LocalBatch
from hiddenlake.cache.store.signing import sign, to_json_bytes
from hiddenlake.cache.store.verify import verify

T, K = 4, 16
LONG = 7  # the number of a sample that is longer than two token shards


@pytest.fixture
def coverage(tiny):
    return tiny.coverage(tokens=Tokens("all"))


@pytest.fixture
def alone(tiny):
    return tiny.coverage(positions=(), tokens=Tokens("all"))


def begin(tiny, writer, i):
    """Reserve a sample, its slot and its span. Returns what `finish` wants."""
    writer.reserve([tiny.key(i)], 1)
    found = tiny.tokens(i, writer.coverage)
    return (*writer.slot(), i, writer.span(len(found["embed"])), found)


def write_cells(tiny, writer, shard, slot, i):
    present = np.array(tiny.sample(i).token_index) >= 0
    for site, cells in tiny.rows(i, writer.coverage).items() if writer.coverage.positions else ():
        shard.views[site][..., present, slot, :] = cells[..., present, :]


def finish(tiny, writer, begun):
    shard, slot, i, span, found = begun
    tiny.fill(writer, span, found)
    write_cells(tiny, writer, shard, slot, i)
    writer.add(shard, slot, tiny.sample(i, writer.coverage.positions), span)


def write_piece(piece, found):
    for site, view in piece.shard.views.items():
        view[..., piece.rows, :] = found[site][..., piece.first : piece.first + piece.count, :]


def test_spans_lie_one_behind_the_other_and_cross_shards(tiny, tmp_path, alone):
    with tiny.open_tiny(tmp_path / "c", 30, coverage=alone) as writer:
        at = 0
        for i in range(20):
            begun = begin(tiny, writer, i)
            span = begun[3]
            assert (span.start, span.length) == (at, tiny.sample(i).total_length)
            at += span.length
            finish(tiny, writer, begun)
    capture = open_capture(tmp_path / "c")
    assert capture.snapshot.token_places.tolist() == list(range(at))
    assert (writer.published, writer.bytes_written) == (20, capture.nbytes)


def test_chunks_that_nobody_filled_are_not_in_the_file(tiny, tmp_path, alone):
    with tiny.open_tiny(tmp_path / "c", 30, coverage=alone) as writer:
        finish(tiny, writer, begin(tiny, writer, 2))  # 7 tokens, two chunks of four
        layout = writer.layout
    commit = open_capture(tmp_path / "c").commits[0]
    assert commit.token_shards == {0: 2}
    full, size = layout.token_files["mlp_out"], (tmp_path / "c" / "tokens" / "mlp_out" / "c.0.0.0").stat().st_size
    assert size == full.size - 3 * 2 * full.pitch
    assert verify(tmp_path / "c").ok


def test_a_sample_longer_than_both_buffers_is_handed_out_piece_by_piece(tiny, tmp_path, coverage, assert_holds):
    with tiny.open_tiny(tmp_path / "c", 30, coverage=coverage) as writer:
        shard, slot, i, span, found = begin(tiny, writer, LONG)
        first, second = writer.piece(span), writer.piece(span)
        assert [(piece.row, piece.count, piece.first) for piece in (first, second)] == [(0, K, 0), (0, K, K)]
        assert first.shard is not second.shard and span.rest == span.length - 2 * K > 0
        assert writer.piece(span) is None
        for piece in (first, second):
            write_piece(piece, found)
            writer.filled(piece)
        third = writer.piece(span)
        assert third.first == 2 * K and not span.rest
        with pytest.raises(ValueError, match="all rows of the span were handed out"):
            writer.piece(span)
        with pytest.raises(StoreError, match=r"32 of the span's 46 rows are filled"):
            writer.add(shard, slot, tiny.sample(i), span)
        write_piece(third, found)
        writer.filled(third)
        with pytest.raises(StoreError, match="filled before"):
            writer.filled(third)
        write_cells(tiny, writer, shard, slot, i)
        writer.add(shard, slot, tiny.sample(i), span)
    assert [*assert_holds(tmp_path / "c").keys] == [tiny.key(LONG)]


def test_buffers_go_to_shards_in_order_so_that_none_waits_for_ever(tiny, tmp_path, alone, assert_holds):
    with tiny.open_tiny(tmp_path / "c", 30, coverage=alone) as writer:
        early, late = begin(tiny, writer, LONG), begin(tiny, writer, LONG + 11)
        # The later span begins in the third shard, which gets no buffer while the first two need theirs.
        assert writer.piece(late[3]) is None
        finish(tiny, writer, early)
        finish(tiny, writer, late)
    assert len(assert_holds(tmp_path / "c")) == 2


def test_a_piece_waits_while_both_buffers_are_published(tiny, tmp_path, alone, monkeypatch, assert_holds):
    gate = threading.Event()
    add = LocalBatch.add
    monkeypatch.setattr(LocalBatch, "add", lambda *a: (gate.wait(10), add(*a)))
    with tiny.open_tiny(tmp_path / "c", 30, coverage=alone) as writer:
        shard, slot, i, span, found = begin(tiny, writer, LONG)
        for piece in (writer.piece(span), writer.piece(span)):
            write_piece(piece, found)
            writer.filled(piece)
        threading.Timer(0.2, gate.set).start()
        before = time.monotonic()
        tiny.fill(writer, span, found)
        assert time.monotonic() - before > 0.1
        writer.add(shard, slot, tiny.sample(i, ()), span)
    assert len(assert_holds(tmp_path / "c")) == 1


def test_a_full_sample_shard_is_committed_once_its_tokens_are_durable(tiny, tmp_path, coverage, assert_holds):
    path = tmp_path / "c"
    with tiny.open_tiny(path, 30, shard_samples=2, coverage=coverage, shard_tokens=(T, 32)) as writer:
        for i in range(4):
            finish(tiny, writer, begin(tiny, writer, i))
        for future in writer._publisher.pending():
            future.result()
        # Two sample shards are full and on disk, 24 tokens are in a token shard of 32.
        assert (path / "samples" / "1.parquet").exists()
        assert len(open_capture(path)) == writer.published == 0
        finish(tiny, writer, begin(tiny, writer, LONG))
        for future in writer._publisher.pending():
            future.result()
        assert len(assert_holds(path)) == writer.published == 4
        writer.flush()
        assert len(assert_holds(path)) == writer.published == 5
        finish(tiny, writer, begin(tiny, writer, 5))
    assert len(assert_holds(path)) == 6


def test_writers_at_once_share_no_token_shard(tiny, tmp_path, coverage, assert_holds):
    """A sample crosses into the next shard only where that is free; else it starts in a new one."""
    path = tmp_path / "c"
    with tiny.open_tiny(path, 40, coverage=coverage) as a, tiny.open_tiny(path, 40, coverage=coverage) as b:
        for i in range(26):
            writer = (a, b)[i % 2]
            finish(tiny, writer, begin(tiny, writer, i))
    capture = assert_holds(path, complete=26)
    holders = {}
    for commit in capture.commits:
        for shard in commit.token_shards:
            assert holders.setdefault(shard, commit.writer) == commit.writer
    assert len(set(holders.values())) == 2
    assert verify(path).ok
    places = np.sort(capture.snapshot.token_places)
    assert len(np.unique(places)) == len(places) < places[-1] + 1, "no hole where a writer met another's shard"


def test_what_is_released_leaves_a_hole_that_nothing_refers_to(tiny, tmp_path, coverage, assert_holds):
    import zarr

    path = tmp_path / "c"
    with tiny.open_tiny(path, 40, coverage=coverage) as writer:
        finish(tiny, writer, begin(tiny, writer, 0))
        for filled in (0, 1, 2, 3):
            shard, slot, _, span, found = begin(tiny, writer, LONG)
            for _ in range(filled):
                piece = writer.piece(span)
                write_piece(piece, found)
                writer.filled(piece)
            if span.rest:
                writer.piece(span)  # handed out, and never filled
            writer.release(shard, slot, span)
            with pytest.raises(StoreError, match="not handed out"):
                writer.piece(span)
            finish(tiny, writer, begin(tiny, writer, 20 + filled))
        shard, slot, _, span, found = begin(tiny, writer, 5)
        tiny.fill(writer, span, found)
        writer.release(shard, slot, span)
    capture = assert_holds(path)
    assert np.isnan(zarr.open(path, mode="r")["tokens/embed"][span.start].astype(np.float32)).all()
    assert capture.keys == [tiny.key(i) for i in (0, 20, 21, 22, 23)]
    report = verify(path)
    assert report.ok, report.problems
    # The sample that failed is captured after all.
    tiny.write(path, 24, coverage=coverage)
    assert_holds(path, complete=24)


def test_a_shard_of_released_samples_alone_is_never_written(tiny, tmp_path, alone):
    path = tmp_path / "c"
    with tiny.open_tiny(path, 40, coverage=alone) as writer:
        shard, slot, _, span, _ = begin(tiny, writer, LONG)
        writer.piece(span)
        writer.release(shard, slot, span)
        finish(tiny, writer, begin(tiny, writer, 0))
    assert sorted(file.name for file in (path / "tokens" / "embed").glob("c.*")) == ["c.2.0", "c.3.0"]


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_rows_must_be_written_and_finite(tiny, tmp_path, dtype):
    coverage = tiny.coverage(dtype, ("mlp_out", "final_norm"), (), Tokens("all"))
    infinite, nan = (0x7F80, 0xFFC1) if dtype == "bfloat16" else (-np.inf, np.nan)
    with tiny.open_tiny(tmp_path / "c", 4, coverage=coverage) as writer:
        shard, slot, i, span, found = begin(tiny, writer, 3)
        piece = writer.piece(span)
        views = piece.shard.views
        with pytest.raises(CaptureError, match="mlp_out, layer 0: a token's row is not finite, or was never written"):
            writer.filled(piece)
        for bad in (infinite, nan):
            for site, where in (("mlp_out", (2, piece.row + piece.count - 1, 5)), ("final_norm", (piece.row, 23))):
                write_piece(piece, found)
                views[site][where] = bad
                with pytest.raises(CaptureError, match="layer 5" if site == "mlp_out" else "final_norm: a token"):
                    writer.filled(piece)
        write_piece(piece, found)
        writer.filled(piece)
        writer.add(shard, slot, tiny.sample(i, ()), span)
    assert verify(tmp_path / "c").ok


def test_the_span_must_be_the_samples_own(tiny, tmp_path, coverage, assert_holds):
    with tiny.open_tiny(tmp_path / "c", 8, coverage=coverage) as writer:
        shard, slot, i, span, found = begin(tiny, writer, 1)
        tiny.fill(writer, span, found)
        write_cells(tiny, writer, shard, slot, i)
        with pytest.raises(ValueError, match="0 tokens of a sample are stored: expected the 5 of all"):
            writer.add(shard, slot, tiny.sample(1))
        with pytest.raises(ValueError, match="5 tokens of a sample are stored: expected the 7 of all"):
            writer.add(shard, slot, tiny.sample(2), span)
        with pytest.raises(StoreError, match="1 slots are still handed out, and 1 spans"):
            writer.flush()
        writer.add(shard, slot, tiny.sample(1), span)
        with pytest.raises(StoreError, match="not handed out"):
            writer.release(*writer.slot(), span)
        # Where the last token has no activation, and the sample says so, it is not stored.
        short = dataclasses.replace(tiny.sample(2), token_index=(4, -1, 6, -1), status="the context is full")
        writer.reserve([tiny.key(2)], 1)
        shard, slot = writer.slot()
        found = {site: bits[..., :6, :] for site, bits in tiny.tokens(2, coverage).items()}
        span = writer.span(6)
        tiny.fill(writer, span, found)
        for site, cells in tiny.rows(2, coverage).items():
            shard.views[site][..., [0, 2], slot, :] = cells[..., [0, 2], :]
        with pytest.raises(ValueError, match="6 tokens of a sample are stored: expected the 7"):
            writer.add(shard, slot, dataclasses.replace(short, status="complete"), span)
        writer.add(shard, slot, short, span)
    capture = open_capture(tmp_path / "c")
    assert capture.read_tokens("embed").lengths.tolist() == [5, 6]
    assert verify(tmp_path / "c").ok


def test_a_sample_may_have_no_tokens(tiny, tmp_path, assert_holds):
    coverage = tiny.coverage(tokens=Tokens("all_generated"))
    with tiny.open_tiny(tmp_path / "c", 8, shard_samples=1, coverage=coverage) as writer:
        begun = begin(tiny, writer, 0)
        assert (begun[3].start, begun[3].length, begun[3].rest) == (-1, 0, 0)
        finish(tiny, writer, begun)
    capture = assert_holds(tmp_path / "c", complete=1)
    assert capture.commits[0].spans == ((-1, 0),) and capture.commits[0].token_shards == {}
    assert capture.dataset(tokens=True)["sample_length"].values.tolist() == [0]
    assert verify(tmp_path / "c").ok


def test_the_token_axis_grows(tiny, tmp_path, alone, assert_holds):
    import zarr

    path = tmp_path / "c"
    tiny.write(path, 30, coverage=alone, shard_tokens=(1, 2))
    capture = open_capture(path)
    assert zarr.open(path, mode="r")["tokens/embed"].shape[0] == 30 * 512
    with tiny.open_tiny(path, 1000, coverage=alone) as writer:
        assert writer.layout.shard_tokens == 2
        shard, slot = writer.slot()
        writer.release(shard, slot, writer.span(30 * 512))
    shape = zarr.open(path, mode="r")["tokens/embed"].shape
    assert shape[0] > 30 * 512 and shape == zarr.open_array(path / "tokens" / "embed", mode="r").shape
    assert zarr.open_array(path / "row_crc" / "tokens" / "mlp_out", mode="r").shape == (3, shape[0])
    assert_holds(path, complete=30)
    assert len(capture) == 30 and verify(path).ok


def test_pieces_are_filled_by_another_process(tiny, tmp_path, coverage, assert_holds):
    script = (
        "import importlib.util, json, sys; import numpy as np; from hiddenlake.cache.store import attach\n"
        "from hiddenlake.cache.positions import Tokens\n"
        "spec = importlib.util.spec_from_file_location('tiny', sys.argv[1])\n"
        "tiny = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(tiny)\n"
        "c = tiny.coverage(tokens=Tokens('all'))\n"
        "for line in sys.stdin:\n"
        "    handle, row, count, first, i = json.loads(line); views = attach(handle)\n"
        "    assert views['mlp_out'].shape == (3, 16, 24) and views['mlp_out'].dtype == np.uint16\n"
        "    for site, bits in tiny.tokens(i, c).items():\n"
        "        views[site][..., row : row + count, :] = bits[..., first : first + count, :]\n"
        "    print(handle['shard'], flush=True)\n"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", script, tiny.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with tiny.open_tiny(tmp_path / "c", 10, coverage=coverage, shared=True) as writer:
        for i in range(10):
            shard, slot, _, span, _ = begin(tiny, writer, i)
            while span.rest:
                piece = writer.piece(span)
                message = [piece.shard.handle, piece.row, piece.count, piece.first, i]
                print(json.dumps(message), file=worker.stdin, flush=True)
                assert worker.stdout.readline().strip() == str(piece.shard.number)
                writer.filled(piece)
            write_cells(tiny, writer, shard, slot, i)
            writer.add(shard, slot, tiny.sample(i), span)
        handle = piece.shard.handle
    worker.communicate(timeout=30)
    assert worker.returncode == 0
    assert_holds(tmp_path / "c", complete=10)
    with pytest.raises(StoreError, match="shard buffer"):
        attach(handle)


def test_token_shards_of_the_dead_are_taken_over_and_those_of_the_living_left_alone(
    tiny, tmp_path, coverage, assert_holds
):
    path = tmp_path / "c"
    tiny.write(path, 3, coverage=coverage)  # 15 tokens: token shard 0
    layout = open_capture(path).snapshot.layout
    (path / "claims" / "tokens.1").write_bytes(to_json_bytes(sign({"writer": "dead", "fencing": 4})))
    dead = [*layout.token_files_of(1), "tokens/embed/.c.1.0.aaaa.partial", "tokens/.zarr.json.aaaa.partial"]
    for name in dead:
        (path / name).write_bytes(b"half")
    with tiny.open_tiny(path, 40, coverage=coverage) as first:
        assert not any((path / name).exists() for name in dead)
        begun = begin(tiny, first, LONG)
        assert begun[3].start == K
        piece = first.piece(begun[3])
        assert (piece.shard.number, piece.shard.fencing) == (1, 5)
        held = [*layout.token_files_of(1), "tokens/embed/.c.2.0.aaaa.partial"]
        for name in held:
            (path / name).write_bytes(b"half")
        with tiny.open_tiny(path, 40, coverage=coverage) as second:
            assert all((path / name).exists() for name in held)
            finish(tiny, second, begin(tiny, second, 5))
        assert all((path / name).exists() for name in held)
    assert_holds(path)
    tiny.write(path, 12, coverage=coverage)
    assert_holds(path, complete=12)
    assert verify(path).ok


@pytest.mark.parametrize("claim", ["claims/0", "claims/tokens.0"])
def test_a_lost_claim_stops_the_writer(tiny, tmp_path, coverage, claim):
    path = tmp_path / "c"
    writer = tiny.open_tiny(path, 8, coverage=coverage)
    finish(tiny, writer, begin(tiny, writer, 0))
    (path / claim).write_bytes(to_json_bytes(sign({"writer": "other", "fencing": 2})))
    with pytest.raises(StoreError, match=f"{claim} is no longer ours"):
        writer.flush()
    with pytest.raises(StoreError, match="no longer ours"):
        writer.span(3)
    writer.close()
    assert len(open_capture(path)) == 0
    # Nothing was written over what is another writer's by now.
    assert not list((path / ("samples" if claim == "claims/0" else "tokens/mlp_out")).glob("[!z]*"))


def test_a_token_claim_that_is_lost_between_writing_and_committing_stops_the_writer(tiny, tmp_path, alone):
    path = tmp_path / "c"
    writer = tiny.open_tiny(path, 8, coverage=alone)
    finish(tiny, writer, begin(tiny, writer, LONG))
    while not (path / "row_crc" / "tokens" / "resid_post" / "c.0.1").exists():
        time.sleep(0.01)
    (path / "claims" / "tokens.1").write_bytes(to_json_bytes(sign({"writer": "other", "fencing": 2})))
    with pytest.raises(StoreError, match=r"claims/tokens\.1 is no longer ours"):
        writer.flush()
    writer.close()
    assert len(open_capture(path)) == 0


def test_what_a_writer_leaves_that_dies_later_is_removed_by_the_next_to_claim_it(tiny, tmp_path, alone, assert_holds):
    path = tmp_path / "c"
    with tiny.open_tiny(path, 20, coverage=alone) as living:
        dead = tiny.open_tiny(path, 20, coverage=alone)
        finish(tiny, dead, begin(tiny, dead, LONG))
        dead._spans.close_shard()
        for future in dead._publisher.pending():
            future.result()
        left = [name for shard in range(3) for name in living.layout.token_files_of(shard)]
        assert all((path / name).exists() for name in left)
        dead._publisher.close()
        dead._claims._member._lock.release()  # as the system does for a process that is killed
        begun = begin(tiny, living, 0)
        piece = living.piece(begun[3])
        assert (piece.shard.number, piece.shard.fencing) == (0, 2)
        assert not any((path / name).exists() for name in living.layout.token_files_of(0))
        living.release(begun[0], begun[1], begun[3])
        finish(tiny, living, begin(tiny, living, LONG))
    assert_holds(path)
    assert verify(path).ok


def test_close_forgets_what_is_open(tiny, tmp_path, coverage, assert_holds):
    path = tmp_path / "c"
    with pytest.raises(KeyboardInterrupt), tiny.open_tiny(path, 8, coverage=coverage) as writer:
        finish(tiny, writer, begin(tiny, writer, 0))
        begun = begin(tiny, writer, LONG)
        piece = writer.piece(begun[3])
        write_piece(piece, begun[4])
        writer.filled(piece)
        writer.piece(begun[3])
        raise KeyboardInterrupt
    assert_holds(path, complete=1)
    assert verify(path).ok
    with pytest.raises(StoreError, match="closed"):
        writer.span(1)


def test_any_commit_may_go_though_others_share_its_token_shards(tiny, tmp_path, coverage, assert_holds):
    path = tmp_path / "c"
    tiny.write(path, 16, shard_samples=2, coverage=coverage, shard_tokens=(T, 64))
    commits = open_capture(path).commits
    assert sum(0 in commit.token_shards for commit in commits) > 2
    for commit in commits:
        (path / "commits" / f"{commit.shard}.json").unlink()
        capture = assert_holds(path)
        assert len(capture) == 14 and set(capture.keys) & set(commit.keys) == set()
        tiny.write(path, 16, coverage=coverage)
        assert_holds(path, complete=16)
        assert verify(path).ok
