import errno
import os
import random
import subprocess
import sys
import time

import pytest

from hiddenlake.cache.errors import StoreError
from hiddenlake.cache.store import files, open_capture
from hiddenlake.cache.store.verify import verify

KINDS = pytest.mark.parametrize("kind", ["cells", "both", "tokens"])


def start(process, path, samples, shard_samples, seconds=0.0, count=1, kind="cells"):
    """Writer processes that have imported what they need, and now open the capture at once."""
    command = [sys.executable, process, path, str(samples), str(shard_samples), str(seconds), kind]
    writers = [
        subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) for _ in range(count)
    ]
    for writer in writers:
        assert writer.stdout.readline() == "ready\n"
    for writer in writers:
        writer.stdin.close()
    return writers


def stop(writers):
    for writer in writers:
        writer.kill()
        writer.wait()
        writer.stdout.close()


@KINDS
def test_three_processes_lose_nothing_and_duplicate_nothing(process, tmp_path, assert_holds, kind):
    path = tmp_path / "lake" / "numbers"
    writers = start(process, path, 90, 4, seconds=0.005, count=3, kind=kind)
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    stop(writers)
    capture = assert_holds(path, complete=90)
    assert len({commit.writer for commit in capture.commits}) == 3
    assert verify(path).ok
    assert os.listdir(tmp_path / "lake") == ["numbers"] and os.listdir(path / "writers") == ["lock"]


@KINDS
def test_killed_writers_lose_nothing_that_was_committed(process, tmp_path, tiny, assert_holds, kind):
    path = tmp_path / "numbers"
    chance = random.Random(0)
    samples, committed = 1500, set()
    for _ in range(7):
        # Two at a time, so that the one that lives meets what the dead one left.
        writers = start(process, path, samples, 4, seconds=0.0005, count=2, kind=kind)
        time.sleep(chance.uniform(0, 0.15))
        stop(writers[:1])
        time.sleep(chance.uniform(0, 0.1))
        stop(writers[1:])
        if not path.exists():
            continue
        capture = assert_holds(path)
        assert committed <= set(capture.keys)
        committed = set(capture.keys)
    assert 0 < len(committed)
    finish = len(committed) + 30
    tiny.write(path, finish, coverage=tiny.coverage(**tiny.KINDS[kind]))
    capture = assert_holds(path)
    assert committed <= set(capture.keys) and set(capture.keys) >= {tiny.key(i) for i in range(finish)}
    report = verify(path)
    assert report.ok, report.problems
    assert not [name for folder, _, names in os.walk(path) for name in names if name.endswith(".partial")]


# The steps that other processes see.
VISIBLE = ("rename", "link", "unlink")


def settings_of(tiny, kind):
    """Two commits, and several token shards that samples cross."""
    coverage = tiny.coverage(**tiny.KINDS[kind] | {"sites": ("mlp_out",)})
    return {"shard_samples": 2, "coverage": coverage} | ({"shard_tokens": (2, 4)} if coverage.tokens else {})


@KINDS
def test_a_process_that_dies_at_any_step_loses_nothing_that_was_committed(tiny, tmp_path, assert_holds, kind):
    class Dying(Disk):
        def fail(self):
            os._exit(3)

    settings = settings_of(tiny, kind)
    n, died = 0, True
    while died:
        n += 1
        path = tmp_path / str(n)
        child = os.fork()
        if child == 0:
            files.os = Dying(VISIBLE, 0, n)
            tiny.write(path, 3, **settings)
            os._exit(0)
        died = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 3
        committed = assert_holds(path).keys if (path / "zarr.json").exists() else []
        tiny.write(path, 3, **settings)
        assert set(committed) <= set(assert_holds(path, complete=3).keys)
        report = verify(path)
        assert report.ok, (n, report.problems)
        left = [name for folder, _, names in os.walk(path) for name in names if name.endswith((".partial", ".jsonl"))]
        assert not left, (n, left)
    assert n > 25


