"""Grids, cells, scored tokens and probes over HTTP, beside what the functions below them give."""

import math
import os
import shutil
import signal
import time

import numpy as np
import pytest
import xarray as xr
import zarr

from hiddenlake.cache.store.reader import open_capture
from hiddenlake.probing.held_out import held_out
from hiddenlake.probing.probe import load_probe, score_capture
from hiddenlake.probing.saving import open_grid, save_grid

from .conftest import CELL, alive, client_of

AT = "layer=1&position=exact_answer_last"


@pytest.fixture(scope="module")
def client(written_lake, tmp_path_factory):
    folder = tmp_path_factory.mktemp("routes") / "copy"
    shutil.copytree(written_lake, folder)
    with client_of(folder / "lake") as client:
        client.folder = folder
        yield client


def problem(response, status, kind=None):
    body = response.json()
    assert response.status_code == status and body.keys() - {"there"} == {"type", "message", "remedy", "request_id"}, (
        body
    )
    assert kind is None or body["type"] == kind
    return body


def ready(client, url):
    """An answer that is computed first."""
    for _ in range(100):
        response = client.get(url)
        if response.status_code != 202:
            assert response.status_code == 200, response.text
            return response.json()
        assert response.json()["doing"] and response.headers["retry-after"]
    raise AssertionError("never ready")


def test_a_captures_grids_are_those_of_its_identity(client):
    names = {
        name: [grid["name"] for grid in client.get(f"/v1/captures/{name}/grids").json()["grids"]]
        for name in ("cities", "other")
    }
    assert names == {"cities": ["one", "paper", "two"], "other": []}
    problem(client.get("/v1/captures/other/grids/one"), 404)
    assert problem(client.get("/v1/captures/theirs/grids"), 404) | {"request_id": ""} == problem(
        client.get("/v1/captures/nothing/grids"), 404
    ) | {"request_id": ""}


def test_a_tenant_sees_its_own_and_nobody_else_does(client):
    with client_of(client.folder / "lake", tenant="them") as theirs:
        assert [g["name"] for g in theirs.get("/v1/captures/theirs/grids").json()["grids"]] == ["secret"]
        assert {p["name"] for p in theirs.get("/v1/probes").json()["probes"]} == {"best", "secret"}
    assert [p["name"] for p in client.get("/v1/probes").json()["probes"]] == ["best"]
    for url in ("/v1/probes/secret", "/v1/captures/cities/grids/secret", "/v1/captures/theirs/grids/secret"):
        problem(client.get(url), 404)
    problem(client.post("/v1/probes/secret:score", json={"capture": "cities", "force": True}), 404)


@pytest.mark.parametrize("name", ["%2e%2e", "%2e%2e%2fone", "one.zarr", "..%2Fgrids%2Fone", "%00", "One", "%2Fetc%2Fpasswd", "a" * 300])  # fmt: skip
def test_names_are_looked_up_and_never_joined(client, name):
    for url in (f"/v1/captures/cities/grids/{name}", f"/v1/probes/{name}", f"/page/{name}"):
        assert client.get(url).status_code == 404


def test_a_link_is_not_followed(client):
    os.symlink(client.folder / "grids" / "one.zarr", client.folder / "grids" / "linked.zarr")
    assert "linked" not in [g["name"] for g in client.get("/v1/captures/cities/grids").json()["grids"]]
    problem(client.get("/v1/captures/cities/grids/linked"), 404)


def test_without_a_key_there_is_nothing_to_see(client):
    with client_of(client.folder / "lake", scope=None) as nobody:
        for url in ("/", "/page/main.js", "/page/plotly.min.js", "/v1/probes", "/v1/captures/cities/grids", f"/v1/captures/cities/grids/one/cell?{AT}"):  # fmt: skip
            problem(nobody.get(url), 401)
        problem(nobody.post("/v1/probes/best:score", json={"capture": "cities"}), 401)


