"""One operation of the disk fails once, whichever and whenever: the run says so, loses nothing, and is resumed."""

import errno
import os
import threading

import pytest

from hiddenlake.cache.errors import StoreError
from hiddenlake.cache.store import files
from hiddenlake.cache.store.backend import open_backend
from hiddenlake.cache.store.opened import close_all
from hiddenlake.cache.store.verify import verify

SAMPLES = 3
OPERATIONS = ("write", "fsync", "rename", "posix_fallocate", "link", "open")
NUMBERS = {errno.EIO: "the disk reported an error", errno.ENOSPC: "the disk is full"}

# What a capture holds, its codec, and whether each call fails in both ways or in turns, or which calls fail at all: what
# "both" writes is what the others write.
SETTINGS = [("both", "none", 1), ("cells", "none", 1), ("tokens", "none", 1), ("both", "zstd", 7), ("both", "fp8", 7)]


class FailingOnce:
    """The module os, of which one call of one operation fails; `open` counts where it is for writing."""

    def __init__(self, operation, number, at):
        self.operation, self.number, self.at = operation, number, at
        self.count = 0
        self._lock = threading.Lock()

    def __getattr__(self, name):
        call = getattr(os, name)
        if name != self.operation:
            return call

        def failing(*arguments, **settings):
            if name != "open" or arguments[1] & (os.O_WRONLY | os.O_RDWR):
                with self._lock:
                    self.count += 1
                    fails = self.count == self.at
                if fails:
                    raise OSError(self.number, os.strerror(self.number))
            return call(*arguments, **settings)

        return failing


def settings_of(tiny, kind, codec):
    """Two commits, and several token shards that samples cross."""
    coverage = tiny.coverage(**tiny.KINDS[kind] | {"sites": ("mlp_out",)})
    settings = {"shard_samples": 2, "coverage": coverage, "codec": codec}
    return settings | ({"shard_tokens": (2, 4)} if coverage.tokens else {})


@pytest.mark.slow
@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.parametrize(("kind", "codec", "step"), SETTINGS)
def test_a_call_that_fails_loses_nothing(tiny, tmp_path, monkeypatch, assert_holds, operation, kind, codec, step):
    settings = settings_of(tiny, kind, codec)

    def write(path, disk):
        with monkeypatch.context() as patch:
            patch.setattr(files, "os", disk)
            patch.setattr(files, "_PAST_CACHE", files._BLOCK)  # a few pages are as long as these files get
            tiny.write(path, SAMPLES, **settings)

    def fails(number, at):
        """Whether there is such a call."""
        path, disk = tmp_path / f"{number} {at}", FailingOnce(operation, number, at)
        try:
            write(path, disk)
        except StoreError as error:
            assert NUMBERS[number] in str(error)
            assert disk.count >= at
        else:
            assert disk.count < at, f"call {at} of {operation} failed, and nobody was told"
        held = set(assert_holds(path).keys) if (path / "zarr.json").exists() else set()
        tiny.write(path, SAMPLES, **settings)
        assert held <= set(assert_holds(path, complete=SAMPLES).keys)
        report = verify(path)
        assert report.ok, (at, report.problems)
        left = [name for _, _, names in os.walk(path) for name in names if name.endswith((".partial", ".jsonl"))]
        assert not left, (at, left)
        assert os.listdir(tmp_path) == [path.name], "something was left beside the capture"
        close_all(open_backend(path))
        files.delete_folder(path)
        return disk.count >= at

    at = 1
    while all([fails(number, at) for number in (NUMBERS if kind == "both" else [[*NUMBERS][at % 2]])]):
        at += step
    if (operation, codec) != ("posix_fallocate", "zstd"):  # whose sizes are not known before
        assert at > {"write": 30, "fsync": 50, "rename": 10, "open": 30}.get(operation, 3), "hardly any such call"
