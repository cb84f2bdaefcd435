import gc
import json
import os
import subprocess
import sys
import threading
import time

import numpy as np
import pytest

from hiddenlake.cache.errors import BadInputError, CaptureError, IdentityError, StoreError
from hiddenlake.cache.samples import Failure
from hiddenlake.cache.store import Coverage, attach, claims, locks, open_capture
from hiddenlake.cache.store.claims import Claims
from hiddenlake.cache.store.local import LocalBackend, LocalBatch
from hiddenlake.cache.store.signing import sign, to_json_bytes
from hiddenlake.cache.store.verify import verify


def test_another_identity_is_refused_naming_each_field(tiny, tmp_path):
    tiny.write(tmp_path / "c", 4)
    other = {"model": {"name": "tiny", "revision": "def"}, "task": "numbers", "seed": 0, "lora": "x"}
    with pytest.raises(IdentityError) as error:
        tiny.open_tiny(tmp_path / "c", 4, identity=other, coverage=tiny.coverage("float32"))
    message = str(error.value)
    assert 'identity.model.revision is "abc" there and "def" here' in message
    assert 'identity.lora is absent there and "x" here' in message
    assert 'coverage.dtype is "bfloat16" there and "float32" here' in message
    assert "seed" not in message and "model.name" not in message


def test_another_coverage_is_refused(tiny, tmp_path):
    tiny.write(tmp_path / "c", 4)
    less = Coverage(tiny.SITES, tiny.LAYERS[:2], tiny.POSITIONS, dict.fromkeys(tiny.SITES, tiny.WIDTH))
    with pytest.raises(IdentityError, match=r"coverage\.layers is \[0, 2, 5\] there and \[0, 2\] here"):
        tiny.open_tiny(tmp_path / "c", 4, coverage=less)


def test_identity_must_be_plain_json(tiny, tmp_path):
    with pytest.raises(BadInputError, match="identity is not plain JSON"):
        tiny.open_tiny(tmp_path / "c", 4, identity={"a": object()})
    # What JSON makes equal is equal: a tuple is a list.
    tiny.open_tiny(tmp_path / "c", 4, identity={"a": (1, 2)}).close()
    tiny.open_tiny(tmp_path / "c", 4, identity={"a": [1, 2]}).close()


def test_a_folder_that_is_no_capture_is_left_alone(tiny, tmp_path):
    (tmp_path / "c").mkdir()
    tiny.open_tiny(tmp_path / "c", 4).close()
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.tex").write_text("years of work")
    with pytest.raises(StoreError, match="not empty and is no capture"):
        tiny.open_tiny(tmp_path / "d", 4)
    assert [f.name for f in (tmp_path / "d").iterdir()] == ["thesis.tex"]


def test_an_unknown_format_version_is_refused(tiny, tmp_path):
    tiny.write(tmp_path / "c", 4)
    root = json.loads((tmp_path / "c" / "zarr.json").read_text())
    root["attributes"]["hiddenlake"]["format_version"] = 99
    (tmp_path / "c" / "zarr.json").write_text(json.dumps(root))
    for open_it in (open_capture, lambda path: tiny.open_tiny(path, 4)):
        with pytest.raises(StoreError, match="format version 99"):
            open_it(tmp_path / "c")


def test_creation_leaves_nothing_beside_the_capture(tiny, tmp_path):
    left = tmp_path / ".c.0000.creating"
    (left / "writers").mkdir(parents=True)
    young = tmp_path / ".c.1111.creating"
    young.mkdir()
    os.utime(left, (0, 0))
    tiny.write(tmp_path / "c", 4)
    assert sorted(f.name for f in tmp_path.iterdir()) == [young.name, "c"]


def test_buffers_that_do_not_fit_are_refused_with_numbers(tiny, tmp_path):
    tiny.write(tmp_path / "c", 4)
    with pytest.raises(StoreError, match="MiB"):
        tiny.open_tiny(tmp_path / "c", 4, buffer_bytes=1000)