@pytest.mark.parametrize("C", [None, 0.01, 0.1])
def test_a_grid_is_what_was_saved(client, C):
    grid = open_grid(client.folder / "grids" / "one.zarr")
    metrics = ["brier", "q", "n_wrong"]
    found = client.get("/v1/captures/cities/grids/one", params={"metric": metrics} | ({"C": C} if C else {})).json()
    at = grid.sel(C=C or grid.attrs["best_C"], method="nearest")
    assert found["C"] == pytest.approx(float(at.C)) and found["layers"] == [0, 1, 2] and found["all_C"] == [0.01, 0.1]
    assert found["positions"] == at.position.values.tolist()
    for name in ("auc", "auc_lo", "auc_hi", "n", "token_auc", *metrics):
        values = np.array(found["values"][name], float)
        expected = at[name].broadcast_like(at.auc).transpose("layer", "position").values
        np.testing.assert_allclose(values, expected, rtol=1e-6, err_msg=name)
    assert found["best"]["auc"] == pytest.approx(grid.attrs["best_auc"])
    assert str(client.folder) not in str(found)


def test_what_is_no_number_is_null(client):
    grid = open_grid(client.folder / "grids" / "one.zarr").copy(deep=True)
    grid.auc[0, 0] = np.nan
    grid.auc_hi[0, 0] = np.inf
    grid.attrs["nested_auc"] = float("nan")
    save_grid(grid, client.folder / "grids" / "holes.zarr")
    response = client.get("/v1/captures/cities/grids/holes", params={"C": 0.01})
    assert "NaN" not in response.text and "Infinity" not in response.text
    found = response.json()
    assert found["values"]["auc"][0][0] is None and found["values"]["auc_hi"][0][0] is None
    assert found["attrs"]["nested_auc"] is None and found["values"]["auc"][1][0] is not None


def test_what_the_grid_does_not_have_is_said(client):
    grid = "/v1/captures/cities/grids/one"
    for query in ("?C=3", "?metric=nonsense"):
        problem(client.get(grid + query), 409, "not_captured")
    for query in ("layer=7&position=-1", "layer=1&position=exact", "layer=1&position=-1&C=5"):
        problem(client.get(f"{grid}/cell?{query}"), 409, "not_captured")
    problem(client.get("/v1/captures/cities/grids/paper/cell?" + AT), 409, "no_scores")
    problem(client.get(f"{grid}/cell?layer=1"), 422, "bad_input")


def test_a_grid_that_is_replaced_is_read_again(client):
    path = client.folder / "grids" / "moving.zarr"
    grid = open_grid(client.folder / "grids" / "one.zarr").copy(deep=True)
    for value in (0.25, 0.75):
        grid.auc[:] = value
        save_grid(grid, path)
        assert client.get("/v1/captures/cities/grids/moving").json()["values"]["auc"][0][0] == value


def test_xarray_opens_a_served_grid(lake, serve):
    import httpx

    server = serve(lake)
    headers = {"Authorization": f"Bearer {server.key}"}
    with httpx.Client(base_url=server.url, headers=headers, timeout=60) as http:
        grids = {grid["name"]: grid for grid in http.get("/v1/captures/cities/grids").json()["grids"]}
        address = f"{server.url}{grids['one']['zarr']}"
        found = xr.open_zarr(address, consolidated=True, storage_options={"headers": headers}).load()
        here = open_grid(lake.parent / "grids" / "one.zarr")
        xr.testing.assert_identical(found, here.drop_attrs(deep=False).assign_attrs(
            {name: value for name, value in here.attrs.items() if name != "capture"}
        ))  # fmt: skip
        assert str(lake) not in http.get(f"{grids['one']['zarr']}/zarr.json").text
        assert http.head(f"{grids['one']['zarr']}/auc/zarr.json").headers["ETag"]
        part = http.get(f"{grids['one']['zarr']}/zarr.json", headers={"Range": "bytes=1-4"})
        assert part.status_code == 206 and len(part.content) == 4


