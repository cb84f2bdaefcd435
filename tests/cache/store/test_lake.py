"""Any order of what may be done to a lake, against a dictionary: nothing acknowledged is lost, nothing else is ever seen."""

import importlib.util
import shutil
import tempfile
from concurrent.futures import wait
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule, run_state_machine_as_test

from hiddenlake.cache.errors import BadInputError, HiddenlakeError, StoreError
from hiddenlake.cache.store import open_capture
from hiddenlake.cache.store.backend import open_backend
from hiddenlake.cache.store.catalog import list_captures
from hiddenlake.cache.store.compact import compact
from hiddenlake.cache.store.copying import copy, plan_merge, plan_select
from hiddenlake.cache.store.labels import add_label
from hiddenlake.cache.store.removal import collect_garbage, remove_capture
from hiddenlake.cache.store.repair import repair

_spec = importlib.util.spec_from_file_location("invariants", Path(__file__).with_name("invariants.py"))
invariants = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(invariants)

SAMPLES = 24
NAMES = ("a", "b", "c", "d")
SHARD = 3


class Model:
    """What a capture must hold. promised : keys that must be there; may : that may be there as well, uncommitted."""

    def __init__(self, coverage):
        self.coverage = coverage
        self.promised, self.may, self.labels = set(), set(), {}