def test_reservations_split_the_work_between_living_writers(tiny, tmp_path):
    keys = [tiny.key(i) for i in range(10)]
    first = tiny.open_tiny(tmp_path / "c", 10)
    second = tiny.open_tiny(tmp_path / "c", 10)
    assert first.reserve(keys, 3) == keys[:3]
    assert second.reserve(keys, 3) == keys[3:6]
    assert first.reserve(keys, 2) == keys[6:8]
    second.close()
    assert first.reserve(keys, 100) == [*keys[3:6], *keys[8:]]
    assert first.reserve(keys, 100) == []
    first.close()


def test_committed_samples_are_not_reserved_again(tiny, tmp_path):
    tiny.write(tmp_path / "c", 6)
    with tiny.open_tiny(tmp_path / "c", 10) as writer:
        assert writer.reserve([tiny.key(i) for i in range(8)], 10) == [tiny.key(6), tiny.key(7)]
        assert writer.committed == {tiny.key(i) for i in range(6)}


def test_writing_more_than_planned_grows_the_sample_axis(tiny, tmp_path, assert_holds):
    import zarr

    tiny.write(tmp_path / "c", 3, shard_samples=2)
    assert zarr.open(tmp_path / "c", mode="r")["mlp_out"].shape[2] == 4
    tiny.write(tmp_path / "c", 11, shard_samples=2)
    capture = assert_holds(tmp_path / "c", complete=11)
    group = zarr.open(tmp_path / "c", mode="r")
    assert group["committed"][...].sum() == 11
    assert group["mlp_out"].shape[2] == zarr.open_array(tmp_path / "c" / "mlp_out", mode="r").shape[2] >= 11
    assert verify(capture.path).ok


def test_a_sample_must_be_reserved_and_is_stored_once(tiny, tmp_path):
    with tiny.open_tiny(tmp_path / "c", 4) as writer:
        with pytest.raises(StoreError, match="not reserved"):
            tiny.add(writer, 0)
        writer.reserve([tiny.key(0)], 1)
        tiny.add(writer, 0)
        with pytest.raises(StoreError, match="added before"):
            tiny.add(writer, 0)
    assert open_capture(tmp_path / "c").keys == [tiny.key(0)]


def test_a_slot_is_given_back_once_and_only_if_handed_out(tiny, tmp_path):
    with tiny.open_tiny(tmp_path / "c", 4) as writer:
        shard, slot = writer.slot()
        shard.views["mlp_out"][..., slot, :] = 7
        writer.release(shard, slot)
        with pytest.raises(StoreError, match="not handed out"):
            writer.release(shard, slot)
        assert writer.slot() == (shard, slot)
        # Not all of it, but enough that a row that nobody writes again is noticed.
        marks = shard.views["mlp_out"][..., slot, :] == 0x7FC0
        assert marks[..., 0].all() and marks[..., -1].all()


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_cells_must_be_finite_where_there_is_a_token_and_absent_elsewhere(tiny, tmp_path, dtype):
    with tiny.open_tiny(tmp_path / "c", 4, dtype=dtype) as writer:
        writer.reserve([tiny.key(0)], 1)
        shard, slot = writer.slot()
        with pytest.raises(CaptureError, match="position last_q is not finite"):
            writer.add(shard, slot, tiny.sample(0))
        for site, bits in tiny.rows(0, tiny.coverage(dtype)).items():
            shard.views[site][..., slot, :] = bits
        view = shard.views["mlp_out"]
        kept = view[1, 3, slot, 5].copy()
        view[1, 3, slot, 5] = 0x7F80 if dtype == "bfloat16" else np.inf
        with pytest.raises(CaptureError, match=r"mlp_out, layer 2, position -1 is not finite \(1 of 12 cells\)"):
            writer.add(shard, slot, tiny.sample(0))
        view[1, 3, slot, 5] = kept
        view[2, 1, slot, 0] = 0
        with pytest.raises(CaptureError, match="layer 5, position exact_answer_first is there, though"):
            writer.add(shard, slot, tiny.sample(0))
        view[2, 1, slot] = tiny.rows(0, tiny.coverage(dtype))["mlp_out"][2, 1]
        writer.add(shard, slot, tiny.sample(0))
    assert verify(tmp_path / "c").ok


