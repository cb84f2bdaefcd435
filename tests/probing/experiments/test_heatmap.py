"""The heatmap of a small capture, without an engine."""

import pytest

from hiddenlake.probing.experiments import heatmap as heatmaps
from hiddenlake.probing.experiments.heatmap import by_position, heatmap
from hiddenlake.probing.experiments.places import Place
from hiddenlake.probing.grid import fit_grid, open_grid


@pytest.fixture
def place(tmp_path, monkeypatch, make_capture):
    """Where a capture would lie: here it is in memory."""
    monkeypatch.setattr(heatmaps, "open_capture", lambda path: make_capture())
    return Place(tmp_path, "winobias-small")


def test_a_heatmap_is_saved_and_drawn(place):
    grid, pictures = heatmap(place)
    assert pictures == [place.folder / "winobias-small-mlp_out.png"] and pictures[0].stat().st_size > 10_000
    assert open_grid(place.grid("mlp_out")).auc.equals(grid.auc)
    assert grid.attrs["best_layer"] == 1 and grid.attrs["best_position"] == "exact_answer_last"
    assert 0 < grid.attrs["max_t_p"] <= 1


def test_the_papers_own_fit_is_kept_apart_and_drawn_beside_a_published_grid(place):
    reference = place.folder / "published.csv"
    reference.write_text("layer,exact_answer_last,-1\n0,0.5,0.6\n1,0.9,0.5\n2,0.6,0.6\n")
    heatmap(place)
    grid, pictures = heatmap(place, compat="llmsknow", reference=reference)
    assert grid.attrs["compat"] == "llmsknow"
    assert [picture.name for picture in pictures] == [
        "winobias-small-mlp_out-llmsknow.png", "winobias-small-mlp_out-llmsknow-beside.png"
    ]  # fmt: skip
    assert sorted(path.name for path in (place.folder / "grids").iterdir()) == [
        "winobias-small-mlp_out-llmsknow.zarr", "winobias-small-mlp_out.zarr"
    ]  # fmt: skip


def test_every_column_says_what_it_rests_on(make_capture):
    data = make_capture()
    grid = fit_grid(data, "mlp_out", shuffles=0)
    rows = {row["position"]: row for row in by_position(grid)}
    assert list(rows) == data.position.values.tolist()
    last_q = rows["last_q"]
    wrong, valid = ~data.correct.values, data.exact_answer_valid.values
    assert last_q["n wrong"] == wrong.sum() and last_q["n correct"] == (~wrong).sum()
    assert last_q["valid wrong"] == pytest.approx(valid[wrong].mean(), abs=1e-3)
    best = rows["exact_answer_last"]
    assert best["best layer"] == 1 and best["AUC"] == round(float(grid.auc.max()), 3) and best["valid wrong"] == 1.0


def test_a_column_without_probes_says_why(make_capture):
    data = make_capture(positions=("last_q", "-8"), signal=None)
    rows = {row["position"]: row for row in by_position(fit_grid(data, "mlp_out", shuffles=0))}
    assert "AUC" not in rows["-8"] and rows["-8"]["why not"]
    assert "AUC" in rows["last_q"]
