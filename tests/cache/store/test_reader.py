import pickle
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hiddenlake.cache.errors import StoreError, UnknownNameError
from hiddenlake.cache.store import open_capture, opened

SAMPLES = 19


@pytest.fixture(scope="module", params=["bfloat16", "float32"])
def capture(request, tiny, tmp_path_factory):
    path = tmp_path_factory.mktemp("lake") / "numbers"
    tiny.write(path, SAMPLES, shard_samples=8, dtype=request.param)
    return open_capture(path)


@pytest.fixture(scope="module")
def truth(capture, expected):
    return expected(SAMPLES, capture.coverage)


def axis(values):
    return st.none() | st.sampled_from(values) | st.lists(st.sampled_from(values), max_size=6)


@settings(deadline=None)  # the disk is shared
@given(st.data())
def test_any_selection_reads_what_numpy_selects(capture, truth, data):
    c = capture.coverage
    site = data.draw(st.sampled_from([*c.sites, "embed"]))
    layer = data.draw(axis(c.layers)) if site != "embed" else None
    position = data.draw(axis(c.positions))
    samples = data.draw(axis([*range(SAMPLES), *capture.keys]))
    check = data.draw(st.booleans())
    if data.draw(st.booleans()):
        opened._arrays.clear()

    def take(array, along, known, wanted):
        if wanted is None:
            return array
        if isinstance(wanted, (str, int)):
            return array.take(known.index(wanted), along)
        return array.take([known.index(value) for value in wanted], along)

    number = {key: i for i, key in enumerate(capture.keys)}
    rows = [number.get(s, s) for s in samples] if isinstance(samples, list) else number.get(samples, samples)
    want = take(truth[site], -2, list(range(SAMPLES)), rows)
    single = isinstance(rows, int)
    want = take(want, -2 if single else -3, list(c.positions), position)
    if site != "embed":
        want = take(want, 0, list(c.layers), layer)
    got = capture.read(site, layer, position, samples, check=check)
    assert got.shape == want.shape
    assert np.ascontiguousarray(got).tobytes() == np.ascontiguousarray(want).tobytes()


def test_selections_may_be_arrays_and_numbers(capture):
    whole = capture.read("mlp_out")
    assert np.array_equal(
        capture.read("mlp_out", np.int64(2), -1, np.array([3, 1])).view(np.uint8), whole[1, 3, [3, 1]].view(np.uint8)
    )


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("resid_mid",), "mlp_out, resid_post, embed"),
        (("mlp_out", 1), "0, 2, 5"),
        (("mlp_out", [0, 3]), "0, 2, 5"),
        (("mlp_out", 2.0), "0, 2, 5"),
        (("mlp_out", "last"), "0, 2, 5"),
        (("mlp_out", False), "0, 2, 5"),
        (("mlp_out", 0, "first_answer"), "last_q, exact_answer_first"),
        (("mlp_out", 0, -2), "last_q, exact_answer_first"),
        (("embed", 0), "no layers"),
        (("mlp_out", 0, "-1", "key-9999"), "key-0000"),
        (("mlp_out", 0, "-1", SAMPLES), "19 samples"),
        (("mlp_out", 0, "-1", -1), "19 samples"),
        (("mlp_out", None, None, None, "float16"), "stored"),
    ],
)
def test_what_was_not_captured_is_an_error_that_says_what_was(capture, arguments, named):
    with pytest.raises(UnknownNameError, match=named):
        capture.read(*arguments)


def test_refresh_shows_new_commits_and_old_snapshots_stay(tiny, tmp_path, assert_holds):
    path = tmp_path / "numbers"
    tiny.write(path, 4)
    capture = open_capture(path)
    data = capture.dataset()
    tiny.write(path, 10)
    assert len(capture) == 4
    capture.refresh()
    assert len(capture) == 10 and data.sizes["sample"] == 4
    assert data["mlp_out"].load().shape == (3, 4, 4, tiny.WIDTH)
    assert_holds(path, complete=10)


def test_an_empty_capture_reads_as_empty(tiny, tmp_path):
    tiny.open_tiny(tmp_path / "empty", 4).close()
    capture = open_capture(tmp_path / "empty")
    assert capture.read("mlp_out", 0).shape == (4, 0, tiny.WIDTH)
    assert capture.samples().num_rows == 0 and capture.failures().num_rows == 0
    assert capture.dataset()["mlp_out"].shape == (3, 4, 0, tiny.WIDTH)


def test_threads_may_share_a_capture(capture):
    whole = capture.read("mlp_out").view(np.uint8)
    with ThreadPoolExecutor(8) as pool:
        for got in pool.map(lambda _: capture.read("mlp_out").view(np.uint8), range(32)):
            assert np.array_equal(got, whole)


def test_what_is_no_capture_is_refused(tmp_path):
    with pytest.raises(StoreError, match="no capture"):
        open_capture(tmp_path)
    with pytest.raises(StoreError, match="no capture"):
        open_capture(tmp_path / "absent")
    (tmp_path / "zarr.json").write_text('{"zarr_format": 3, "node_type": "group", "attributes": {}}')
    with pytest.raises(StoreError, match="no capture"):
        open_capture(tmp_path)


def test_a_snapshot_survives_pickle(capture):
    again = pickle.loads(pickle.dumps(capture.dataset()["mlp_out"]))
    assert np.array_equal(again.values, capture.read("mlp_out", dtype="float32"), equal_nan=True)