def test_handing_out_every_slot_says_what_to_do(tiny, tmp_path):
    with tiny.open_tiny(tmp_path / "c", 4, shard_samples=2) as writer:
        for _ in range(4):
            writer.slot()
        with pytest.raises(StoreError, match="all 4 slots"):
            writer.slot()
        with pytest.raises(StoreError, match="4 slots are still handed out"):
            writer.flush()
    assert len(open_capture(tmp_path / "c")) == 0


def test_a_slot_waits_while_both_buffers_are_published(tiny, tmp_path, monkeypatch, assert_holds):
    gate = threading.Event()
    add = LocalBatch.add
    monkeypatch.setattr(LocalBatch, "add", lambda *a: (gate.wait(10), add(*a)))
    with tiny.open_tiny(tmp_path / "c", 6, shard_samples=2) as writer:
        writer.reserve([tiny.key(i) for i in range(6)], 6)
        for i in range(4):
            tiny.add(writer, i)
        threading.Timer(0.2, gate.set).start()
        before = time.monotonic()
        tiny.add(writer, 4)
        assert time.monotonic() - before > 0.1
    assert_holds(tmp_path / "c", complete=5)


@pytest.mark.parametrize("kind", ["cells", "both", "tokens"])
def test_a_closed_writer_holds_no_memory(kind, tiny, tmp_path):
    """Also while somebody holds the writer, as the frames do in which vLLM was imported first: it keeps them for ever."""

    def memory():
        links = (os.readlink(f.path) for f in os.scandir("/proc/self/fd") if os.path.lexists(f.path))
        return sum("memfd:hiddenlake" in link for link in links)

    gc.collect()
    before = memory()
    writer = tiny.write(tmp_path / "c", 9, coverage=tiny.coverage(**tiny.KINDS[kind]))
    assert memory() == before, writer


def test_close_commits_what_was_added_and_forgets_the_rest(tiny, tmp_path, assert_holds):
    with pytest.raises(KeyboardInterrupt), tiny.open_tiny(tmp_path / "c", 4) as writer:
        writer.reserve([tiny.key(i) for i in range(4)], 4)
        tiny.add(writer, 0)
        shard, slot = writer.slot()
        shard.views["mlp_out"][..., slot, :] = 3
        raise KeyboardInterrupt
    assert_holds(tmp_path / "c", complete=1)
    assert verify(tmp_path / "c").ok
    with pytest.raises(StoreError, match="closed"):
        writer.slot()
    assert not list((tmp_path / "c" / "writers").glob("*.jsonl"))


def test_counts_and_provenance(tiny, tmp_path):
    writer = tiny.write(tmp_path / "c", 10)
    capture = open_capture(tmp_path / "c")
    assert writer.published == 10 and writer.bytes_written == capture.nbytes
    tiny.open_tiny(tmp_path / "c", 10, provenance={"host": "other"}).close()
    assert capture.provenance == {"host": "test"} == capture.commits[0].provenance
    assert capture.identity == tiny.IDENTITY and capture.coverage == tiny.coverage()


def test_failures_are_kept_and_forgotten_once_committed(tiny, tmp_path):
    with tiny.open_tiny(tmp_path / "c", 4) as writer:
        writer.reserve([tiny.key(i) for i in range(4)], 4)
        for i in (1, 2):
            writer.fail(Failure(tiny.key(i), i, f"cause {i}", 2))
        tiny.add(writer, 0)
    rows = open_capture(tmp_path / "c").failures().to_pylist()
    assert [(r["key"], r["index"], r["cause"], r["attempts"]) for r in rows] == [
        (tiny.key(1), 1, "cause 1", 2), (tiny.key(2), 2, "cause 2", 2),
    ]  # fmt: skip
    with tiny.open_tiny(tmp_path / "c", 4) as writer:
        assert writer.reserve([tiny.key(1)], 1)
        tiny.add(writer, 1)
    assert open_capture(tmp_path / "c").failures()["index"].to_pylist() == [2]


