"""Pictures exist in every format, and say what they show."""

import numpy as np
import pytest
from matplotlib.patches import Rectangle

from hiddenlake.cache.errors import BadInputError, ProbeError, UnknownNameError
from hiddenlake.probing import plots
from hiddenlake.probing.grid import fit_grid
from hiddenlake.probing.plots import draw_comparison, draw_heatmap

MAGIC = {".png": b"\x89PNG", ".svg": b"<?xml", ".pdf": b"%PDF"}


@pytest.fixture(scope="module")
def grid(make_capture):
    return fit_grid(make_capture(positions=("last_q", "exact_answer_last", "-8", "-1")), "mlp_out", C=(0.01, 0.1))


@pytest.fixture
def figures(monkeypatch):
    """The figures that were drawn, kept as they are saved."""
    kept, save = [], plots._save
    monkeypatch.setattr(plots, "_save", lambda figure, path: kept.append(figure) or save(figure, path))
    return kept


@pytest.mark.parametrize("suffix", MAGIC)
def test_every_format(grid, tmp_path, suffix):
    path = draw_heatmap(grid, tmp_path / "pictures" / f"grid{suffix}")
    assert path.read_bytes().startswith(MAGIC[suffix])


def test_the_picture_says_what_was_fitted(grid, tmp_path, figures):
    draw_heatmap(grid, tmp_path / "grid.png")
    ax = figures[0].axes[0]
    image = ax.images[0]
    assert (image.cmap.name, image.norm.vmin, image.norm.vmax) == ("Blues", 0.5, 1.0)
    assert [t.get_text() for t in ax.get_xticklabels()] == ["last_q", "exact_answer_last", "-8", "-1"]
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("Token", "Layer")
    assert ax.get_title(loc="left") == "synthetic/model\nsynthetic · mlp_out"
    boxes = [p for p in ax.patches if isinstance(p, Rectangle) and not p.get_fill()]
    assert [box.get_xy() for box in boxes] == [(0.5, 0.5)]  # column 1, layer 1
    # -8 is never in an answer of at most 6 tokens.
    assert sum(p.get_hatch() is not None for p in ax.patches) == 3
    caption = figures[0].texts[0].get_text().replace("\n", " ")
    for words in (
        "layer 1, exact_answer_last",
        "5-fold",
        "groups: group (240)",
        "token identity alone (embed)",
        "Chosen on inner folds",
        "Shuffled labels: mean",
        "Certificate: every probe",
        "Hatched: 3 cells",
        "Best of 9 cells",
    ):
        assert words in caption


def test_nothing_is_clipped_and_nothing_overlaps(grid, tmp_path, figures):
    draw_heatmap(grid, tmp_path / "grid.png")
    figure = figures[0]
    renderer = figure.canvas.get_renderer()
    caption = figure.texts[0].get_window_extent(renderer)
    axes = figure.axes[0].get_tightbbox(renderer)
    assert caption.y1 <= axes.y0
    assert caption.x1 <= figure.bbox.x1 * 1.02


def test_a_published_probe_says_so(make_capture, tmp_path, figures):
    draw_heatmap(fit_grid(make_capture(n=300), "mlp_out", compat="llmsknow"), tmp_path / "grid.png")
    caption = figures[0].texts[0].get_text().replace("\n", " ")
    assert "compat llmsknow" in caption and "not converged" in caption and "takes the last token" in caption


def test_a_comparison_aligns_and_hatches(grid, tmp_path, figures):
    rows = [f"{layer},{0.5 + 0.01 * layer},0.7" for layer in range(5)]
    (tmp_path / "paper.csv").write_text("\n".join(["layer,-1,first_answer", *rows]) + "\n")
    path = draw_comparison(grid, tmp_path / "paper.csv", tmp_path / "both.svg")
    assert path.read_bytes().startswith(b"<?xml")
    panels = [ax for ax in figures[0].axes if ax.get_xlabel() == "Token"]
    assert len(panels) == 3 and all(ax.images[0].get_array().shape == (5, 5) for ax in panels)
    difference = np.ma.filled(panels[2].images[0].get_array(), np.nan)
    assert int(np.isfinite(difference).sum()) == 3
    norm = panels[2].images[0].norm
    assert norm.vmin == -norm.vmax
    caption = figures[0].texts[0].get_text().replace("\n", " ")
    assert "3 layers here, 5 published" in caption and "3 cells are in both" in caption


def test_bad_input_is_refused_in_a_sentence(grid, tmp_path, make_capture):
    with pytest.raises(UnknownNameError, match="cannot draw 'grid.jpg': the suffix says the format, expected .svg"):
        draw_heatmap(grid, tmp_path / "grid.jpg")
    with pytest.raises(UnknownNameError, match="no metric 'loudness': it has accuracy, auc, "):
        draw_heatmap(grid, tmp_path / "grid.png", metric="loudness")
    (tmp_path / "other.csv").write_text("layer,first_answer\n7,0.5\n")
    with pytest.raises(BadInputError, match="share no cell"):
        draw_comparison(grid, tmp_path / "other.csv", tmp_path / "both.png")
    empty = fit_grid(make_capture(n=60, positions=("-8",), signal=None), "mlp_out")
    with pytest.raises(ProbeError, match="no cell of 3 x 1 was fitted"):
        draw_heatmap(empty, tmp_path / "empty.png")