def test_of_a_grid_only_its_own_files_are_there(client):
    grids = client.get("/v1/captures/cities/grids").json()["grids"]
    [where] = [grid["zarr"] for grid in grids if grid["name"] == "one"]
    assert client.get(f"{where}/zarr.json").status_code == client.get(f"{where}/auc/zarr.json").status_code == 200
    (client.folder / "grids" / "one.zarr" / "notes").write_text("mine")
    os.mkfifo(client.folder / "grids" / "one.zarr" / "auc" / "c" / "7")
    os.symlink(client.folder / "grids" / "one.zarr" / "notes", client.folder / "grids" / "one.zarr" / "auc" / "c" / "8")
    for path in ("auc/c/7", "auc/c/8", "notes", "auc/notes", "auc", "auc/c/99/0/0", "auc/c/0", "../one.zarr/zarr.json", "nothing/zarr.json", "/zarr.json",
                 "auc/%2e%2e/auc/zarr.json", "%2e%2e/two.zarr/zarr.json", ""):  # fmt: skip
        assert client.get(f"{where}/{path}").status_code == 404, path
    assert client.get(where.replace("cities", "other") + "/zarr.json").status_code == 404
    assert client.get(where[:-1] + "/zarr.json").status_code == 404


def test_a_reader_of_a_grid_that_was_replaced_gets_nothing_more_of_it(client):
    path = client.folder / "grids" / "going.zarr"
    save_grid(open_grid(client.folder / "grids" / "one.zarr"), path)

    def where():
        return {grid["name"]: grid["zarr"] for grid in client.get("/v1/captures/cities/grids").json()["grids"]}["going"]

    before = where()
    assert client.get(f"{before}/zarr.json").status_code == 200
    save_grid(open_grid(client.folder / "grids" / "one.zarr"), path)
    assert client.get(f"{before}/auc/zarr.json").status_code == 404
    assert where() != before and client.get(f"{where()}/auc/zarr.json").status_code == 200


def test_a_grid_that_would_not_fit_is_not_opened(client):
    bomb = client.folder / "grids" / "bomb.zarr"
    save_grid(open_grid(client.folder / "grids" / "one.zarr"), bomb)
    group = zarr.open_group(bomb)
    group.create_array("huge", shape=(1 << 30,), chunks=(1 << 30,), dtype="f8")
    zarr.consolidate_metadata(bomb)
    body = problem(client.get("/v1/captures/cities/grids/bomb"), 503)
    assert "declares" in body["message"] and str(client.folder) not in body["message"]


def test_a_cell_is_what_held_out_gives(client):
    cell = ready(client, f"/v1/captures/cities/grids/one/cell?{AT}&C=0.1")
    found = held_out(client.folder / "lake" / "cities", "mlp_out", **CELL, C=0.1)
    inside = found.where(found.fold >= 0, drop=True)
    assert cell["n"] == inside.sizes["sample"] and cell["C"] == 0.1
    assert cell["auc"] == pytest.approx(found.attrs["auc"]) and cell["fold_auc"] == pytest.approx(found.fold_auc.values)
    assert sum(cell["calibration"]["n"]) == cell["n"]
    assert sum(cell["histogram"]["positive"]) == cell["n_positive"] == int(inside.positive.sum())
    assert cell["roc"]["true"][-1] == cell["roc"]["false"][-1] == 1.0 and cell["roc"]["threshold"][0] is None
    by_key = dict(zip(found.sample.values.tolist(), found.probability.values, strict=True))
    worst = max(p for key, p in by_key.items() if not bool(found.positive.sel(sample=key)) and math.isfinite(p))
    assert cell["alarms"][0]["probability"] == pytest.approx(worst, rel=1e-5)
    for one in cell["alarms"] + cell["missed"]:
        assert one["probability"] == pytest.approx(by_key[one["key"]], rel=1e-5)


