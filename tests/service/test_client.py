"""The client: a lake behind a service shows what the same lake shows in its folder, bit for bit, or an error."""

import copy
import multiprocessing
import os
import pickle
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import hiddenlake
from hiddenlake.cache.client import asking, connection, moment
from hiddenlake.cache.errors import BadInputError, CorruptError, StoreError, UnknownNameError
from hiddenlake.cache.service import problems, wire
from hiddenlake.cache.store.backend import open_backend
from hiddenlake.cache.store.compact import compact
from hiddenlake.cache.store.labels import add_label
from hiddenlake.cache.store.reader import open_capture
from hiddenlake.cache.testing import small

from .conftest import CAPTURES, SAMPLES, TENANT, add_key
from .proxy import SILENCE, answer, proxy

SEEN = [name for name in CAPTURES if name != "theirs"]
VIEWS = [
    (name, tokens, dtype)
    for name in SEEN
    for tokens in (False, True)
    for dtype in ("float32", "stored")
    if CAPTURES[name][0] in ("both", "tokens" if tokens else "cells")
]


@pytest.fixture(scope="module")
def key(server):
    return add_key(server.lake, "reader")


@pytest.fixture(scope="module")
def remote(server, key):
    with hiddenlake.connect(server.url, key) as lake:
        yield lake


@pytest.fixture(scope="module")
def local(server):
    return hiddenlake.connect(server.lake)


@pytest.fixture
def quick(monkeypatch):
    """No waiting between attempts."""
    monkeypatch.setattr(asking, "FIRST_SECONDS", 0.001)


def same(found, expected):
    assert found.dtype == expected.dtype and found.shape == expected.shape
    assert np.ascontiguousarray(found).tobytes() == np.ascontiguousarray(expected).tobytes()


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


# What goes wrong.


def test_what_is_asked_for_wrongly_is_not_asked(remote, monkeypatch):
    capture = remote.capture("cells")
    monkeypatch.setattr(connection.Connection, "_attempt", None)
    for arguments in [
        ("resid_mid",),
        ("mlp_act", 1),
        ("mlp_act", 0, "last"),
        ("mlp_act", 0, "-1", "nobody"),
        ("mlp_act", 0, "-1", SAMPLES),
    ]:
        with pytest.raises(UnknownNameError, match="it has"):
            capture.read(*arguments)
    with pytest.raises(UnknownNameError, match="has no tokens"):
        capture.read_tokens("mlp_act")
    with pytest.raises(BadInputError, match="holds no tokens"):
        capture.dataset(tokens=True)
    with pytest.raises(ValueError, match="expected"):
        capture.read("mlp_act", out=np.zeros((2, 3, SAMPLES, 40), np.float32))


def test_a_capture_that_is_not_there(remote, local):
    for lake in (remote, local):
        with pytest.raises(StoreError, match="no such capture|has no capture"):
            lake.capture("nothing")
    for name in ("theirs", "..", "a/b", "", "cells?x", "é"):
        with pytest.raises(StoreError):
            remote.capture(name)


def test_a_tenant_sees_their_own(server):
    with hiddenlake.connect(server.url, add_key(server.lake, "them", tenant=TENANT)) as lake:
        assert len(lake.capture("theirs").read("embed", position="last_q")) == SAMPLES


def test_damage_is_a_corrupt_error(lake, serve):
    name = open_capture(lake / "cells").snapshot.layout.data_file("mlp_act", 1)
    raw = bytearray((lake / "cells" / name).read_bytes())
    raw[0] ^= 1
    (lake / "cells" / name).write_bytes(raw)
    one = serve(lake, key=add_key(lake, "x"))
    with hiddenlake.connect(one.url, one.key) as found:
        with pytest.raises(CorruptError, match=r"mlp_act.*\(request [0-9a-f]{32}\)"):
            found.capture("cells").read("mlp_act", 0, "last_q")
        # of what is whole, nothing is lost
        assert found.capture("cells").read("resid_post").shape[2] == SAMPLES


def test_without_a_key(server, monkeypatch):
    monkeypatch.delenv("HIDDENLAKE_KEY", raising=False)
    with pytest.raises(BadInputError, match="no key: give connect"):
        hiddenlake.connect(server.url)
    monkeypatch.setenv("HIDDENLAKE_KEY", server.key)
    with hiddenlake.connect(server.url) as lake:
        assert lake.captures()


def test_a_wrong_key(server):
    with hiddenlake.connect(server.url, "hl_wrong") as lake, pytest.raises(StoreError, match="keys add") as caught:
        lake.captures()
    assert "hl_wrong" not in str(caught.value) + repr(lake)


