"""Captures on object storage: several writers, dead ones, some that wake up, lost answers, and other readers."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from contextlib import nullcontext, suppress

import numpy as np
import pytest

from hiddenlake.cache.errors import CorruptError, StoreError
from hiddenlake.cache.positions import Tokens
from hiddenlake.cache.store import objects, open_capture
from hiddenlake.cache.store.backend import open_backend
from hiddenlake.cache.store.claims import Claims
from hiddenlake.cache.store.commits import Commit
from hiddenlake.cache.store.metadata import arrays
from hiddenlake.cache.store.objects import ObjectBackend
from hiddenlake.cache.store.verify import verify

KINDS = pytest.mark.parametrize("kind", ["cells", "both", "tokens"])
LEASE = 4.0

pytestmark = pytest.mark.slow


@pytest.fixture
def url(bucket):
    return f"s3://{bucket}/lake/{uuid.uuid4().hex}"


@pytest.fixture
def short_lease(monkeypatch):
    """In this process and its children."""
    monkeypatch.setenv("TEST_LEASE_SECONDS", str(LEASE))
    monkeypatch.setattr(objects, "_LEASE_SECONDS", LEASE)
    monkeypatch.setattr(objects, "_BEAT_SECONDS", LEASE / 8)
    monkeypatch.setattr(objects, "_LOCK_SECONDS", LEASE / 2)


def start(process, url, samples, seconds=0.0, count=1, kind="cells"):
    """Writer processes that have imported what they need, and now open the capture at once."""
    command = [sys.executable, process, url, str(samples), "4", str(seconds), kind]
    pipe = subprocess.PIPE
    writers = [subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, text=True) for _ in range(count)]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        print(file=writer.stdin, flush=True)
    return writers


def wait_for_commits(url, count):
    end = time.monotonic() + 60
    while time.monotonic() < end:
        found = open_backend(url).list_files("commits")
        if len(found) >= count:
            return
        time.sleep(0.02)
    raise AssertionError(f"only {found} after a minute")


def check(url, assert_holds, complete):
    capture = assert_holds(url, complete=complete)
    report = verify(url)
    assert report.ok, [str(problem) for problem in report.problems]
    assert set(capture.place.list_files("writers")) <= {"lock"}
    return capture


@KINDS
def test_three_processes_lose_nothing_and_duplicate_nothing(process, url, assert_holds, kind):
    writers = start(process, url, 60, seconds=0.01, count=3, kind=kind)
    ended = [(writer.communicate(timeout=120)[1], writer.returncode) for writer in writers]
    assert [code for _, code in ended] == [0, 0, 0], ended
    capture = check(url, assert_holds, 60)
    assert len({commit.writer for commit in capture.commits}) > 1


@KINDS
def test_killed_writers_lose_nothing_that_was_committed(process, url, tiny, assert_holds, kind, short_lease):
    samples, committed = 200, set()
    for n in (1, 2, 3):
        (writer,) = start(process, url, samples, seconds=0.01, kind=kind)
        wait_for_commits(url, 2 * n)
        writer.kill()
        writer.communicate()
        capture = assert_holds(url)
        assert committed <= set(capture.keys)
        committed = set(capture.keys)
    time.sleep(LEASE + 1)  # Last-Modified counts seconds
    finish = len(committed) + 20
    tiny.write(url, finish, coverage=tiny.coverage(**tiny.KINDS[kind]))
    capture = assert_holds(url)
    assert committed <= set(capture.keys) and set(capture.keys) >= {tiny.key(i) for i in range(finish)}
    assert verify(url).ok and capture.place.writers() == []


def test_what_a_living_writer_has_reserved_is_not_taken(process, url, tiny, short_lease, assert_holds):
    """It beats while it waits, longer than a lease."""
    with tiny.open_tiny(url, 8) as writer:
        assert writer.reserve([tiny.key(i) for i in range(4)], 4)
        time.sleep(LEASE + 2)
        tiny.write(url, 8)
        assert open_capture(url).keys == [tiny.key(i) for i in range(4, 8)]
        for i in range(4):
            tiny.add(writer, i)
    check(url, assert_holds, 8)


@KINDS
def test_a_writer_that_stood_still_commits_nothing_when_it_wakes(process, url, tiny, assert_holds, kind, short_lease):
    samples = 30
    (zombie,) = start(process, url, samples, seconds=0.1, kind=kind)
    wait_for_commits(url, 1)
    zombie.send_signal(signal.SIGSTOP)
    (name,) = open_backend(url).writers()
    committed = open_capture(url).keys
    assert 0 < len(committed) < samples
    time.sleep(LEASE + 1.5)
    tiny.write(url, samples, coverage=tiny.coverage(**tiny.KINDS[kind]))
    before = open_capture(url)
    assert set(before.keys) == {tiny.key(i) for i in range(samples)}
    zombie.send_signal(signal.SIGCONT)
    _, talk = zombie.communicate(timeout=60)
    assert (
        zombie.returncode == 1 and "stood still" in talk
    )  # for others it is dead, or their claim is where its was to be
    capture = check(url, assert_holds, samples)
    assert [commit.writer for commit in capture.commits] == [commit.writer for commit in before.commits]
    assert name in {commit.writer for commit in capture.commits}


def test_a_writer_that_stood_still_just_before_its_commit(url, tiny, assert_holds, monkeypatch):
    """It has made sure that it lives; then another one does its work; then it commits."""
    publish, lives = Commit.publish, ObjectBackend.lives
    writer = tiny.open_tiny(url, 4)
    (name,) = open_backend(url).writers()

    def stand_still(commit, place):
        monkeypatch.setattr(Commit, "publish", publish)
        monkeypatch.setattr(ObjectBackend, "lives", lambda self, other: other != name and lives(self, other))
        tiny.write(url, 4)
        commit.publish(place)

    monkeypatch.setattr(Commit, "publish", stand_still)
    writer.reserve([tiny.key(i) for i in range(4)], 4)
    for i in range(4):
        tiny.add(writer, i)
    with pytest.raises(StoreError, match="already committed by writer"):
        writer.flush()
    writer.close()
    check(url, assert_holds, 4)


@KINDS
def test_a_writer_that_stood_still_while_it_claimed(url, tiny, assert_holds, monkeypatch, kind):
    """It holds the lock, has seen that a shard is free, and then another one takes the lock, claims it and fills it."""
    coverage = tiny.coverage(**tiny.KINDS[kind])
    take, lives = Claims._take, ObjectBackend.lives
    writer = tiny.open_tiny(url, 8, coverage=coverage)
    (name,) = open_backend(url).writers()

    def stand_still(claims, claim, files):
        monkeypatch.setattr(Claims, "_take", take)
        monkeypatch.setattr(ObjectBackend, "lives", lambda self, other: other != name and lives(self, other))
        with monkeypatch.context() as patch:
            patch.setattr(ObjectBackend, "lock", lambda self: nullcontext())
            tiny.write(url, 8, coverage=coverage)
        return take(claims, claim, files)

    monkeypatch.setattr(Claims, "_take", stand_still)
    with pytest.raises(StoreError, match="stood still"):
        writer.reserve([tiny.key(i) for i in range(8)], 8)
        for i in range(8):
            tiny.add(writer, i)
        writer.flush()
    with suppress(StoreError):
        writer.close()
    check(url, assert_holds, 8)


@KINDS
def test_who_stood_still_while_it_cleaned_up_removes_nothing_of_others(url, tiny, assert_holds, monkeypatch, kind):
    """Those that came meanwhile are not among the living that it knows of."""
    coverage = tiny.coverage(**tiny.KINDS[kind])
    tiny.write(url, 8, coverage=coverage)
    look = Claims._left_for_good

    def stand_still(claims, read):
        monkeypatch.setattr(Claims, "_left_for_good", look)
        with monkeypatch.context() as patch:
            patch.setattr(ObjectBackend, "lock", lambda self: nullcontext())
            with tiny.open_tiny(url, 16, coverage=coverage) as other:
                assert other.reserve([tiny.key(i) for i in range(8, 16)], 8)
                for i in range(8, 15):
                    tiny.add(other, i)
                for future in other._publisher.pending():
                    future.result()
                yield from look(claims, read)
                tiny.add(other, 15)

    monkeypatch.setattr(Claims, "_left_for_good", stand_still)
    tiny.open_tiny(url, 16, coverage=coverage).close()
    check(url, assert_holds, 16)


@KINDS
def test_what_a_dead_writer_left_is_removed(url, tiny, assert_holds, monkeypatch, kind):
    """Of shards that are given up for all, by whoever opens the capture next."""
    coverage = tiny.coverage(**tiny.KINDS[kind])
    publish, lives = Commit.publish, ObjectBackend.lives
    writer = tiny.open_tiny(url, 4, coverage=coverage)
    (name,) = open_backend(url).writers()

    def die(commit, place):
        raise KeyboardInterrupt

    monkeypatch.setattr(Commit, "publish", die)
    writer.reserve([tiny.key(i) for i in range(4)], 4)
    for i in range(4):
        tiny.add(writer, i)
    with pytest.raises((KeyboardInterrupt, StoreError)):
        writer.flush()
    monkeypatch.setattr(Commit, "publish", publish)
    monkeypatch.setattr(ObjectBackend, "lives", lambda self, other: other != name and lives(self, other))
    layout, place = tiny.write(url, 4, coverage=coverage).layout, open_backend(url)
    there = {f"{folder}/{file}" for folder in ("samples", *arrays(layout, 1, 1)) for file in place.list_files(folder)}
    assert layout.samples_file(0) not in there and layout.samples_file(1) in there
    assert not [file for file in there if layout.token_shard_of(file) == 0 and kind != "cells"]
    check(url, assert_holds, 4)
    monkeypatch.setattr(ObjectBackend, "lives", lives)
    with suppress(StoreError):
        writer.close()


def test_who_gives_up_a_writer_and_dies_leaves_it_to_the_next(url, tiny, assert_holds, monkeypatch):
    """Else the next one would not know whose claims to give up, and the writer could wake up and commit."""
    publish, lives, create = Commit.publish, ObjectBackend.lives, Commit.create
    writer = tiny.open_tiny(url, 4)
    (name,) = open_backend(url).writers()

    def die(commit, place):
        raise KeyboardInterrupt

    def stand_still(commit, place):
        monkeypatch.setattr(Commit, "publish", publish)
        monkeypatch.setattr(ObjectBackend, "lives", lambda self, other: other != name and lives(self, other))
        monkeypatch.setattr(Commit, "create", die)
        with pytest.raises(KeyboardInterrupt):
            tiny.open_tiny(url, 4)
        monkeypatch.setattr(Commit, "create", create)
        tiny.write(url, 4)
        commit.publish(place)

    monkeypatch.setattr(Commit, "publish", stand_still)
    writer.reserve([tiny.key(i) for i in range(4)], 4)
    for i in range(4):
        tiny.add(writer, i)
    with pytest.raises(StoreError, match="already committed by writer"):
        writer.flush()
    writer.close()
    check(url, assert_holds, 4)


def test_a_lock_whose_holder_died_is_taken_after_a_while(url, short_lease):
    place = open_backend(url)
    script = (
        "import sys; from hiddenlake.cache.store.backend import open_backend\n"
        "with open_backend(sys.argv[1]).lock(): print('held', flush=True); sys.stdin.read()"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", script, url], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    taken = threading.Event()

    def take():
        with place.lock():
            taken.set()

    thread = threading.Thread(target=take)
    thread.start()
    # The holder renews it by its own, longer clock, which another one may take for dead: so it is killed at once.
    holder.kill()
    holder.communicate()
    assert not taken.wait(LEASE / 4)
    assert taken.wait(3 * LEASE)
    thread.join()


@pytest.mark.parametrize("what", ["answer", "request"])
def test_a_lost_answer_loses_and_doubles_no_sample(bucket, slow_s3, tiny, assert_holds, monkeypatch, what):
    """The n-th conditional put is done, but its answer is lost; or it never arrives. For many n."""
    monkeypatch.setattr(objects, "_LOCK_SECONDS", 1.5)
    settings = {"shard_samples": 2, "coverage": tiny.coverage(sites=("mlp_out",), **tiny.KINDS["both"])}
    n, lost = 0, True
    while lost:
        n += 4 if what == "answer" else 9  # each takes seconds; locks, claims, commits and the root are all among them
        url, count, lost = f"s3://{bucket}/lake/{uuid.uuid4().hex}", 0, False

        def lose(method, path, headers):
            nonlocal count, lost
            if method != "PUT" or not (headers.get("if-match") or headers.get("if-none-match")):
                return None
            count += 1
            lost = lost or count == n
            return what if count == n else None

        slow_s3.lose = lose
        try:
            tiny.write(url, 3, **settings)
        except StoreError:
            assert what == "request", n
        slow_s3.lose = lambda *_: None
        if what == "request":
            tiny.write(url, 3, **settings)
        check(url, assert_holds, 3)
    assert n > 12


def test_chunks_and_rows_are_read_in_parallel(url, slow_s3, tiny, expected):
    tiny.write(url, 48)
    capture = open_capture(url)
    truth = expected(48, capture.coverage)["mlp_out"]
    capture.read("mlp_out", 0, "-1")
    slow_s3.seconds = 0.1
    for layer, position, samples, least in [(0, "-1", None, 8), (None, None, [0, 1], 8), (None, None, None, 30)]:
        slow_s3.most.clear()
        start = time.monotonic()
        found = capture.read("mlp_out", layer, position, samples)
        seconds = time.monotonic() - start
        assert slow_s3.most["GET"] >= least and seconds < 4
        rows = truth[0, 3] if position else truth[..., :2, :] if samples else truth
        assert np.array_equal(found.view(np.uint16), rows)


@pytest.mark.parametrize("change", ["replaced", "removed"])
def test_an_object_that_changes_under_an_open_reader_is_an_error(url, tiny, change):
    tiny.write(url, 8)
    capture = open_capture(url)
    name = capture.snapshot.layout.data_file("mlp_out", 0)
    key = next(key for key in capture.commits[0].keys if key)
    for samples in (None, key):
        capture.read("mlp_out", samples=samples)
    if change == "removed":
        capture.place.remove(name)
    else:
        capture.place.write(name, capture.place.read(name))  # the same bytes, but another object
    for samples in (None, key):
        with pytest.raises(CorruptError, match="replaced since it was opened" if change == "replaced" else "no such"):
            capture.read("mlp_out", samples=samples)
    with pytest.raises(StoreError, match="is no capture"):
        capture.place.delete()
        open_capture(url)


@pytest.mark.parametrize("codec", ["none", "zstd"])
def test_zarr_xarray_and_tensorstore_read_it_bit_for_bit(url, tiny, expected, s3_server, codec):
    import tensorstore
    import xarray
    import zarr
    from obstore.store import S3Store

    tiny.write(url, 10, coverage=tiny.coverage(tokens=Tokens("all")), codec=codec)
    capture = open_capture(url)
    bucket, _, prefix = url.removeprefix("s3://").partition("/")
    order = [int(key.removeprefix("key-")) for commit in capture.commits for key in commit.keys if key]
    truth = expected(order, capture.coverage)
    store = zarr.storage.ObjectStore(S3Store(bucket, prefix=prefix), read_only=True)
    group = zarr.open_group(store, mode="r")
    committed = group["committed"][:]
    assert committed.sum() == 10
    for site in truth:
        assert np.array_equal(group[site][:][..., committed, :].view(np.uint16), truth[site])
    data = xarray.open_zarr(store, consolidated=True)
    cell = data.mlp_out.isel(layer=1, position=3).values[committed]
    assert np.array_equal(cell.view(np.uint16), truth["mlp_out"][1, 3])
    assert data.sample.values[committed].tolist() == [tiny.key(i) for i in order]
    kvstore = {
        "driver": "s3", "bucket": bucket, "path": f"{prefix}/mlp_out/", "aws_region": "us-east-1",
        "endpoint": s3_server[1]["AWS_ENDPOINT_URL"], "aws_credentials": {"type": "environment"},
    }  # fmt: skip
    array = tensorstore.open({"driver": "zarr3", "kvstore": kvstore}, open=True).result()
    assert np.array_equal(array[:, :, committed].read().result().view(np.uint16), truth["mlp_out"])


def hiddenlake(*arguments, status=0):
    done = subprocess.run([sys.executable, "-m", "hiddenlake.cli", *arguments], capture_output=True, text=True)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    return done.stdout, done.stderr


def test_the_command_line_reads_captures_there(url, tiny, bucket):
    tiny.write(url, 6)
    lake, _, name = url.rpartition("/")
    assert [row["path"] for row in json.loads(hiddenlake("ls", lake, "--json")[0]) if row["name"] == name] == [url]
    [entry] = json.loads(hiddenlake("ls", url, "--json")[0])
    assert (entry["name"], entry["samples"]) == (name, 6)
    assert json.loads(hiddenlake("info", url, "--json")[0])["path"] == url
    cell = ["--site", "mlp_out", "--layer", "0", "--position=-1", "--rows", "3", "--json"]
    assert [row["key"] for row in json.loads(hiddenlake("read", url, *cell)[0])] == [tiny.key(i) for i in range(3)]
    assert json.loads(hiddenlake("verify", url, "--json")[0])["ok"]
    assert "is no capture" in hiddenlake("info", f"{lake}/nothing", status=1)[1]


def test_a_bucket_that_does_not_exist_is_an_error(tiny, s3_server):
    for use in (open_capture, lambda where: tiny.open_tiny(where, 4)):
        with pytest.raises(StoreError, match="s3://no-such-bucket-here/lake"):
            use("s3://no-such-bucket-here/lake")


def test_a_task_is_captured_there(tiny_model, url, tmp_path):
    import hiddenlake

    task = tmp_path / "task.jsonl"
    task.write_text("".join(json.dumps({"question": f"Say {i}", "answers": ["x"]}) + "\n" for i in range(5)))
    settings = {"out": url, "engine": "transformers", "max_new_tokens": 4, "positions": ["last_q", "-1"]}
    first, second = (hiddenlake.capture(str(tiny_model), str(task), **settings) for _ in range(2))
    assert (first.path, first.committed, second.committed, second.present) == (url, 5, 0, 5)
    assert verify(url).ok and not os.path.exists("s3:")
