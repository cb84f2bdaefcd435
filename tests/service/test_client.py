"""The client: a lake behind a service shows what the same lake shows in its folder, bit for bit, or an error."""

import copy
import multiprocessing
import os
import pickle
import shutil
import threading

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hiddenlake
from hiddenlake.cache.client import connection, moment
from hiddenlake.cache.errors import BadInputError, StoreError
from hiddenlake.cache.store.backend import open_backend
from hiddenlake.cache.store.compact import compact
from hiddenlake.cache.store.labels import add_label
from hiddenlake.cache.store.reader import open_capture
from hiddenlake.cache.testing import small

from .conftest import CAPTURES, SAMPLES, add_key, same

SEEN = [name for name in CAPTURES if name != "theirs"]
VIEWS = [
    (name, tokens, dtype)
    for name in SEEN
    for tokens in (False, True)
    for dtype in ("float32", "stored")
    if CAPTURES[name][0] in ("both", "tokens" if tokens else "cells")
]


def same_values(found, expected):
    """Of any variable of a Dataset: sequences and nulls too."""
    if expected.dtype != object:
        return same(found, expected)
    assert found.dtype == object and found.shape == expected.shape
    for one, other in zip(found.ravel(), expected.ravel(), strict=True):
        assert type(one) is type(other)
        np.testing.assert_array_equal(one, other)


def same_dataset(found, expected):
    """All variables, coordinates, dimensions, attributes and values."""
    assert list(found.variables) == list(expected.variables) and dict(found.sizes) == dict(expected.sizes)
    assert set(found.coords) == set(expected.coords)
    for name in expected.variables:
        assert found[name].dims == expected[name].dims and found[name].attrs == expected[name].attrs, name
        same_values(found[name].values, expected[name].values)
    assert {**found.attrs, "capture": None} == {**expected.attrs, "capture": None}


def test_both_lakes_list_the_same(remote, local):
    named = {entry["name"]: entry for entry in local.captures()}
    assert named.pop("theirs")  # another tenant's
    assert remote.captures() == list(named.values())


def test_one_that_cannot_be_opened_is_listed_with_its_error(lake, serve):
    (lake / "cells" / "zarr.json").write_text("{")
    one = serve(lake, key=add_key(lake, "x"))
    with hiddenlake.connect(one.url, one.key) as found, hiddenlake.connect(lake) as here:
        entry = next(entry for entry in found.captures() if entry["name"] == "cells")
        assert entry.keys() == {"name", "error"} == next(e for e in here.captures() if e["name"] == "cells").keys()
        assert str(lake) not in entry["error"]


@pytest.mark.parametrize("name", SEEN)
def test_a_capture_is_what_it_is_locally(remote, local, name):
    found, expected = remote.capture(name), local.capture(name)
    assert (found.identity, found.coverage, found.keys) == (expected.identity, expected.coverage, expected.keys)
    assert len(found) == len(expected) == SAMPLES
    assert found.samples().equals(expected.samples())
    assert found.labels().keys() == expected.labels().keys()
    for label, table in found.labels().items():  # NaN equals nothing, but is written as such
        other = expected.labels()[label]
        assert table.schema.equals(other.schema) and repr(table.to_pydict()) == repr(other.to_pydict())
    assert repr(found).replace(found.path, "") == repr(expected).replace(expected.path, "")


@pytest.mark.parametrize(("name", "tokens", "dtype"), VIEWS)
def test_a_dataset_is_what_it_is_locally(remote, local, name, tokens, dtype):
    same_dataset(remote.capture(name).dataset(dtype, tokens=tokens), local.capture(name).dataset(dtype, tokens=tokens))


def test_a_dataset_is_lazy(remote, monkeypatch):
    asked = []
    attempt = connection.Connection._attempt
    monkeypatch.setattr(connection.Connection, "_attempt", lambda self, ask: asked.append(ask) or attempt(self, ask))
    data = remote.capture("exact").dataset()
    assert {ask.method for ask in asked} == {"GET"}
    asked.clear()
    data.mlp_act.sel(layer=3, position="-1").values  # noqa: B018
    [ask] = asked
    assert ask.body["layers"] == [3] and ask.body["positions"] == ["-1"] and ask.body["samples"] is None


def axes(c, draw, positions=False):
    """Arguments of `read`, of every kind."""

    def some(values):
        return draw(
            st.one_of(st.none(), st.sampled_from(values), st.lists(st.sampled_from(values), min_size=0, max_size=4))
        )

    site = draw(st.sampled_from(["embed", "mlp_act", "resid_post"]))
    positions = [some(list(c.positions))] if positions else []
    rows = [*range(SAMPLES), *map(small.key, range(SAMPLES))]
    return site, None if site == "embed" else some(list(c.layers)), *positions, some(rows)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_read_is_what_it_is_locally(remote, local, data):
    name = data.draw(st.sampled_from(["cells", "both", "exact"]))
    found, expected = cached(remote, name), cached(local, name)
    asked = axes(expected.coverage, data.draw, positions=True)
    how = {"dtype": data.draw(st.sampled_from(["stored", "float32"])), "check": data.draw(st.booleans())}
    with pytest.MonkeyPatch.context() as patch:  # in parts of any size
        patch.setattr(moment, "PART_BYTES", data.draw(st.integers(200, 4000)))
        values = found.read(*asked, **how)
        same(values, expected.read(*asked, **how))
        out = np.zeros_like(values)
        assert np.shares_memory(found.read(*asked, **how, out=out), out) or not out.size
        same(out, values)