def test_many_failures_are_written_seldom(tiny, tmp_path, monkeypatch):
    written = []
    monkeypatch.setattr("hiddenlake.cache.store.writer.encode_failures", lambda rows: written.append(len(rows)) or b"")
    with tiny.open_tiny(tmp_path / "c", 4) as writer:
        for i in range(500):
            writer.fail(Failure(str(i), i, "cause", 1))
    assert len(written) < 10 and written[-1] == 500


def test_the_shard_is_filled_by_another_process(tiny, tmp_path, assert_holds):
    script = (
        "import importlib.util, json, sys; import numpy as np; from hiddenlake.cache.store import attach\n"
        "spec = importlib.util.spec_from_file_location('tiny', sys.argv[1])\n"
        "tiny = importlib.util.module_from_spec(spec)\n"
        "spec.loader.exec_module(tiny)\n"
        "for line in sys.stdin:\n"
        "    handle, slot, i = json.loads(line); views = attach(handle)\n"
        "    assert views['mlp_out'].dtype == np.uint16\n"
        "    for site, bits in tiny.rows(i).items(): views[site][..., slot, :] = bits\n"
        "    print(handle['shard'], flush=True)\n"
    )
    worker = subprocess.Popen(
        [sys.executable, "-c", script, tiny.__file__], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with tiny.open_tiny(tmp_path / "c", 10, shard_samples=2, shared=True) as writer:
        writer.reserve([tiny.key(i) for i in range(10)], 10)
        for i in range(10):
            shard, slot = writer.slot()
            print(json.dumps([shard.handle, slot, i]), file=worker.stdin, flush=True)
            assert worker.stdout.readline().strip() == str(shard.number)
            writer.add(shard, slot, tiny.sample(i))
        handle = shard.handle
    worker.communicate(timeout=30)
    assert worker.returncode == 0
    assert_holds(tmp_path / "c", complete=10)
    handle["arrays"]["mlp_out"]["inode"] += 1
    with pytest.raises(StoreError, match="shard buffer"):
        attach(handle)


def test_a_shard_that_no_other_process_can_fill_says_so(tiny, tmp_path):
    with tiny.open_tiny(tmp_path / "c", 1) as writer:
        shard, slot = writer.slot()
        with pytest.raises(StoreError, match="shared=True"):
            _ = shard.handle
        writer.release(shard, slot)


def test_a_forked_child_does_not_keep_its_parents_lock(tmp_path):
    lock = locks.FileLock(tmp_path / "lock")
    stop, go = os.pipe()
    forked, ready = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(go)
        os.write(ready, b"x")
        os.read(stop, 1)
        os._exit(0)
    os.read(forked, 1)
    assert locks.is_locked(tmp_path / "lock")
    # As when the parent is killed: its descriptors are closed and nothing is unlocked.
    os.close(lock.descriptor)
    lock.descriptor = None
    assert not locks.is_locked(tmp_path / "lock")
    os.close(go)
    os.waitpid(child, 0)
    for descriptor in (stop, forked, ready):
        os.close(descriptor)


def test_a_claim_of_a_dead_writer_is_taken_over_and_its_leftovers_removed(tiny, tmp_path, assert_holds):
    path = tmp_path / "c"
    with tiny.open_tiny(path, 8) as writer:
        layout = writer.layout
    (path / "claims" / "0").write_bytes(to_json_bytes(sign({"writer": "dead", "fencing": 4})))
    (path / "writers" / "dead.jsonl").write_text(json.dumps([tiny.key(0)]) + "\n")
    left = [
        layout.data_file("mlp_out", 0),
        layout.samples_file(0),
        "committed/c.0",
        "embed/.c.0.0.0.aaaa.partial",
        ".zarr.json.aaaa.partial",
        "failures/.dead.parquet.aaaa.partial",
        "commits/.0.json.aaaa.partial",
        "claims/.0.aaaa.partial",
    ]
    for name in left:
        (path / name).write_bytes(b"half")
    with tiny.open_tiny(path, 8) as writer:
        assert not any((path / name).exists() for name in [*left, "writers/dead.jsonl"])
        shard, slot = writer.slot()
        assert (shard.number, shard.fencing) == (0, 5)
        writer.release(shard, slot)
    tiny.write(path, 8)
    assert_holds(path, complete=8)
    assert verify(path).ok


@pytest.mark.parametrize("left", [lambda raw: b"", lambda raw: bytes(len(raw)), lambda raw: raw[: len(raw) // 2]])
def test_what_a_power_cut_leaves_of_a_claim_is_nobodys(tiny, tmp_path, assert_holds, left):
    path = tmp_path / "c"
    with tiny.open_tiny(path, 8):
        pass
    raw = to_json_bytes(sign({"writer": "0123456789abcdef", "fencing": 1}))
    (path / "claims" / "0").write_bytes(left(raw))
    tiny.write(path, 8)
    assert_holds(path, complete=8)
    assert verify(path).ok
    assert json.loads((path / "claims" / "0").read_text())["fencing"] == 1


def test_a_writer_that_commits_and_leaves_while_another_claims_is_not_taken_for_dead(
    tiny, tmp_path, monkeypatch, assert_holds
):
    path = tmp_path / "c"
    first = tiny.open_tiny(path, 8)
    first.reserve([tiny.key(0)], 1)
    tiny.add(first, 0)

    def listed_just_before(folder, listed=claims.list_commits):
        commits = listed(folder)
        first.close()
        return commits

    with tiny.open_tiny(path, 8) as second:
        monkeypatch.setattr(claims, "list_commits", listed_just_before)
        shard, slot = second.slot()
        assert shard.number == 1
        second.release(shard, slot)
    assert_holds(path, complete=1)
    assert verify(path).ok


def test_what_a_living_writer_holds_is_never_swept(tiny, tmp_path, assert_holds):
    path = tmp_path / "c"
    first = tiny.open_tiny(path, 8)
    shard, slot = first.slot()
    held = [path / "mlp_out" / ".c.0.0.0.0.aaaa.partial", path / first.layout.data_file("mlp_out", 0)]
    for file in held:
        file.write_bytes(b"half")
    with tiny.open_tiny(path, 8) as second:
        assert all(file.exists() for file in held)
        assert second.slot()[0].number == 1
    assert all(file.exists() for file in held)
    first.release(shard, slot)
    first.close()


def test_a_commit_of_someone_else_is_never_overwritten(tiny, tmp_path, assert_holds):
    path = tmp_path / "c"
    with pytest.raises(StoreError, match="already committed by writer"), tiny.open_tiny(path, 8) as writer:
        writer.reserve([tiny.key(0)], 1)
        tiny.add(writer, 0)
        with pytest.MonkeyPatch.context() as patch:
            # Another writer that takes the living one for dead: what flock that does not work leads to.
            patch.setattr(LocalBackend, "lives", lambda self, name: False)
            with tiny.open_tiny(path, 8) as other:
                other.reserve([tiny.key(1)], 1)
                tiny.add(other, 1)
        patch = pytest.MonkeyPatch()
        patch.setattr(Claims, "read", lambda self, shard: (self.writer, 1))
        try:
            writer.flush()
        finally:
            patch.undo()
    assert open_capture(path).keys == [tiny.key(1)]


def test_a_lost_claim_stops_the_writer(tiny, tmp_path):
    path = tmp_path / "c"
    writer = tiny.open_tiny(path, 8)
    writer.reserve([tiny.key(0)], 1)
    tiny.add(writer, 0)
    (path / "claims" / "0").write_bytes(to_json_bytes(sign({"writer": "other", "fencing": 2})))
    with pytest.raises(StoreError, match="no longer ours"):
        writer.flush()
    with pytest.raises(StoreError, match="no longer ours"):
        writer.slot()
    writer.close()
    assert len(open_capture(path)) == 0
