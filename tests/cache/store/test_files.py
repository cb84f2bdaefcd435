"""Long files go past the page cache, where a disk and a system allow that, and hold what they should in any case."""

import errno
import fcntl
import mmap
import os

import numpy as np
import pytest

from hiddenlake.cache.store import files

BLOCK = 4096


@pytest.fixture
def folder(tmp_path_factory):
    """On a disk where that can be: tmp_path is in memory."""
    return tmp_path_factory.mktemp("files")


@pytest.fixture
def parts():
    """A long part that starts on a page, as a shard's memory does, and ends within a block; and a short one behind it."""
    long = np.frombuffer(mmap.mmap(-1, files._PAST_CACHE + 3 * BLOCK), np.uint8)
    long[:] = np.random.default_rng(0).integers(0, 256, len(long))
    return [long[: -BLOCK + 5], b"and more"]


def write(folder, parts, forget=False):
    """A file. Returns whether the page cache then holds a block in its middle.

    forget : tell the system first that none is needed.
    """
    path = folder / "file"
    unfinished = files.write_beside(path, parts, sum(map(len, parts)))
    unfinished.sync()
    unfinished.rename(path)
    descriptor = files.open_read(path)
    try:
        if forget:
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        # One block only: to ask for it makes the kernel fetch others.
        cached = files.pread_cached(descriptor, np.empty(BLOCK, np.uint8), files._PAST_CACHE // 2)
    finally:
        files.close(descriptor)
    assert path.read_bytes() == b"".join(map(bytes, parts))
    return cached


def test_long_parts_do_not_fill_the_page_cache(folder, parts):
    short = [parts[0][: files._PAST_CACHE - 1]]
    if write(folder, short, forget=True):
        pytest.skip("this file system keeps its files in memory")
    assert write(folder, short), "what is short stays in memory"
    assert not write(folder, parts)


def test_memory_that_does_not_start_on_a_block_is_written_all_the_same(folder, parts):
    write(folder, [parts[0][1:]])
    write(folder, [b"first", *parts])


@pytest.mark.parametrize("number", [errno.EINVAL, errno.EOPNOTSUPP])
@pytest.mark.parametrize("at", [1, 2])
def test_a_disk_that_refuses_is_written_through_the_cache(folder, parts, monkeypatch, number, at):
    class Refusing:
        """The module os: one write past the cache does half of it, and the next fails."""

        count = 0

        def __getattr__(self, name):
            return getattr(os, name)

        def write(self, descriptor, data):
            if fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_DIRECT:
                self.count += 1
                if self.count >= at:
                    raise OSError(number, os.strerror(number))
                data = data[: 100 * BLOCK]
            return os.write(descriptor, data)

    refusing = Refusing()
    monkeypatch.setattr(files, "os", refusing)
    write(folder, parts)
    assert refusing.count == at


def test_an_error_is_told(folder, parts, monkeypatch):
    class Failing:
        def __getattr__(self, name):
            return getattr(os, name)

        def write(self, descriptor, data):
            raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(files, "os", Failing())
    with pytest.raises(OSError, match=os.strerror(errno.EIO)):
        write(folder, parts)
    assert not list(folder.iterdir())