def test_tokens_are_scored_by_the_probe_that_did_not_see_the_sample(client):
    capture = open_capture(client.folder / "lake" / "cities")
    found = held_out(capture, "mlp_out", **CELL, C=0.1)
    table = capture.samples()
    rows = [int(np.flatnonzero(found.fold.values >= 0)[3]), int(np.flatnonzero(found.fold.values < 0)[0])]
    for row in rows:
        key, fold = capture.keys[row], int(found.fold[row])
        scores = ready(client, f"/v1/captures/cities/samples/{key}/scores?grid=one&{AT}&C=0.1")
        index = table["token_index"][row].as_py()
        assert [t["token_index"] for t in scores["tokens"]] == sorted({i for i in index if i >= 0})
        for token in scores["tokens"]:
            for position in token["positions"]:
                x = capture.read("mlp_out", CELL["layer"], position, key, dtype="float32").astype(float)
                each = found.coef.values @ x + found.intercept.values
                assert token["score"] == pytest.approx(each[fold] if fold >= 0 else each.mean(), rel=1e-6)
                if position == CELL["position"] and fold >= 0:
                    assert token["probability"] == pytest.approx(float(found.probability[row]), rel=1e-6)
        assert ("do not hold this sample" in scores["probe"]) == (fold >= 0)


def test_every_token_with_a_row_is_scored_where_tokens_were_captured(tmp_path):
    from hiddenlake.cache.store.backend import open_backend
    from hiddenlake.cache.testing import small
    from hiddenlake.probing.probe import Probe

    (tmp_path / "lake").mkdir()
    small.write(open_backend(tmp_path / "lake" / "small"), 5, "both", "float32", "none")
    capture = open_capture(tmp_path / "lake" / "small")
    site, layer = capture.coverage.sites[0], capture.coverage.layers[0]
    rng = np.random.default_rng(0)
    probe = Probe(rng.standard_normal(capture.coverage.widths[site]), 0.5, site, layer, "last_q", "correct", "wrong", capture.identity)  # fmt: skip
    probe.save(tmp_path / "lake" / "probes" / "p.safetensors")
    with client_of(tmp_path / "lake") as client:
        key = capture.keys[2]
        scores = client.get(f"/v1/captures/small/samples/{key}/scores", params={"probe": "p"}).json()
    rows = capture.read_tokens(site, layer, key, dtype="float32")
    stored = dict(zip(rows.token_index.tolist(), probe.decision_function(rows.values), strict=True))
    assert {t["token_index"]: t["score"] for t in scores["tokens"] if t["token_index"] in stored} == pytest.approx(
        stored
    )
    positions = {i for i in capture.samples()["token_index"][2].as_py() if i >= 0}
    assert {t["token_index"] for t in scores["tokens"]} == stored.keys() | positions


@pytest.mark.parametrize("samples", [None, [5, 3, 3], "keys"])
def test_a_stored_probe_scores_stored_samples(client, samples):
    capture = open_capture(client.folder / "lake" / "cities")
    samples = capture.keys[10:13] if samples == "keys" else samples
    body = {"capture": "cities"} | ({"samples": samples} if samples else {})
    found = client.post("/v1/probes/best:score", json=body).json()
    expected = score_capture(load_probe(client.folder / "probes" / "best.safetensors"), capture)
    order = found["samples"]
    assert order == (
        capture.keys if samples is None else [capture.keys[s] if isinstance(s, int) else s for s in samples]
    )
    for name in ("score", "probability"):
        values = np.array(found[name], float)
        np.testing.assert_allclose(values, expected[name].sel(sample=order).values, rtol=1e-12)
    assert not found["forced"] and found["positive_class"] == "wrong"


def test_a_probe_of_another_identity_is_refused_unless_forced(client):
    problem(client.post("/v1/probes/best:score", json={"capture": "other"}), 409, "other_identity")
    forced = client.post("/v1/probes/best:score", json={"capture": "other", "force": True}).json()
    assert forced["forced"] and forced["differs"] == ["weights"]
    key = open_capture(client.folder / "lake" / "other").keys[0]
    problem(client.get(f"/v1/captures/other/samples/{key}/scores?probe=best"), 409, "other_identity")
    marked = client.get(f"/v1/captures/other/samples/{key}/scores?probe=best&force=true").json()
    assert "weights" in marked["marked"] and marked["tokens"]


