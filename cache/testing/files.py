"""Conformance of files: they are read as they were written, at every edge, and never as anything else."""

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hiddenlake.cache.store.backend import Backend, File
from hiddenlake.cache.testing.conformance import Conformance

# Names of a capture's files, and of labels, which are a user's own.
NAMES = (
    "zarr.json", "mlp_out/c.0.0.12.0", "row_crc/tokens/mlp_out/c.0.3", "claims/7", "claims/tokens.7", "commits/7.json",
    "samples/7.parquet", "labels/is it true.parquet", "labels/100%25 sure.parquet", "labels/wahr für é.parquet",
    "labels/a+b=c&d#e?.parquet",
)  # fmt: skip

_LARGE = 12 << 20


def _bytes(size: int, seed: int = 0) -> bytes:
    return np.random.default_rng(seed).bytes(size)


def _read(file: File, offset: int, length: int) -> bytes:
    out = np.full(length, 7, np.uint8)
    file.read(offset, out)
    return out.tobytes()


class FileTests(Conformance):
    @pytest.mark.parametrize("name", NAMES)
    def test_a_file_of_any_name_is_what_was_written(self, place: Backend, name: str) -> None:
        data = _bytes(1000)
        place.write(name, data)
        assert place.read(name) == data and place.size(name) == len(data)
        folder, _, last = name.rpartition("/")
        assert place.list_files(folder).count(last) == 1
        assert place.final_name(last) is None
        file = place.open(name)
        assert file.size == len(data) and _read(file, 0, len(data)) == data
        file.close()
        place.remove(name)
        assert last not in place.list_files(folder)

    def test_a_file_that_is_not_there(self, place: Backend) -> None:
        for use in (place.read, place.open, place.size):
            with pytest.raises(FileNotFoundError):
                use("samples/0.parquet")
        place.remove("samples/0.parquet")
        with pytest.raises(FileNotFoundError):
            place.replace("samples/0.parquet", b"", b"new")
        assert place.list_files("samples") == [] and place.list_files("no/such/folder") == []

    def test_folders_are_listed_apart_from_files(self, place: Backend) -> None:
        place.write("mlp_out/zarr.json", b"{}")
        place.write("mlp_out/c.0", b"")
        assert place.list_files("") == ["zarr.json"]
        assert sorted(place.list_files("mlp_out")) == ["c.0", "zarr.json"]
        assert "mlp_out" in place.list_folders() and "zarr.json" not in place.list_folders()

    def test_many_files_are_all_listed(self, place: Backend) -> None:
        names = [f"{i}.json" for i in range(1200)]  # S3 lists a thousand at a time
        with ThreadPoolExecutor(8) as pool:
            list(pool.map(lambda name: place.write(f"commits/{name}", b"x", durable=False), names))
        assert sorted(place.list_files("commits")) == sorted(names)

    def test_an_empty_file(self, place: Backend) -> None:
        place.write("claims/0", b"")
        assert place.read("claims/0") == b"" and place.size("claims/0") == 0
        file = place.open("claims/0")
        assert file.size == 0 and _read(file, 0, 0) == b""
        with pytest.raises(EOFError):
            _read(file, 0, 1)
        file.close()

    def test_positioned_reads_at_every_edge(self, place: Backend) -> None:
        data = _bytes(10_000)
        place.write("mlp_out/c.0", data)
        file = place.open("mlp_out/c.0")
        for offset, length in [(0, 1), (0, 10_000), (9_999, 1), (4_095, 2), (4_096, 4_096), (5, 0), (10_000, 0)]:
            assert _read(file, offset, length) == data[offset : offset + length]
            file.will_need(offset, length)
            out = np.zeros(length, np.uint8)
            if file.read_cached(offset, out):
                assert out.tobytes() == data[offset : offset + length]
        for offset, length in [(0, 10_001), (9_999, 2), (10_000, 1), (20_000, 1)]:
            with pytest.raises(EOFError):
                _read(file, offset, length)
            assert not file.read_cached(offset, np.zeros(length, np.uint8))
        mapped = file.mapped()
        assert mapped is None or (mapped.dtype == np.uint8 and mapped.tobytes() == data)
        descriptor = file.fileno()
        assert descriptor is None or os.pread(descriptor, 20_000, 0) == data
        file.close()

    def test_several_threads_read_one_large_file(self, place: Backend) -> None:
        data = np.frombuffer(_bytes(_LARGE), np.uint8)
        batch = place.batch()
        batch.add("mlp_out/c.0", np.split(data, [1, 1 << 20, 7 << 20]), data.nbytes)
        batch.publish()
        assert place.size("mlp_out/c.0") == _LARGE
        file = place.open("mlp_out/c.0")
        random = np.random.default_rng(0)
        ranges = [(int(random.integers(_LARGE - 300_000)), int(random.integers(1, 300_000))) for _ in range(40)]

        def same(which: tuple[int, int]) -> bool:
            offset, length = which
            return _read(file, offset, length) == data[offset : offset + length].tobytes()

        with ThreadPoolExecutor(8) as pool:
            assert all(pool.map(same, [*ranges, (0, _LARGE)]))
        file.close()
        assert place.read("mlp_out/c.0") == data.tobytes()

    @pytest.mark.parametrize("change", ["replaced", "removed", "removed and written again"])
    def test_an_open_file_never_gives_other_bytes(self, place: Backend, change: str) -> None:
        """What was opened, or an error; though the new file is as long."""
        old, new = _bytes(5000, 1), _bytes(5000, 2)
        place.write("mlp_out/c.0", old)
        file = place.open("mlp_out/c.0")
        if change != "replaced":
            place.remove("mlp_out/c.0")
        if change != "removed":
            place.write("mlp_out/c.0", new)
            assert place.read("mlp_out/c.0") == new
        for offset, length in [(0, 5000), (100, 1), (4999, 1)]:
            try:
                assert _read(file, offset, length) == old[offset : offset + length]
            except OSError:
                pass
            out = np.zeros(length, np.uint8)
            if file.read_cached(offset, out):
                assert out.tobytes() == old[offset : offset + length]
        file.close()

    def test_a_reader_sees_the_old_file_or_the_new_one(self, place: Backend) -> None:
        whole = [bytes([value]) * 300_000 for value in (1, 2)]
        place.write("mlp_out/zarr.json", whole[0])

        def write() -> None:
            for turn in range(20):
                place.write("mlp_out/zarr.json", whole[turn % 2], durable=bool(turn % 3))

        with ThreadPoolExecutor(1) as pool:
            writing = pool.submit(write)
            reads = 0
            while not writing.done() or not reads:
                assert place.read("mlp_out/zarr.json") in whole
                reads += 1
            writing.result()