class Disk:
    """The os module, of which some operations fail from the n-th on, or the n-th alone."""

    def __init__(self, operations, number, first, last=None):
        self.operations, self.number, self.first, self.last = operations, number, first, last
        self.count = 0

    def fail(self):
        raise OSError(self.number, os.strerror(self.number))

    def __getattr__(self, name):
        call = getattr(os, name)
        if name not in self.operations:
            return call

        def operation(*arguments, **settings):
            self.count += 1
            if self.first <= self.count <= (self.last or self.count):
                self.fail()
            return call(*arguments, **settings)

        return operation


FULL = ("open", "mkdir", "makedirs", "posix_fallocate", "write", "link")
BROKEN = ("write", "fsync", "rename")


@pytest.mark.parametrize(("number", "kinds"), [(errno.ENOSPC, FULL), (errno.EIO, BROKEN)], ids=["full", "broken"])
@KINDS
def test_a_disk_that_fails_at_any_operation_loses_nothing(
    tiny, tmp_path, monkeypatch, number, kinds, assert_holds, kind
):
    """A full disk stays full, an I/O error strikes once. The run says so, keeps what is committed, and resumes."""
    settings = settings_of(tiny, kind)

    def write(path, disk=os):
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", disk)
            tiny.write(path, 3, **settings)

    counting = Disk(kinds, number, sys.maxsize)
    write(tmp_path / "counted", counting)
    assert counting.count > 50
    # What both write is what the others write, so that every third operation will do.
    for n in range(1, counting.count + 1, 3 if kind == "both" else 1):
        path = tmp_path / str(n)
        disk = Disk(kinds, number, n, n if number == errno.EIO else None)
        try:
            write(path, disk)
        except StoreError as error:
            assert ("disk is full" if number == errno.ENOSPC else "disk reported an error") in str(error)
        else:
            # How often a writer looks for new commits depends on how fast they come.
            assert disk.count < n > counting.count - 10
        if (path / "zarr.json").exists():
            assert_holds(path)
        write(path)
        assert_holds(path, complete=3)
        report = verify(path)
        assert report.ok, (n, report.problems)
        left = [name for folder, _, names in os.walk(path) for name in names if name.endswith(".partial")]
        assert not left, (n, left)


def test_a_full_disk_stops_the_writer_and_keeps_what_is_committed(tiny, tmp_path, monkeypatch, assert_holds):
    path = tmp_path / "numbers"
    writer = tiny.open_tiny(path, 8)
    writer.reserve([tiny.key(i) for i in range(8)], 8)
    for i in range(4):
        tiny.add(writer, i)
    writer.flush()
    tiny.add(writer, 4)
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", Disk(FULL, errno.ENOSPC, 1))
        with pytest.raises(StoreError, match="the disk is full: free some space and run the same command again"):
            writer.flush()
    with pytest.raises(StoreError, match="disk is full"):
        writer.slot()
    writer.close()
    assert writer.published == 4
    assert_holds(path, complete=4)
    tiny.write(path, 8)
    assert_holds(path, complete=8)


def test_a_failed_fsync_is_never_tried_again_on_the_same_file(tmp_path, monkeypatch):
    disk = Disk(("fsync",), errno.EIO, 1, 1)
    monkeypatch.setattr(files, "os", disk)
    with pytest.raises(StoreError, match="disk reported an error"):
        files.write_atomic(tmp_path / "file", b"data")
    assert disk.count == 1 and os.listdir(tmp_path) == []


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    class Short(Disk):
        def __getattr__(self, name):
            return (lambda fd, data: os.write(fd, data[:7])) if name == "write" else getattr(os, name)

    monkeypatch.setattr(files, "os", Short((), 0, 0))
    files.write_atomic(tmp_path / "file", bytes(range(100)))
    assert (tmp_path / "file").read_bytes() == bytes(range(100))


@KINDS
def test_readers_see_only_whole_shards_while_others_write(process, tmp_path, assert_holds, kind):
    path = tmp_path / "numbers"
    (writer,) = start(process, path, 120, 4, seconds=0.002, kind=kind)
    sizes = []
    while writer.poll() is None:
        if (path / "zarr.json").exists():
            capture = assert_holds(path)
            sizes.append(len(open_capture(path)))
            assert len(capture) % 4 == 0
    stop([writer])
    assert writer.returncode == 0 and sizes == sorted(sizes)
    assert_holds(path, complete=120)
