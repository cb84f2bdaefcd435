"""hiddenlake's store: rows go into the writer's shard buffers as they arrive, and are read as its users read them."""

import tempfile
from typing import Any

import numpy as np
from serve import expect, serve
from store_arm import StoreArm
from store_rows import Want

from hiddenlake.cache.samples import Sample
from hiddenlake.cache.store import Coverage, open_capture, open_writer
from hiddenlake.cache.store.opened import close_all

SITE = "mlp_out"
_TOKENS = 20


class Hiddenlake(StoreArm):
    """spec: "arrival": the order in which samples arrive, `task` or `shuffled`.  "shared": whether shard buffers lie in
    memory that other processes can fill, as vLLM's do.
    """

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
            self.folder, identity={"rows": "synthetic"}, coverage=coverage, provenance={}, planned=s.samples,
            shared=self.spec.get("shared", False),
        )  # fmt: skip
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
        """Nothing stays of what a process remembers of a capture that it has read: files that are open and mapped,
        which could not be thrown out of the page cache, and row checksums.
        """
        close_all(self._capture.place)
        del self._capture

    def read_round(self, round: dict[str, Any]) -> dict[str, Any]:
        if not self._imported:
            self._import()
        return super().read_round(round)

    def _import(self) -> None:
        """What a read imports late is no part of it: here is a small one, of another capture."""
        type(self)._imported = True
        with tempfile.TemporaryDirectory(dir=self.folder.parent) as folder:
            shape = {"layers": 2, "positions": 3, "samples": 4, "hidden": 16, "shard": 4}
            small = Hiddenlake({"folder": f"{folder}/small", "shape": shape, "arrival": "task"})
            small.write()
            small.open()
            small.read(Want(range(1), range(1), range(4), 0), "checked")
            small.read(Want(range(2), range(1), [1], 0), "checked")
            small.close()

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


def _key(i: int) -> str:
    return f"sample-{i}"


def _selection(index: Any) -> Any:
    """An index as `Capture.read` takes it."""
    if isinstance(index, slice):
        return range(index.start, index.stop)
    return index


if __name__ == "__main__":
    serve(Hiddenlake)