class Lake(RuleBasedStateMachine):
    """tiny, kind : see the test below."""

    def __init__(self):
        super().__init__()
        self.folder = Path(
            tempfile.mkdtemp(prefix="hiddenlake-lake-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None)
        )
        self.full = self.tiny.coverage(**self.tiny.KINDS[self.kind])
        self.models = {}
        self.writers = {}  # name -> (writer, keys added and not flushed)
        self.readers = []  # (name, model when it was opened, capture)

    def path(self, name):
        return self.folder / name

    def existing(self, data, idle=False):
        names = [name for name in sorted(self.models) if not (idle and name in self.writers)]
        return data.draw(st.sampled_from(names)) if names else None

    def free(self, data):
        names = [name for name in NAMES if name not in self.models]
        return data.draw(st.sampled_from(names)) if names else None

    def some_keys(self, data, capture):
        return data.draw(st.lists(st.sampled_from(capture.keys), unique=True)) if len(capture) else []

    def open_writer(self, name, coverage):
        return self.tiny.open_tiny(self.path(name), SAMPLES, shard_samples=SHARD, coverage=coverage)

    @precondition(lambda self: len(self.models) < len(NAMES))
    @rule(data=st.data())
    def create(self, data):
        name = self.free(data)
        self.models[name] = Model(self.full)
        self.writers[name] = self.open_writer(name, self.full), set()

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def resume(self, data):
        name = self.existing(data, idle=True)
        if name is not None:
            model = self.models[name]
            if model.coverage != self.full:
                return  # its bits are a part of another capture's
            self.writers[name] = self.open_writer(name, model.coverage), set()
            # What was there is still there; what a crash left uncommitted is gone for good.
            model.may = set()

    @precondition(lambda self: self.writers)
    @rule(data=st.data(), count=st.integers(1, 7))
    def append(self, data, count):
        name = data.draw(st.sampled_from(sorted(self.writers)))
        writer, added = self.writers[name]
        keys = [self.tiny.key(i) for i in range(SAMPLES)]
        for key in writer.reserve(data.draw(st.permutations(keys)), count):
            self.tiny.add(writer, int(key.removeprefix("key-")))
            added.add(key)
            self.models[name].may.add(key)
        # What a crash leaves must not depend on how far a thread was, or no example could be told again.
        # (That it may leave anything is test_kills.py's.)
        wait(writer._publisher.pending())

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def flush(self, data):
        name = data.draw(st.sampled_from(sorted(self.writers)))
        writer, added = self.writers[name]
        writer.flush()
        self.models[name].promised |= added

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def close(self, data):
        name = data.draw(st.sampled_from(sorted(self.writers)))
        writer, added = self.writers.pop(name)
        writer.close()
        self.models[name].promised |= added

    @precondition(lambda self: self.writers)
    @rule(data=st.data())
    def crash(self, data):
        """The process ends: its lock goes, its threads are not heard of again, its files stay."""
        name = data.draw(st.sampled_from(sorted(self.writers)))
        writer, _ = self.writers.pop(name)
        writer._publisher._error = RuntimeError("dead")
        writer._publisher.close()
        writer._claims._member._lock.release()

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def open_reader(self, data):
        name = self.existing(data)
        self.readers.append((name, self.models[name], open_capture(self.path(name))))

    @precondition(lambda self: self.readers)
    @rule(data=st.data())
    def read(self, data):
        """Also what was opened long ago: the same numbers, or an error."""
        name, model, capture = data.draw(st.sampled_from(self.readers))
        try:
            invariants.committed_samples_are_exact(self.tiny, capture.place, capture)
        except HiddenlakeError:
            assert (
                self.models.get(name) is not model or capture.shard_samples != open_capture(capture.place).shard_samples
            )

    @precondition(lambda self: self.models)
    @rule(data=st.data(), name=st.sampled_from(["score", "other"]))
    def label(self, data, name):
        capture = open_capture(self.path(self.existing(data)))
        keys = self.some_keys(data, capture)
        model = self.models[capture.place.name]
        values = dict.fromkeys(keys, 1.5)
        table = pa.table({"key": pa.array(keys, pa.string()), "v": pa.array(list(values.values()), pa.float64())})
        if name in model.labels:
            with pytest.raises(StoreError, match="already"):
                add_label(capture, name, table)
        add_label(capture, name, table, replace=True)
        model.labels[name] = values

    @precondition(lambda self: self.models and len(self.models) < len(NAMES))
    @rule(data=st.data())
    def select(self, data):
        source, out = self.existing(data), self.free(data)
        capture = open_capture(self.path(source))
        c, chosen = capture.coverage, self.some_keys(data, capture)
        settings = {"samples": chosen, "sites": data.draw(st.lists(st.sampled_from(c.sites), min_size=1, unique=True))}
        if c.layers:
            settings["layers"] = data.draw(st.lists(st.sampled_from(c.layers), min_size=1, unique=True))
        if c.positions:
            settings["positions"] = data.draw(st.lists(st.sampled_from(c.positions), min_size=1, unique=True))
        plan = plan_select(capture, codec=data.draw(st.sampled_from(["none", "zstd"])), **settings)
        copy(plan, open_backend(self.path(out)))
        model = self.models[out] = Model(plan.coverage)
        model.promised = set(chosen)
        model.labels = self.part(self.models[source].labels, chosen)

    @staticmethod
    def part(labels, keys):
        return {name: {key: v for key, v in values.items() if key in keys} for name, values in labels.items()}

    @precondition(lambda self: len(self.models) >= 2 and len(self.models) < len(NAMES))
    @rule(data=st.data())
    def merge(self, data):
        names = data.draw(st.permutations(sorted(self.models)))[:2]
        captures = [open_capture(self.path(name)) for name in names]
        out = self.free(data)
        try:
            plan = plan_merge(captures)
        except BadInputError:
            assert set(captures[0].keys) & set(captures[1].keys)
            return
        except HiddenlakeError:
            assert captures[0].coverage != captures[1].coverage
            return
        labels = [self.models[name].labels for name in names]
        copy(plan, open_backend(self.path(out)))
        model = self.models[out] = Model(plan.coverage)
        model.promised = {key for capture in captures for key in capture.keys}
        for part in labels:
            for name, values in part.items():
                model.labels[name] = model.labels.get(name, {}) | values

    @precondition(lambda self: self.models)
    @rule(data=st.data(), rows=st.sampled_from([2, 8, 16]))
    def compact(self, data, rows):
        name = self.existing(data)
        if name in self.writers:
            with pytest.raises((StoreError, BadInputError)):
                compact(self.path(name), shard_samples=rows)
            return
        try:
            compact(self.path(name), shard_samples=rows)
        except BadInputError:
            assert open_capture(self.path(name)).shard_samples >= min(rows, len(open_capture(self.path(name))))

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def rm(self, data):
        name = self.existing(data)
        if name in self.writers:
            with pytest.raises(StoreError, match="is being written"):
                remove_capture(self.path(name))
            return
        remove_capture(self.path(name))
        del self.models[name]

    @rule()
    def gc(self):
        collect_garbage(self.folder)
        for name in self.models:
            invariants.nothing_is_left_over(self.path(name), name in self.writers)

    @precondition(lambda self: self.models)
    @rule(data=st.data())
    def repair(self, data):
        name = self.existing(data)
        if name in self.writers:
            with pytest.raises(StoreError, match="is being written"):
                repair(self.path(name))
        else:
            done = repair(self.path(name))
            assert not done.lost and not done.moved
            invariants.verifies(self.path(name))

    @invariant()
    def the_lake_is_what_the_dictionary_says(self):
        listed = {row["name"]: row for row in list_captures(self.folder)}
        assert set(listed) == set(self.models) and not any("error" in row for row in listed.values())
        for name, model in self.models.items():
            capture = open_capture(self.path(name))
            keys = set(capture.keys)
            assert model.promised <= keys <= model.promised | model.may, name
            model.promised |= keys  # what was seen once must stay
            assert capture.coverage == model.coverage
            invariants.committed_samples_are_exact(self.tiny, capture.place, capture)
            invariants.labels_are_what_was_added(capture, model.labels)
            invariants.commits_agree(capture.place)

    def teardown(self):
        try:
            for name in list(self.writers):
                self.writers.pop(name)[0].close()
            for name, model in self.models.items():
                if model.coverage == self.full:
                    with self.open_writer(name, self.full):
                        pass  # what a crash left is swept, what it tore is rebuilt
                    invariants.verifies(self.path(name))
        finally:
            shutil.rmtree(self.folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["cells", "both", "tokens"])
def test_a_lake_in_any_order(tiny, kind):
    machine = type("Machine", (Lake,), {"tiny": tiny, "kind": kind})
    run_state_machine_as_test(machine, settings=settings(max_examples=12, stateful_step_count=25, deadline=None))
