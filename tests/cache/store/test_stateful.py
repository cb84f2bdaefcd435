"""Any order of what writers may do: nothing that was committed is lost, and nothing else is ever seen."""

import shutil
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from hiddenlake.cache.errors import StoreError
from hiddenlake.cache.store.verify import verify

SAMPLES = 40
OPEN = 3


class Item:
    """A sample on its way into the store. held : pieces that are handed out and not filled."""

    def __init__(self, tiny, writer, i):
        self.i, self.found = i, tiny.tokens(i, writer.coverage) if writer.coverage.tokens else None
        self.shard, self.slot = writer.slot()
        self.span = writer.span(len(self.found["embed"])) if self.found else None
        self.held = []

    def take(self, writer):
        piece = writer.piece(self.span)
        self.held += [piece] if piece else []
        return piece

    def fill(self, writer):
        for piece in self.held:
            for site, view in piece.shard.views.items():
                view[..., piece.rows, :] = self.found[site][..., piece.first : piece.first + piece.count, :]
            writer.filled(piece)
        self.held = []


class Writers(RuleBasedStateMachine):
    tiny = assert_holds = kind = None

    def __init__(self):
        super().__init__()
        self.folder = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        self.path = self.folder / "c"
        self.coverage = self.tiny.coverage(**self.tiny.KINDS[self.kind])
        self.keys = [self.tiny.key(i) for i in range(SAMPLES)]
        self.writers = []  # (writer, its open items, keys that it added)
        self.promised, self.added = set(), set()

    @rule()
    def enter(self):
        if len(self.writers) < OPEN:
            writer = self.tiny.open_tiny(self.path, SAMPLES, shard_samples=3, coverage=self.coverage)
            self.writers.append((writer, [], set()))

    def one(self, data):
        return data.draw(st.sampled_from(self.writers))

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def begin(self, data):
        writer, items, _ = self.one(data)
        if len(items) < OPEN and (key := writer.reserve(self.keys, 1)):
            items.append(Item(self.tiny, writer, self.keys.index(key[0])))

    @precondition(lambda self: any(items for _, items, _ in self.writers) and self.coverage.tokens)
    @rule(data=st.data(), fill=st.booleans())
    def step(self, data, fill):
        writer, items, _ = data.draw(st.sampled_from([one for one in self.writers if one[1]]))
        item = data.draw(st.sampled_from(items))
        if item.span.rest and item.take(writer) is None:
            assert any(other.held or other.span.rest for other in items)
        if fill:
            item.fill(writer)

    @precondition(lambda self: any(items for _, items, _ in self.writers))
    @rule(data=st.data())
    def add(self, data):
        writer, items, added = data.draw(st.sampled_from([one for one in self.writers if one[1]]))
        last = data.draw(st.sampled_from(items))
        for item in items[: items.index(last) + 1] if self.coverage.tokens else ():
            item.fill(writer)
            while item.span.rest:
                if item.take(writer) is None:
                    for other in items:
                        other.fill(writer)
                item.fill(writer)
        sample = self.tiny.sample(last.i, self.coverage.positions)
        present = np.array(sample.token_index) >= 0
        for site, view in last.shard.views.items():
            cells = self.tiny.rows(last.i, self.coverage)[site]
            view[..., present, last.slot, :] = cells[..., present, :]
        writer.add(last.shard, last.slot, sample, last.span)
        items.remove(last)
        added.add(sample.key)
        self.added.add(sample.key)

    @precondition(lambda self: any(items for _, items, _ in self.writers))
    @rule(data=st.data())
    def release(self, data):
        writer, items, _ = data.draw(st.sampled_from([one for one in self.writers if one[1]]))
        item = items.pop(data.draw(st.integers(0, len(items) - 1)))
        writer.release(item.shard, item.slot, item.span)

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def flush(self, data):
        writer, items, added = self.one(data)
        if items:
            with pytest.raises(StoreError, match="still handed out"):
                writer.flush()
        else:
            writer.flush()
            self.promised |= added

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def close(self, data):
        writer, _, added = one = self.one(data)
        self.writers.remove(one)
        writer.close()
        self.promised |= added

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def die(self, data):
        """The process ends: its lock goes, its thread is not heard of again, its files stay."""
        one = self.one(data)
        self.writers.remove(one)
        publisher, claims = one[0]._publisher, one[0]._claims
        publisher._error = RuntimeError("dead")
        publisher.close()
        claims._member._lock.release()

    @invariant()
    def what_is_committed_is_what_was_added(self):
        if self.path.exists():
            seen = set(self.assert_holds(self.path).keys)
            assert self.promised <= seen <= self.added
            self.promised |= seen

    def teardown(self):
        try:
            while self.writers:
                self.writers.pop()[0].close()
            self.tiny.write(self.path, SAMPLES, shard_samples=3, coverage=self.coverage)
            self.assert_holds(self.path, complete=SAMPLES)
            report = verify(self.path)
            assert report.ok, report.problems
        finally:
            shutil.rmtree(self.folder)


@pytest.mark.parametrize("kind", ["cells", "both", "tokens"])
def test_writers_in_any_order(tiny, assert_holds, kind):
    machine = type("Machine", (Writers,), {"tiny": tiny, "assert_holds": staticmethod(assert_holds), "kind": kind})
    run_state_machine_as_test(machine, settings=settings(max_examples=8, stateful_step_count=30))
