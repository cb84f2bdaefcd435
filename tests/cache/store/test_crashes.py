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


def start(process, path, samples, shard_samples, seconds=0.0):
    """A writer process that has imported what it needs and is about to open the capture."""
    command = [sys.executable, process, path, str(samples), str(shard_samples), str(seconds)]
    writer = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert writer.stdout.readline() == "ready\n"
    return writer


def test_three_processes_lose_nothing_and_duplicate_nothing(process, tmp_path, assert_holds):
    path = tmp_path / "lake" / "numbers"
    writers = [start(process, path, 90, 4, seconds=0.002) for _ in range(3)]
    assert [writer.wait(60) for writer in writers] == [0, 0, 0]
    capture = assert_holds(path, complete=90)
    assert len({commit.writer for commit in capture.commits}) == 3
    assert verify(path).ok
    assert os.listdir(tmp_path / "lake") == ["numbers"] and os.listdir(path / "writers") == ["lock"]


def test_killed_writers_lose_nothing_that_was_committed(process, tmp_path, tiny, assert_holds):
    path = tmp_path / "numbers"
    chance = random.Random(0)
    samples, committed = 1500, set()
    for _ in range(20):
        writer = start(process, path, samples, 4, seconds=0.0005)
        time.sleep(chance.uniform(0.005, 0.35))
        writer.kill()
        writer.wait()
        writer.stdout.close()
        if not path.exists():
            continue
        capture = assert_holds(path)
        assert committed <= set(capture.keys)
        committed = set(capture.keys)
    assert 0 < len(committed)
    finish = len(committed) + 30
    tiny.write(path, finish)
    capture = assert_holds(path)
    assert committed <= set(capture.keys) and set(capture.keys) >= {tiny.key(i) for i in range(finish)}
    report = verify(path)
    assert report.ok, report.problems
    assert not [name for folder, _, names in os.walk(path) for name in names if name.endswith(".partial")]


class Disk:
    """The os module, in which one call in a row of file operations fails."""

    OPERATIONS = ("open", "mkdir", "posix_fallocate", "write", "fsync", "rename", "link", "makedirs")

    def __init__(self, fail_at, number, until=None):
        self.fail_at, self.number, self.until, self.count = fail_at, number, until, 0

    def __getattr__(self, name):
        call = getattr(os, name)
        if name not in self.OPERATIONS:
            return call

        def operation(*arguments, **settings):
            self.count += 1
            if self.fail_at is not None and self.fail_at <= self.count and (self.until is None or self.count < self.until):
                raise OSError(self.number, os.strerror(self.number))
            return call(*arguments, **settings)

        return operation


def count_operations(tiny, path, monkeypatch):
    disk = Disk(None, 0)
    with monkeypatch.context() as patch:
        patch.setattr(files, "os", disk)
        tiny.write(path, 5, shard_samples=3)
    return disk.count


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_disk_that_fails_at_any_operation_loses_nothing(tiny, tmp_path, monkeypatch, number, assert_holds):
    """ENOSPC lasts, EIO strikes once. The run says so, keeps what is committed, and resumes."""
    operations = count_operations(tiny, tmp_path / "counted", monkeypatch)
    assert operations > 100
    for n in range(1, operations + 1):
        path = tmp_path / str(n)
        disk = Disk(n, number, n + 1 if number == errno.EIO else None)
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", disk)
            with pytest.raises(StoreError) as error:
                tiny.write(path, 5, shard_samples=3)
        assert ("disk is full" if number == errno.ENOSPC else "disk reported an error") in str(error.value)
        if (path / "zarr.json").exists():
            assert_holds(path)
        tiny.write(path, 5, shard_samples=3)
        assert_holds(path, complete=5)
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
        patch.setattr(files, "os", Disk(1, errno.ENOSPC))
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
    class FailingFsync(Disk):
        OPERATIONS = ("fsync",)

    disk = FailingFsync(1, errno.EIO, 2)
    monkeypatch.setattr(files, "os", disk)
    with pytest.raises(StoreError, match="disk reported an error"):
        files.write_atomic(tmp_path / "file", b"data")
    assert disk.count == 1 and os.listdir(tmp_path) == []


def test_a_short_write_is_continued(tmp_path, monkeypatch):
    class Short(Disk):
        def __getattr__(self, name):
            return (lambda fd, data: os.write(fd, data[:7])) if name == "write" else getattr(os, name)

    monkeypatch.setattr(files, "os", Short(None, 0))
    files.write_atomic(tmp_path / "file", bytes(range(100)))
    assert (tmp_path / "file").read_bytes() == bytes(range(100))


def test_readers_see_only_whole_shards_while_others_write(process, tmp_path, assert_holds):
    path = tmp_path / "numbers"
    writer = start(process, path, 120, 4, seconds=0.002)
    sizes = []
    while writer.poll() is None:
        if (path / "zarr.json").exists():
            capture = assert_holds(path)
            sizes.append(len(open_capture(path)))
            assert len(capture) % 4 == 0
    writer.stdout.close()
    assert writer.returncode == 0 and sizes == sorted(sizes)
    assert_holds(path, complete=120)
