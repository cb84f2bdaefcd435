"""hiddenlake's store: rows go into the writer's shard buffers as they arrive, and are read as its users read them."""

import json
import os
import tempfile
import time
import traceback
from collections.abc import Callable
from typing import Any

import numpy as np
from serve import expect, serve
from store_arm import StoreArm
from store_rows import Want

from hiddenlake.cache.samples import Sample
from hiddenlake.cache.store import Coverage, open_capture, open_writer

SITE = "mlp_out"
_TOKENS = 20


class Hiddenlake(StoreArm):
    """spec: "arrival": the order in which samples arrive, `task` or `shuffled`."""

    _imported = False

    def __init__(self, spec: dict[str, Any]) -> None:
        super().__init__(spec)
        self._buffers_of: dict[tuple[int, ...], np.ndarray] = {}

    def write(self) -> None:
        s = self.shape
        coverage = Coverage((SITE,), tuple(range(s.layers)), tuple(map(str, range(s.positions))), {SITE: s.hidden})
        arrival = np.arange(s.samples)
        if self.spec["arrival"] == "shuffled":
            arrival = np.random.default_rng(1).permutation(arrival)
        writer = open_writer(
            self.folder, identity={"rows": "synthetic"}, coverage=coverage, provenance={}, planned=s.samples
        )
        with writer:
            for start in range(0, s.samples, writer.shard_samples):
                part = arrival[start : start + writer.shard_samples].tolist()
                writer.reserve([_key(i) for i in part], len(part))
                for i in part:
                    rows = self.rows.sample(i)
                    shard, slot = writer.slot()
                    shard.views[SITE][..., slot, :] = rows
                    shard.views["embed"][..., slot, :] = rows[0]
                    writer.add(shard, slot, self._sample(i))

    def _sample(self, i: int) -> Sample:
        """Of a short question and answer, with a token for each position."""
        prompt = _TOKENS - self.shape.positions // 3
        return Sample(
            key=_key(i), index=i, sample_index=0, group=str(i % 100), prompt=f"Which is number {i}?", answer=f"{i}.",
            answers=(str(i),), correct=True, exact_answer=str(i), exact_answer_valid=True,
            token_ids=tuple(range(_TOKENS)), logprobs=(-0.5,) * (_TOKENS - prompt), prompt_length=prompt,
            total_length=_TOKENS, finish_reason="stop", token_index=tuple(range(self.shape.positions)),
        )  # fmt: skip

    def open(self) -> None:
        self._capture = open_capture(self.folder)
        expect("samples", len(self._capture), self.shape.samples)

    def close(self) -> None:
        del self._capture

    def read_round(self, round: dict[str, Any]) -> dict[str, Any]:
        """Each round, and each cold read, in a process of its own, made by fork. One that has read a capture keeps its
        files open, maps them, and remembers row checksums: nothing that it reads again is cold.
        """
        if not self._imported:
            self._import()
        if not round["cold"]:
            return in_child(lambda: super(Hiddenlake, self).read_round(round))
        answers, until = [], time.perf_counter() + round["seconds"]
        for want in round["wants"]:
            one = {**round, "wants": [want]}
            answers.append(in_child(lambda one=one: super(Hiddenlake, self).read_round(one)))
            if time.perf_counter() > until:
                break
        return {name: [value for answer in answers for value in answer[name]] for name in answers[0]}

    def _import(self) -> None:
        """What a read imports late is no part of it: here is a small one, of another capture."""
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as folder:
            shape = {"layers": 2, "positions": 3, "samples": 4, "hidden": 16, "shard": 4}
            small = Hiddenlake({"folder": f"{folder}/small", "shape": shape, "arrival": "task"})
            small.write()
            small.open()
            small.read(Want(range(1), range(1), range(4), 0), "checked")
            small.read(Want(range(2), range(1), [1], 0), "checked")
            small.close()
        self._imported = True

    def aim(self, want: Want, way: str) -> None:
        if way.endswith("into a buffer"):
            self._buffer(want)

    def read(self, want: Want, way: str) -> np.ndarray:
        layer, position, samples = (_selection(axis) for axis in want.index)
        samples = None if len(want.samples) == self.shape.samples else samples
        more: dict[str, Any] = {"check": not way.startswith("unchecked")}
        if way.endswith("into a buffer"):
            more["out"] = self._buffer(want)
        return self._capture.read(SITE, layer, position, samples, **more)

    def _buffer(self, want: Want) -> np.ndarray:
        import ml_dtypes

        axes = [len(axis) for axis in (want.layers, want.positions, want.samples)]
        shape = (*(axis for axis in axes if axis > 1), self.shape.hidden)
        if shape not in self._buffers_of:
            self._buffers_of[shape] = np.full(
                shape, 1, ml_dtypes.bfloat16
            )  # zeros would be pages that are not there yet
        return self._buffers_of[shape]

    def bits(self, result: np.ndarray, want: Want) -> np.ndarray:
        shape = (len(want.layers), len(want.positions), len(want.samples), -1)
        return result.view(np.uint16).reshape(shape)


def in_child(work: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """What `work` returns, plain JSON, done by a forked process. Raises RuntimeError with what it raised."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = work()
        except BaseException as error:
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        with os.fdopen(write, "w") as pipe:
            json.dump(answer, pipe)
        os._exit(0)  # whatever this process would do at its end is its parent's
    os.close(write)
    with os.fdopen(read) as pipe:
        said = pipe.read()
    _, status = os.waitpid(child, 0)
    if not said:
        raise RuntimeError(f"a reading process ended with status {status} and said nothing")
    answer = json.loads(said)
    if "error" in answer:
        raise RuntimeError(answer["error"])
    return answer


def _key(i: int) -> str:
    return f"sample-{i}"


def _selection(index: Any) -> Any:
    """An index as `Capture.read` takes it."""
    if isinstance(index, slice):
        return range(index.start, index.stop)
    return index


if __name__ == "__main__":
    serve(Hiddenlake)