def test_requests_are_bounded(client):
    with client_of(client.folder / "lake", max_read="1KiB") as small:
        problem(small.post("/v1/probes/best:score", json={"capture": "cities"}), 413, "too_large")
        problem(small.get(f"/v1/captures/cities/grids/one/cell?{AT}"), 413, "too_large")
    problem(client.post("/v1/probes/best:score", json={"capture": "cities", "samples": ["nobody"]}), 409)
    problem(client.post("/v1/probes/best:score", json={"capture": "cities", "other": 1}), 422)


def test_a_grid_whose_labels_have_changed_gives_no_cells(client):
    grid = open_grid(client.folder / "grids" / "one.zarr").copy(deep=True)
    grid.auc[:] = 0.123
    save_grid(grid, client.folder / "grids" / "stale.zarr")
    problem(client.get(f"/v1/captures/cities/grids/stale/cell?{AT}&wait=60"), 409, "changed")


def test_a_capture_that_grew_has_no_cells_by_an_older_grid(client):
    grid = open_grid(client.folder / "grids" / "one.zarr")
    save_grid(grid.assign_attrs(n_samples=99), client.folder / "grids" / "older.zarr")
    assert (
        "99 samples" in problem(client.get(f"/v1/captures/cities/grids/older/cell?{AT}"), 409, "no_scores")["message"]
    )


def test_texts_of_tokens_are_those_that_were_stored_or_none(client, demo_model_folder):
    from tokenizers import Tokenizer

    from hiddenlake.probing.service.pieces import pieces

    ids = (
        Tokenizer.from_file(str(demo_model_folder / "tokenizer.json")).encode("Où est 東京?\nIn Japan, of course.").ids
    )
    lake = client.folder / "lake"
    where = lake / "tokenizers" / "made" / "up"
    where.mkdir(parents=True)
    shutil.copy(demo_model_folder / "tokenizer.json", where)
    cut = next(
        n for n in range(len(ids)) if Tokenizer.from_file(str(where / "tokenizer.json")).decode(ids[:n]).endswith("\n")
    )
    found = pieces(ids, cut, "Où est 東京?\n", "In Japan, of course.", "made/up", lake)
    assert (
        found.reason is None
        and len(found.pieces) == len(ids)
        and "".join(found.pieces) == "Où est 東京?\nIn Japan, of course."
    )
    assert pieces(ids, cut, "Where is Tokyo?\n", "In Japan, of course.", "made/up", lake).pieces is None
    for name in ("../../etc", "made/../made/up", "unknown/model"):
        assert pieces(ids, cut, "Où est 東京?\n", "In Japan, of course.", name, lake).pieces is None


def test_the_server_never_loads_torch_and_its_helper_ends_with_it(lake, serve):
    import httpx

    server = serve(lake)
    with httpx.Client(base_url=server.url, auth=("", server.key), timeout=60) as http:
        for url in (
            "/",
            "/page/plotly.min.js",
            "/v1/captures/cities/grids",
            "/v1/captures/cities/grids/one",
            "/v1/probes",
        ):
            assert http.get(url).status_code == 200
        assert http.post("/v1/probes/best:score", json={"capture": "cities"}).status_code == 200
        assert not server.children()
        assert http.get(f"/v1/captures/cities/grids/one/cell?{AT}&wait=60").status_code == 200
        [child] = server.children()
        os.kill(child, signal.SIGKILL)
        assert http.get(f"/v1/captures/cities/grids/one/cell?{AT}").status_code == 200  # remembered
        again = "/v1/captures/cities/grids/one/cell?layer=0&position=-1&wait=60"
        assert http.get(again).status_code == 200  # of a new one
        [child] = server.children()
    assert "libtorch" not in server.libraries() and "sklearn" not in server.libraries()
    server.process.kill()
    deadline = time.monotonic() + 60
    while alive(child):
        assert time.monotonic() < deadline, "the helper outlives its server"
        time.sleep(0.05)


def test_grids_of_the_lake_itself_come_before_those_beside_it(lake):
    save_grid(xr.Dataset(attrs={}), lake / "grids" / "nothing.zarr")
    with client_of(lake) as client:
        assert client.get("/v1/captures/cities/grids").json()["grids"] == []
        assert [c["name"] for c in client.get("/v1/captures").json()["captures"]] == ["cities", "other"]