@settings(max_examples=25, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_any_read_of_tokens_is_what_it_is_locally(remote, local, data):
    name = data.draw(st.sampled_from(["tokens", "both", "exact"]))
    found, expected = cached(remote, name), cached(local, name)
    site, layer, rows = axes(expected.coverage, data.draw)
    end = st.one_of(st.none(), st.integers(-5, 5))
    step = st.sampled_from([None, 1, 2, -1, -3])
    tokens = data.draw(st.one_of(st.none(), st.builds(slice, end, end, step)))
    dtype = data.draw(st.sampled_from(["stored", "float32"]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(moment, "PART_BYTES", data.draw(st.integers(200, 4000)))
        one = found.read_tokens(site, layer, rows, tokens, dtype)
    other = expected.read_tokens(site, layer, rows, tokens, dtype)
    for field in ("values", "offsets", "token_index"):
        same(getattr(one, field), getattr(other, field))


_opened = {}


def cached(lake, name):
    return _opened.setdefault((id(lake), name), lake.capture(name))


def test_a_read_on_a_device(remote, local):
    torch = pytest.importorskip("torch")
    for dtype in ("stored", "float32"):
        found = remote.capture("cells").read("mlp_act", 3, dtype=dtype, device="cpu")
        assert torch.equal(
            found.view(torch.uint8),
            local.capture("cells").read("mlp_act", 3, dtype=dtype, device="cpu").view(torch.uint8),
        )


def test_a_dataset_on_a_device(remote, local):
    pytest.importorskip("torch")
    for lake in (remote, local):
        cell = lake.capture("cells").dataset().mlp_act.sel(layer=3).isel(sample=[4, 2])
        same(cell.hl.to_gpu("cpu").values, cell.values)


def test_cells_are_read_ahead(remote, local):
    found, expected = (list(lake.capture("cells").cells("mlp_act")) for lake in (remote, local))
    assert [cell[:2] for cell in found] == [cell[:2] for cell in expected] and len(found) == 6
    for one, other in zip(found, expected, strict=True):
        same(one[2], other[2])


def test_a_body_of_few_names_is_asked_for_in_parts(lake, serve):
    """The service takes 4.6 kB, which is what some twenty samples and what belongs to a read take."""
    one = serve(lake, "--max-body", "4600", "--max-read", "1000", key=add_key(lake, "x"))
    with hiddenlake.connect(one.url, one.key) as found, hiddenlake.connect(lake) as here:
        same(
            found.capture("cells").read("mlp_act", samples=range(12)),
            here.capture("cells").read("mlp_act", samples=range(12)),
        )
        same(found.capture("both").read_tokens("mlp_act").values, here.capture("both").read_tokens("mlp_act").values)


# What changes while somebody reads.


def write_some(folder, numbers, samples=SAMPLES):
    """Capture these samples of so many."""
    with small.open_small(open_backend(folder), samples, "both") as writer:
        assert len(writer.reserve([small.key(i) for i in numbers], len(numbers))) == len(numbers)
        for i in numbers:
            small.add(writer, i)


@pytest.fixture
def growing(tmp_path, serve):
    """(folder, a function that opens the capture anew through a service): it holds every second sample."""
    folder = tmp_path / "lake" / "growing"
    write_some(folder, range(0, SAMPLES, 2))
    one = serve(tmp_path / "lake", key=add_key(tmp_path / "lake", "x"))
    lake = hiddenlake.connect(one.url, one.key)
    yield folder, lambda: lake.capture("growing"), one
    lake.close()


def settle(server, capture, samples):
    """Until the service sees what was committed."""
    for _ in range(200):
        capture.refresh()
        if len(capture) == samples:
            return
        threading.Event().wait(0.05)
    raise AssertionError(f"{len(capture)} samples, {samples} expected")


def test_what_has_grown_is_read_as_it_was(growing):
    """New samples come between the old ones: every row has another number."""
    folder, open_it, server = growing
    here, old = open_capture(folder), open_it()
    cells, tokens = old.dataset("stored"), old.dataset("stored", tokens=True)
    expected = here.dataset("stored"), here.dataset("stored", tokens=True)
    fingerprint = old.snapshot.fingerprint("mlp_act")
    write_some(folder, range(1, SAMPLES, 2))
    settle(server, new := open_it(), SAMPLES)
    assert new.keys == [small.key(i) for i in range(SAMPLES)] != old.keys
    same_dataset(cells, expected[0])
    same_dataset(tokens, expected[1])
    same(old.read("mlp_act", 3, "-1"), here.read("mlp_act", 3, "-1"))
    assert old.samples().equals(here.samples())
    assert old.snapshot.fingerprint("mlp_act") == fingerprint != new.snapshot.fingerprint("mlp_act")
    here.refresh()
    same_dataset(new.dataset(), here.dataset())
    old.refresh()
    same(old.read("mlp_act", samples=[small.key(1), 2]), here.read("mlp_act", samples=[1, 2]))


@pytest.mark.parametrize("change", ["made again", "removed", "compacted"])
def test_what_was_replaced_is_an_error_and_never_other_numbers(growing, change):
    folder, open_it, server = growing
    old, data = open_it(), open_it().dataset()
    before = old.read("mlp_act")
    if change == "compacted":
        compact(folder, shard_samples=8)
    else:
        shutil.rmtree(folder)
        if change == "made again":  # under the same keys
            write_some(folder, list(reversed(range(0, SAMPLES, 2))))
    for _ in range(200):  # until the service has noticed, it may give what was there
        try:
            same(old.read("mlp_act"), before)
        except StoreError as error:
            assert "refresh()" in str(error) or "no such capture" in str(error) or "removed or replaced" in str(error)
            break
        threading.Event().wait(0.02)
    else:
        raise AssertionError("still read")
    for ask in (
        lambda: data.resid_post.values,
        old.samples,
        lambda: old.read_tokens("embed"),
        lambda: old.read("embed", samples=1),
    ):
        with pytest.raises(StoreError):
            ask()
    if change == "removed":
        with pytest.raises(StoreError, match="no such capture"):
            old.refresh()
    else:
        old.refresh()
        same(old.read("mlp_act"), open_capture(folder).read("mlp_act"))


# What is done with it.


def test_a_dataset_is_pickled_without_the_key(remote, local, key, monkeypatch):
    data = remote.capture("cells").dataset()
    raw = pickle.dumps(data)
    assert key.encode() not in raw
    monkeypatch.delenv("HIDDENLAKE_KEY", raising=False)
    with pytest.raises(BadInputError, match="HIDDENLAKE_KEY"):
        pickle.loads(raw)
    monkeypatch.setenv("HIDDENLAKE_KEY", key)
    same_dataset(pickle.loads(raw), local.capture("cells").dataset())
    same_dataset(copy.deepcopy(data), data)


def test_a_forked_process_has_connections_of_its_own(remote):
    """Two processes on one socket would read each other's answers."""
    capture = remote.capture("cells")
    expected = capture.read("mlp_act")
    before = list(remote.connection._client._transport._pool.connections)

    def work(results):
        fine = remote.connection._client is None
        for _ in range(20):
            fine &= capture.read("mlp_act").tobytes() == expected.tobytes()
        results.put(fine)
        results.close()
        results.join_thread()
        os._exit(0)

    context = multiprocessing.get_context("fork")
    results = context.Queue()
    child = context.Process(target=work, args=(results,))
    child.start()
    for _ in range(20):
        same(capture.read("mlp_act"), expected)
    assert results.get(timeout=60)
    child.join(60)
    assert remote.connection._client._transport._pool.connections == before != []


def test_threads_read_at_once(remote, local):
    capture, expected = remote.capture("exact"), local.capture("exact").read("mlp_act")
    wrong = []

    def work(i):
        for k in range(15):
            row = (i + k) % SAMPLES
            if capture.read("mlp_act", samples=row).tobytes() != expected[:, :, row].tobytes():
                wrong.append(row)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_probes_of_a_served_capture_are_those_of_the_local_one(tmp_path, serve, make_grid_capture):
    make_grid_capture(tmp_path / "lake" / "probed")
    one = serve(tmp_path / "lake", key=add_key(tmp_path / "lake", "x"))
    with hiddenlake.connect(one.url, one.key) as found, hiddenlake.connect(tmp_path / "lake") as here:
        grids = [
            hiddenlake.fit_grid(lake.capture("probed"), "mlp_out", C=[0.01], shuffles=2, layers=[1])
            for lake in (found, here)
        ]
        assert np.isfinite(grids[0].auc.values).any()
        for name in grids[1].data_vars:
            np.testing.assert_array_equal(grids[0][name].values, grids[1][name].values, name)
        fits = [
            hiddenlake.fit_probes(
                (data := lake.capture("probed").dataset()).mlp_out.sel(layer=1), ~data.correct, C=[0.01]
            )
            for lake in (found, here)
        ]
        np.testing.assert_array_equal(fits[0].auc.values, fits[1].auc.values)


@pytest.fixture
def make_grid_capture():
    from ..probing.conftest import synthetic_capture, write_capture

    return lambda path: write_capture(synthetic_capture(80, 2, 8), path, {"model": "m"})


def test_labels_that_are_added_show_up(lake, serve):
    one = serve(lake, key=add_key(lake, "x"))
    import pyarrow as pa

    with hiddenlake.connect(one.url, one.key) as found:
        capture = found.capture("exact")
        assert "later" not in capture.dataset()
        keys = capture.keys
        add_label(open_capture(lake / "exact"), "later", pa.table({"key": keys, "later": list(range(SAMPLES))}))
        assert capture.dataset().later.values.tolist() == list(range(SAMPLES))
