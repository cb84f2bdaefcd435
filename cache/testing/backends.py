"""Conformance of a backend: files, exclusive creation, batches, making and deleting, the lock, and writers."""

import pickle
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import numpy as np
import pytest

from hiddenlake.cache.errors import StoreError
from hiddenlake.cache.store.backend import Backend
from hiddenlake.cache.testing import processes
from hiddenlake.cache.testing.conformance import FOLDERS, ROOT
from hiddenlake.cache.testing.files import FileTests
from hiddenlake.cache.testing.processes import receive, running


class BackendTests(FileTests):
    """Each operation of Backend, File, Batch and Member, as their docstrings promise it."""

    def test_a_backend_says_where_it_is_and_travels(self, place: Backend) -> None:
        again = pickle.loads(pickle.dumps(place))
        assert str(again) == str(place) and again.name == place.name and again.read("zarr.json") == ROOT
        assert str(place).rstrip("/").endswith(place.name)
        assert isinstance(place.exact, bool) and place.parallel >= 1
        assert place.free_bytes() is None or place.free_bytes() > 0

    @pytest.mark.parametrize("name", ["numbers", "Llama 3.1 8B", "wahr für é", "50%25 off", "a#b?c"])
    def test_a_child_is_a_folder_in_it(self, empty: Backend, name: str) -> None:
        child = empty.child(name)
        assert child.name == name and child.make({"zarr.json": ROOT}, FOLDERS)
        assert empty.list_folders() == [name] and empty.list_files("") == []
        assert empty.child(name).read("zarr.json") == ROOT
        assert empty.read(f"{name}/zarr.json") == ROOT

    def test_a_file_is_created_once(self, place: Backend) -> None:
        assert place.create("commits/0.json", b"first", durable=False)
        place.settle("commits/0.json")
        assert not place.create("commits/0.json", b"second", durable=False)
        assert not place.create("commits/0.json", b"second")
        assert not place.create("commits/0.json", b"first")
        assert place.read("commits/0.json") == b"first" and place.list_files("commits") == ["0.json"]
        place.remove("commits/0.json")
        assert place.create("commits/0.json", b"third")

    def test_of_many_threads_one_creates(self, place: Backend) -> None:
        threads = 8
        barrier = Barrier(threads)

        def create(number: int) -> tuple[bytes, bool]:
            data = f"thread {number}".encode()
            barrier.wait()
            return data, place.create("commits/0.json", data)

        with ThreadPoolExecutor(threads) as pool:
            winners = [data for data, done in pool.map(create, range(threads)) if done]
        assert winners == [place.read("commits/0.json")]

    def test_of_many_processes_one_creates(self, place: Backend) -> None:
        with running(3, processes.create, place, "commits/0.json") as started:
            found = [receive(connection) for _, connection in started]
        assert [data for data, done in found if done] == [place.read("commits/0.json")]

    def test_a_file_is_replaced_by_who_knows_it(self, place: Backend) -> None:
        with place.lock():
            assert place.replace("zarr.json", ROOT, b"second")
            assert not place.replace("zarr.json", ROOT, b"third")
        assert place.read("zarr.json") == b"second"

    def test_a_batch_is_durable_and_complete_once_published(self, place: Backend) -> None:
        batch = place.batch()
        rows = np.arange(5000, dtype=np.float32).reshape(50, 100)
        expected = {
            "mlp_out/c.0": b"head" + rows.tobytes(),
            "samples/0.parquet": b"PAR1",
            "row_crc/tokens/mlp_out/c": b"",
        }
        batch.add("mlp_out/c.0", [b"head", rows], len(expected["mlp_out/c.0"]))
        rows[:] = -1  # may be reused
        batch.add("samples/0.parquet", iter([b"PA", memoryview(b"R1")]))
        batch.add("row_crc/tokens/mlp_out/c", [])
        batch.publish()
        for name, data in expected.items():
            assert place.read(name) == data and place.size(name) == len(data)
            folder, _, last = name.rpartition("/")
            assert place.list_files(folder) == [last]
        batch.discard()
        assert place.read("samples/0.parquet") == b"PAR1"

    def test_a_batch_that_is_discarded_leaves_nothing(self, place: Backend) -> None:
        batch = place.batch()
        for name in ("mlp_out/c.0", "mlp_out/c.1"):
            batch.add(name, [b"data"])
        # Whatever lies there now has the name that it was given, or tells it.
        assert {place.final_name(name) or name for name in place.list_files("mlp_out")} <= {"c.0", "c.1"}
        batch.discard()
        assert place.list_files("mlp_out") == []

    def test_a_file_whose_parts_fail_is_not_there(self, place: Backend) -> None:
        def parts():
            yield b"x" * 100_000
            raise RuntimeError("no more")

        batch = place.batch()
        with pytest.raises(RuntimeError, match="no more"):
            batch.add("mlp_out/c.0", parts())
        batch.discard()
        assert place.list_files("mlp_out") == []

    def test_a_capture_is_made_once_and_deleted(self, empty: Backend) -> None:
        with pytest.raises(FileNotFoundError):
            empty.read("zarr.json")
        files = {"zarr.json": ROOT, "mlp_out/zarr.json": b"{}"}
        assert empty.make(files, FOLDERS)
        assert not empty.make(files | {"zarr.json": b"other"}, FOLDERS)
        assert {name: empty.read(name) for name in files} == files
        for folder in FOLDERS:
            empty.write(f"{folder}/new", b"x")
        empty.delete()
        with pytest.raises(FileNotFoundError):
            empty.read("zarr.json")
        assert empty.list_files("") == [] and empty.list_files("mlp_out") == []
        assert empty.make(files, FOLDERS) and empty.list_files("claims") == []

    def test_what_is_there_is_not_made_a_capture(self, empty: Backend) -> None:
        assert empty.child("thesis").make({"zarr.json": b"years of work"}, FOLDERS)
        assert not empty.make({"zarr.json": ROOT}, FOLDERS)
        assert empty.list_files("") == [] and empty.child("thesis").read("zarr.json") == b"years of work"

    def test_of_many_threads_one_makes_the_capture(self, empty: Backend) -> None:
        threads = 6
        barrier = Barrier(threads)

        def make(number: int) -> bool:
            barrier.wait()
            return empty.make({"zarr.json": b"%d" % number}, FOLDERS)

        with ThreadPoolExecutor(threads) as pool:
            made = list(pool.map(make, range(threads)))
        assert made.count(True) == 1 and empty.read("zarr.json") == b"%d" % made.index(True)

    def test_a_generation_lasts(self, place: Backend) -> None:
        first = place.generation()
        place.write("zarr.json", b"other")
        assert place.generation() == first and hash(first) == hash(place.generation())
        place.delete()
        try:
            gone = place.generation() == first  # where a backend cannot tell, as is said there
        except FileNotFoundError:
            gone = True
        assert gone

    def test_the_lock_is_held_by_one_thread(self, place: Backend) -> None:
        place.write("claims/number", b"0")

        def count_up(_: int) -> None:
            for _ in range(5):
                with place.lock():
                    place.write("claims/number", b"%d" % (int(place.read("claims/number")) + 1))

        with ThreadPoolExecutor(4) as pool:
            list(pool.map(count_up, range(4)))
        assert place.read("claims/number") == b"20"

    def test_the_lock_is_held_by_one_process(self, place: Backend) -> None:
        place.write("claims/number", b"0")
        with running(3, processes.count_up, place, "claims/number", 8) as started:
            assert [receive(connection) for _, connection in started] == ["done"] * 3
        assert place.read("claims/number") == b"24"

    def test_the_lock_is_given_back_after_an_error(self, place: Backend) -> None:
        with pytest.raises(RuntimeError, match="inside"), place.lock():
            raise RuntimeError("inside")
        with place.lock():
            pass

    def test_a_writer_joins_and_leaves(self, place: Backend) -> None:
        with place.lock():
            first, second = place.join("aaaa"), place.join("bbbb")
            lines = [b"[%d]" % number for number in range(12)]
            for line in lines:
                first.append(line)
            assert sorted(place.writers()) == ["aaaa", "bbbb"]
            assert place.lives("aaaa") and place.lives("bbbb") and not place.lives("cccc")
            assert sorted(place.appended("aaaa")) == sorted(lines)
            assert place.appended("bbbb") == place.appended("cccc") == []
        first.check()
        first.leave()
        second.check()
        with place.lock():
            assert place.writers() == ["bbbb"] and not place.lives("aaaa") and place.appended("aaaa") == []
            assert place.lives("bbbb")
        second.leave()
        assert place.writers() == []

    def test_a_writer_lives_as_long_as_its_process(self, place: Backend) -> None:
        with running(1, processes.join_and_stay, place, "cccc") as [(process, connection)]:
            assert receive(connection) == "joined"
            with place.lock():
                assert place.writers() == ["cccc"] and place.lives("cccc")
                assert sorted(place.appended("cccc")) == [b"[1, 2]", b"[3]"]
            process.kill()
            process.join()
        self.wait_until_dead(place, "cccc")
        with place.lock():
            assert place.writers() == ["cccc"]
            place.expel("cccc")
            assert place.writers() == ["cccc"] and sorted(place.appended("cccc")) == [b"[1, 2]", b"[3]"]
            place.forget("cccc")
            assert place.writers() == [] and place.appended("cccc") == []
            place.forget("cccc")

    def test_a_writer_that_was_taken_for_dead_finds_out(self, place: Backend) -> None:
        with place.lock():
            member = place.join("dddd")
        if place.exact:
            member.check()
            member.leave()
            return
        with place.lock():
            place.expel("dddd")
            assert not place.lives("dddd")
        for _ in range(2):
            with pytest.raises(StoreError, match="for dead"):
                member.check()
            with place.lock():
                place.forget("dddd")
        member.leave()
        assert place.writers() == []