@pytest.mark.parametrize(
    "url",
    [
        "http://hl_k@localhost:1", "http://:hl_k@localhost:1", "http://localhost:1/?key=hl_k", "http://localhost:1#hl_k",
        "http://localhost:hl_k", "http://localhost:99999", "http://localhost:0", "http://[hl_k", "http://", "http:///hl_k",
    ],
)  # fmt: skip
def test_a_key_in_the_address_is_refused_and_not_repeated(url):
    with pytest.raises(BadInputError, match="connect\\(..., key=...\\)") as caught:
        hiddenlake.connect(url, "x")
    assert "hl_k" not in str(caught.value)


@pytest.mark.parametrize("key", ["a b", "a\nb", "é", "\x00"])
def test_what_is_no_key(key):
    with pytest.raises(BadInputError, match="copy it again"):
        hiddenlake.connect("http://localhost:1", key)


def test_a_key_for_a_folder_is_refused(tmp_path):
    with pytest.raises(BadInputError, match="leave it out"):
        hiddenlake.connect(tmp_path, "hl_x")


def test_no_service_there(quick):
    with hiddenlake.connect("http://127.0.0.1:9", "x") as lake, pytest.raises(StoreError, match="hiddenlake serve"):
        lake.captures()


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


# What is lost on the way.


@pytest.fixture
def between(server, key):
    """(Proxy, capture through it, whose next request makes a connection)."""
    with proxy(server.url) as found, hiddenlake.connect(found.url, key) as lake:
        capture = lake.capture("exact")
        lake.close()
        found.connections = 0
        yield found, capture


@pytest.mark.parametrize("bytes_of_it", [1, 40, 400, 1000, 3000])
def test_a_cut_answer_is_asked_for_again(between, local, quick, bytes_of_it):
    found, capture = between
    expected = local.capture("exact").read("mlp_act")
    assert 1000 < expected.nbytes < 20000
    found.faults = [bytes_of_it, bytes_of_it, bytes_of_it]
    same(capture.read("mlp_act"), expected)
    assert found.connections == 4


@pytest.mark.parametrize("bytes_of_it", [0, 300, 2000])
def test_an_answer_that_is_always_cut_is_an_error(between, quick, bytes_of_it):
    found, capture = between
    found.faults = [bytes_of_it] * asking.ATTEMPTS
    out = np.full((2, 3, SAMPLES, 40), 7, np.float16)
    with pytest.raises(StoreError, match=f"no whole answer after {asking.ATTEMPTS} attempts"):
        capture.read("mlp_act", out=out)
    assert found.connections == asking.ATTEMPTS
    capture.connection.close()
    found.faults = [500] * asking.ATTEMPTS
    with pytest.raises(StoreError, match="no whole answer"):
        capture.samples()


def test_a_server_that_never_answers_is_not_waited_for_for_ever(server, key, quick, monkeypatch):
    monkeypatch.setattr(connection, "_SILENCE", 0.3)
    monkeypatch.setattr(asking, "PATIENCE_SECONDS", 1.0)
    with proxy(server.url) as found, hiddenlake.connect(found.url, key) as lake:
        found.faults = [SILENCE] * 20
        start = time.monotonic()
        with pytest.raises(StoreError, match="no whole answer after [2345] attempts"):
            lake.captures()
        assert 1 < time.monotonic() - start < 10 and found.connections < asking.ATTEMPTS
        found.faults = [SILENCE]
        assert lake.captures()


def test_more_at_once_than_a_key_may(lake, serve, quick, monkeypatch):
    """The service turns away what is too much, and in the end everybody has been served."""
    one = serve(lake, "--max-concurrent", "1", key=add_key(lake, "x"))
    turned = []
    monkeypatch.setattr(
        connection.time, "sleep", lambda seconds: turned.append(seconds) or threading.Event().wait(0.02)
    )
    monkeypatch.setattr(asking, "ATTEMPTS", 1000)
    with hiddenlake.connect(one.url, one.key) as there, ThreadPoolExecutor(6) as pool:
        capture, expected = there.capture("exact"), open_capture(lake / "exact").read("mlp_act")
        for found in pool.map(lambda _: capture.read("mlp_act"), range(60)):
            same(found, expected)
    assert turned and min(turned) >= 1  # Retry-After: 1


def test_turned_away_and_then_let_in(between, local, monkeypatch):
    found, capture = between
    waits = []
    monkeypatch.setattr(connection.time, "sleep", waits.append)
    found.faults = [answer(429, retry_after="3"), answer(503), answer(429, retry_after="0"), answer(502)]
    same(capture.read("mlp_act"), local.capture("exact").read("mlp_act"))
    assert len(waits) == 4 and 3 < waits[0] < 3.3 and all(0.1 <= wait <= 5 for wait in waits[1:])


