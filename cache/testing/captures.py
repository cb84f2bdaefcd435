"""Conformance of captures: the store on top of a backend writes, reads, verifies and resumes them bit for bit."""

import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from hiddenlake.cache.errors import CorruptError, HiddenlakeError, StoreError
from hiddenlake.cache.store.backend import Backend
from hiddenlake.cache.store.reader import Capture, open_capture
from hiddenlake.cache.store.verify import verify
from hiddenlake.cache.testing import processes, small
from hiddenlake.cache.testing.conformance import Conformance
from hiddenlake.cache.testing.processes import receive, running

SAMPLES = 10
FORMS = [("cells", "bfloat16", "none"), ("tokens", "bfloat16", "none"), ("both", "float32", "none")]
FORMS += [("both", "bfloat16", "zstd"), ("both", "float16", "fp8")]


def _same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Bit for bit."""
    found, expected = np.ascontiguousarray(found), np.ascontiguousarray(expected)
    return found.dtype == expected.dtype and found.shape == expected.shape and found.tobytes() == expected.tobytes()


def _cells(capture: Capture, site: str, numbers: list[int]) -> np.ndarray:
    every = [small.through(small.cells(i, capture.coverage)[site], capture.codec) for i in numbers]
    return np.stack(every, axis=-2)


def check(capture: Capture, complete: int | None = None) -> list[int]:
    """Each committed sample is there once, and all of its bits are its own. Returns the samples' numbers."""
    numbers = [int(name.removeprefix("key-")) for name in capture.keys]
    assert numbers == sorted(set(numbers))
    assert complete is None or numbers == list(range(complete))
    if not numbers:
        return numbers
    for site in capture.coverage.widths:
        if capture.coverage.positions:
            assert _same(capture.read(site), _cells(capture, site, numbers))
        if capture.coverage.tokens:
            every = [small.through(small.tokens(i, capture.coverage)[site], capture.codec) for i in numbers]
            found = capture.read_tokens(site)
            assert found.lengths.tolist() == [rows.shape[-2] for rows in every]
            assert _same(found.values, np.concatenate(every, axis=-2))
    return numbers


class CaptureTests(Conformance):
    """The store on top of the backend."""

    @pytest.mark.parametrize(("kind", "dtype", "codec"), FORMS, ids=map("-".join, FORMS))
    def test_what_is_written_is_read_back_in_every_way(self, empty: Backend, kind: str, dtype: str, codec: str) -> None:
        small.write(empty, SAMPLES, kind, dtype, codec)
        capture = open_capture(empty)
        check(capture, SAMPLES)
        c = capture.coverage
        if c.positions:
            truth = _cells(capture, "mlp_act", list(range(SAMPLES)))
            for layer, position, rows in [
                (3, "-1", [7]),
                (0, "last_q", [2, 9, 2]),
                (3, "second_answer", range(SAMPLES)),
            ]:
                cell = truth[c.layers.index(layer), c.positions.index(position)][list(rows)]
                assert _same(capture.read("mlp_act", layer, position, rows), cell)
                out = np.zeros_like(cell)
                found = capture.read("mlp_act", layer, position, rows, out=out)
                assert np.shares_memory(found, out) and _same(out, cell)
            assert _same(capture.read("mlp_act", 3, "-1", small.key(4)), truth[1, 2, 4])
            wide = truth.astype(np.float32)
            if codec != "fp8":  # which is decoded to float32 without a step between
                assert np.array_equal(capture.read("mlp_act", dtype="float32"), wide, equal_nan=True)
            lazy = pickle.loads(pickle.dumps(capture.dataset("stored")))
            chosen = lazy.mlp_act.sel(layer=3, position="-1").isel(sample=[5, 1])
            assert _same(chosen.values, truth[1, 2, [5, 1]])
        if c.tokens:
            last = capture.read_tokens("mlp_act", 3, [4, 1], slice(-2, None))
            every = [small.through(small.tokens(i, c)["mlp_act"], codec)[1, -2:] for i in (4, 1)]
            assert _same(last.values, np.concatenate(every))
            assert capture.dataset("stored", tokens=True).resid_post.shape[1] == sum(capture.snapshot.token_length)
        table = capture.samples().to_pylist()
        for i, row in enumerate(table):
            sample = small.sample(i, c.positions)
            assert (row["key"], row["prompt"], row["token_ids"]) == (sample.key, sample.prompt, list(sample.token_ids))
        report = verify(empty)
        assert report.ok and report.kept, report.problems

    def test_readers_see_commits_when_they_refresh(self, empty: Backend) -> None:
        with small.open_small(empty, 8, "cells") as writer:
            early = open_capture(empty)
            assert len(early) == 0
            writer.reserve([small.key(i) for i in range(8)], 8)
            for i in range(6):
                small.add(writer, i)
            writer.flush()
            assert len(early) == 0
            early.refresh()
            check(early, 6)
        assert len(early) == 6

    @pytest.mark.parametrize("kind", small.KINDS)
    def test_work_goes_on_after_a_writer_died(self, empty: Backend, kind: str) -> None:
        with running(1, processes.write_and_die, empty, SAMPLES, kind) as [(process, connection)]:
            writer = receive(connection)
            process.join()
        self.wait_until_dead(empty, writer)
        assert check(open_capture(empty)) == list(range(small.SHARD_SAMPLES))
        small.write(empty, SAMPLES, kind)
        check(open_capture(empty), SAMPLES)
        assert empty.writers() == []
        report = verify(empty)
        assert report.ok, report.problems

    @pytest.mark.parametrize("kind", small.KINDS)
    def test_two_processes_at_once_lose_nothing_and_double_nothing(self, empty: Backend, kind: str) -> None:
        samples = 26
        with running(2, processes.write_some, empty, samples, kind) as started:
            published = [receive(connection) for _, connection in started]
        assert sum(published) == samples
        check(open_capture(empty), samples)
        assert verify(empty).ok and empty.writers() == []

    def test_two_writers_in_one_process(self, empty: Backend) -> None:
        samples = 18
        with ThreadPoolExecutor(2) as pool:
            writers = list(pool.map(lambda _: small.write(empty, samples, "both"), range(2)))
        assert sum(writer.published for writer in writers) == samples
        check(open_capture(empty), samples)
        assert verify(empty).ok

    @pytest.mark.parametrize("change", ["replaced", "removed", "cut"])
    def test_damage_is_an_error_that_names_the_file(self, empty: Backend, change: str) -> None:
        small.write(empty, SAMPLES, "cells")
        capture = open_capture(empty)
        name = capture.snapshot.layout.data_file("mlp_act", 1)
        data = empty.read(name)
        if change == "removed":
            empty.remove(name)
        else:
            empty.write(name, bytes([data[0] ^ 1]) + data[1:] if change == "replaced" else data[:-1])
        with pytest.raises(CorruptError, match=name):
            capture.read("mlp_act")
        assert name in {problem.file for problem in verify(empty).problems}

    def test_a_capture_that_was_deleted_is_never_read_as_another(self, empty: Backend) -> None:
        small.write(empty, SAMPLES, "cells")
        capture = open_capture(empty)
        before = capture.read("embed")
        empty.delete()
        with pytest.raises(StoreError, match="is no capture"):
            open_capture(empty)
        with small.open_small(empty, SAMPLES, "cells") as writer:
            writer.reserve([small.key(i) for i in range(SAMPLES)], SAMPLES)
            for i in reversed(range(SAMPLES)):
                small.add(writer, i)
        try:
            assert _same(capture.read("embed"), before)  # of files that are still open
        except HiddenlakeError:
            pass
        check(open_capture(empty), SAMPLES)