def test_a_server_that_asks_for_too_long_a_wait_is_told_about(between, monkeypatch):
    found, capture = between
    monkeypatch.setattr(connection.time, "sleep", None)
    found.faults = [
        answer(
            429, b'{"type": "too_many_requests", "message": "m", "remedy": "r", "request_id": "i"}', retry_after="3600"
        )
    ]
    with pytest.raises(StoreError, match=r"m: r \(request i\)"):
        capture.read("mlp_act")


@pytest.mark.parametrize("status", [400, 404, 500, 302, 206, 204])
def test_other_answers_are_not_asked_for_again(between, monkeypatch, status):
    found, capture = between
    monkeypatch.setattr(connection.time, "sleep", None)
    found.faults = [answer(status, location="http://example.invalid/")]
    with pytest.raises(StoreError, match=f"answered {status}|no whole answer"):
        capture.read("mlp_act")
    assert found.connections == 1


def test_an_answer_to_another_request_is_refused(between):
    """What a cache in between, or a mix-up, would give: of the right shape, and of another sample."""
    found, capture = between
    name = capture.snapshot.name
    values = bytes(2 * 40)
    headers = {"X_Hiddenlake_Shape": "1,1,1,40", "X_Hiddenlake_Dtype": "float16", "X_Hiddenlake_Snapshot": name}
    found.faults = [answer(200, values, **headers, X_Request_Id="another"), answer(200, values, **headers)]
    for _ in range(2):
        with pytest.raises(StoreError, match="another request"):
            capture.read("mlp_act", 0, "-1", 3)


@pytest.mark.parametrize(
    "wrong",
    [
        {"X-Hiddenlake-Shape": "1,40,1,1"}, {"X-Hiddenlake-Shape": None}, {"X-Hiddenlake-Dtype": "bfloat16"},
        {"X-Hiddenlake-Snapshot": "0" * 32}, {"Content-Length": "79"}, {"Content-Length": "81"},
    ],
    ids=str,
)  # fmt: skip
def test_an_answer_that_is_not_what_was_asked_for_is_refused(remote, wrong):
    headers = {"X-Hiddenlake-Shape": "1,1,1,40", "X-Hiddenlake-Dtype": "float16", "X-Hiddenlake-Snapshot": "1" * 32}
    sink = asking.Fill(memoryview(bytearray(80)), headers)
    good = headers | {"Content-Length": "80"}
    sink.begin(good)
    sink.write(bytes(80))
    sink.finish()
    with pytest.raises(StoreError, match="refresh"):
        sink.begin({name: value for name, value in (good | wrong).items() if value is not None})


def test_too_few_and_too_many_bytes_are_never_taken(remote):
    sink = asking.Fill(memoryview(bytearray(4)), {})
    for parts in ([b"abc"], [b""], [b"ab", b"cde"], [b"abcde"]):
        sink.begin({})
        with pytest.raises(asking.Broken):
            for part in parts:
                sink.write(part)
            sink.finish()


def test_a_compressed_answer_is_refused(between):
    found, capture = between
    found.faults = [answer(404, b"x", content_encoding="gzip")]
    with pytest.raises(StoreError, match="compressed"):
        capture.read("mlp_act")


def test_a_server_that_dies_and_comes_back(lake, serve, monkeypatch):
    """It is killed while it answers; what reads waits for the next one, on the same port."""
    key = add_key(lake, "x")
    one = serve(lake, key=key)
    port = one.url.rpartition(":")[2]
    monkeypatch.setattr(asking, "FIRST_SECONDS", 0.5)
    monkeypatch.setattr(asking, "ATTEMPTS", 20)  # however long a start takes here
    with proxy(one.url) as found, hiddenlake.connect(found.url, key) as there:
        capture, expected = there.capture("exact"), open_capture(lake / "exact").read("mlp_act")
        there.close()
        found.faults = [1500]
        started = []

        def die():
            one.process.kill()
            one.process.wait()
            started.append(serve(lake, "--port", port, key=key))

        thread = threading.Thread(target=die)
        thread.start()
        try:
            for _ in range(5):
                same(capture.read("mlp_act"), expected)
                there.close()
        finally:
            thread.join()


def test_a_server_of_another_version(remote, monkeypatch):
    monkeypatch.setattr(wire, "VERSION", 2)
    with pytest.raises(StoreError, match="speaks version 1"):
        remote.capture("cells")


def test_errors_come_back_as_what_they_were():
    """Every exception that the service makes a problem of is the same again for whoever asked, or a StoreError."""
    for error, _, kind, _ in problems._KINDS:
        if error is not hiddenlake.HiddenlakeError:
            assert wire.ERRORS[kind] is error


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("7", 7.0),
        ("Thu, 01 Jan 1970 00:00:00 GMT", 0.0),
        ("", None),
        ("-1", None),
        ("soon", None),
        ("1e9", None),
        ("²", None),
    ],
)
def test_retry_after(value, seconds):
    assert asking._retry_after({"Retry-After": value}) == seconds


# What is done with it.


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
