"""The page says what the grid says, runs nothing but its own scripts, and is refused where it would be wrong."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from hiddenlake.cache.errors import BadInputError, IdentityError, ProbeError
from hiddenlake.cache.store.labels import add_label
from hiddenlake.probing.grid import best_cell, fit_grid, open_grid, save_grid
from hiddenlake.probing.held_out import held_out

pytest.importorskip("plotly")

from hiddenlake.probing.report.page import render, write_report  # noqa: E402

VOID = {"meta", "img", "br", "hr", "link", "input"}


class Parsed(HTMLParser):
    """Tags with their attributes, the texts of each, and the tables by caption."""

    def __init__(self, page: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags, self.texts, self.open, self.tables = [], [], [], {}
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.texts.append("")
        if tag not in VOID:
            self.open.append((tag, len(self.tags) - 1))
        if tag == "table":
            self.rows = []
        elif tag == "tr":
            self.rows.append([])
        elif tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()
        if tag == "table":
            self.tables[self.caption] = self.rows

    def handle_data(self, data):
        for tag, number in self.open:
            self.texts[number] += data
            if tag in ("td", "th"):
                self.rows[-1][-1] += data
            elif tag == "caption":
                self.caption = data

    def named(self, tag: str, **attrs: str) -> list[str]:
        """Texts of a tag with these attributes."""
        return [
            text
            for (name, found), text in zip(self.tags, self.texts, strict=True)
            if name == tag and all(found.get(key) == value for key, value in attrs.items())
        ]


@pytest.fixture(scope="module")
def grid(capture):
    return fit_grid(capture, "mlp_out", C=(0.001, 0.01), shuffles=3)


@pytest.fixture(scope="module")
def page(capture, grid):
    return render(capture, [grid])


@pytest.fixture(scope="module")
def parsed(page):
    return Parsed(page)


def test_the_headline_has_the_numbers_of_the_grid(grid, parsed):
    best = best_cell(grid)
    [text] = parsed.named("p", **{"class": "headline"})
    at = grid.sel(layer=best.layer, position=best.position, C=best.C)
    for words in (
        f"layer {best.layer} and the token {best.position}",
        f"AUC {best.auc:.3f} (95\u00a0% {best.auc_lo:.3f} to {best.auc_hi:.3f})",
        f"{int(at.n_wrong)} wrong and {int(at.n_correct)} correct",
        f"best of {grid.attrs['n_cells']} cells",
        f"never saw is {grid.attrs['nested_auc']:.3f} (95\u00a0% {grid.attrs['nested_auc_lo']:.3f} to ",
        f"gives {float(at.token_auc):.3f} (95\u00a0% {float(at.token_auc_lo):.3f} to {float(at.token_auc_hi):.3f})",
        f"p\u00a0=\u00a0{grid.attrs['max_t_p']:.2g} (max-T), the least that 3 shuffles can give",
    ):
        assert words in text


def test_the_table_and_the_heatmap_have_every_cell(grid, page, parsed):
    best = best_cell(grid)
    at = grid.sel(C=best.C)
    [(_, rows)] = [(name, rows) for name, rows in parsed.tables.items() if name.startswith("AUC (95")]
    assert [name.partition(",")[0] for name in rows[0][1:]] == grid.position.values.tolist()
    drawn = figures(parsed)["grid-1-heatmap"]["data"][0]
    z = np.array(drawn["z"], float)
    for i, layer in enumerate(grid.layer.values.tolist()):
        assert rows[i + 1][0] == str(layer)
        for j, position in enumerate(grid.position.values.tolist()):
            cell = at.sel(layer=layer, position=position)
            k = drawn["x"].index(position)
            text = rows[i + 1][j + 1]
            if np.isfinite(cell.auc):
                assert text == f"{float(cell.auc):.3f} ({float(cell.auc_lo):.3f} to {float(cell.auc_hi):.3f})"
                assert z[i, k] == pytest.approx(float(cell.auc), rel=1e-5)
                assert f"95 % {float(cell.auc_lo):.3f} to {float(cell.auc_hi):.3f}" in drawn["text"][i][k]
            else:
                assert text == "none" and np.isnan(z[i, k])
            assert f"n {int(cell.n)}: {int(cell.n_wrong)} wrong, {int(cell.n_correct)} correct" in drawn["text"][i][k]


def figures(parsed: Parsed) -> dict:
    ids = [found["id"] for name, found in parsed.tags if name == "script" and "id" in found]
    return {name: json.loads(parsed.named("script", id=name)[0]) for name in ids}


def test_the_held_out_scores_are_those_of_the_grid(capture, grid, parsed):
    best = best_cell(grid)
    scores = held_out(capture, "mlp_out", best.layer, best.position, C=best.C)
    inside = np.isfinite(scores.probability.values)
    drawn = figures(parsed)
    assert sum(sum(map(abs, bar["y"])) for bar in drawn["grid-1-spread"]["data"]) == inside.sum()
    curve = [one for one in drawn["grid-1-roc"]["data"] if one.get("name") == "all folds together"]
    area = np.trapezoid(curve[0]["y"], curve[0]["x"])
    # The same samples; folds together are compared across probes.
    assert area == pytest.approx(best.auc, abs=0.03)
    at = grid.sel(layer=best.layer, position=best.position, C=best.C)
    assert f"ECE {float(at.ece):.3f}" in "".join(parsed.named("figcaption"))
    bins = parsed.tables["Bins of equally many samples"]
    assert sum(int(row[-1]) for row in bins[1:]) == inside.sum() and len(bins) == 11


def test_the_most_wrong_come_first_with_their_texts(capture, grid, parsed):
    best = best_cell(grid)
    scores = held_out(capture, "mlp_out", best.layer, best.position, C=best.C)
    scores = scores[["probability", "positive"]].to_dataframe().dropna()
    alarms, missed = (scores[scores.positive == side].probability for side in (False, True))
    alarms, missed = alarms.nlargest(10), missed.nsmallest(10)
    assert alarms.max() > missed.min()
    lists = [
        text for (tag, found), text in zip(parsed.tags, parsed.texts, strict=True) if found.get("class") == "examples"
    ]
    for text, expected, label in zip(lists, (alarms, missed), ("correct", "wrong"), strict=True):
        shown = re.findall(r"(0\.\d{3}), (correct|wrong)", text)
        assert shown == [(f"{p:.3f}", label) for p in expected]
        assert re.findall(r"key (key\w+)", text) == expected.index.tolist()
    rows = {row["key"]: row for row in capture.samples().to_pylist()}
    for key, mark in zip(re.findall(r"key (key\w+)", "".join(lists)), parsed.named("mark"), strict=True):
        # Marked as it stands in the answer, whatever the case of what was extracted.
        assert mark == f"exact answer: <b>Exact {rows[key]['index']}</b>"


def test_hostile_texts_are_texts(page, parsed):
    assert "<script>alert" not in page and "onerror=alert(1)>" not in page and "49" not in parsed.named("title")[0]
    assert [found for tag, found in parsed.tags if any(name.startswith("on") for name in found)] == []
    assert {tag for tag, _ in parsed.tags} <= {
        "html", "head", "meta", "title", "style", "body", "header", "h1", "h2", "h3", "h4", "p", "dl", "dt", "dd", "nav", "ul",
        "ol", "li", "a", "main", "section", "div", "img", "figure", "figcaption", "script", "details", "summary", "table",
        "caption", "thead", "tbody", "tr", "th", "td", "pre", "code", "mark", "span", "strong",
    }  # fmt: skip
    assert parsed.open == []
    assert any("{{ 7 * 7 }}" in text for text in parsed.named("pre"))
    # Data of figures cannot end their own tag, whatever they hold.
    for one in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', page, re.S):
        assert not re.search("[<>&]", one)


def test_nothing_is_loaded_and_only_our_scripts_run(parsed):
    for tag, found in parsed.tags:
        for name in ("src", "srcset", "href", "action", "data", "poster", "background"):
            value = found.get(name)
            assert value is None or value.startswith(("#", "data:image/png;base64,")), (tag, name, value[:80])
        assert tag not in ("link", "iframe", "object", "embed", "base", "form")
    style = "".join(parsed.named("style"))
    assert "@import" not in style and "url(" not in style
    [policy] = [found["content"] for tag, found in parsed.tags if found.get("http-equiv") == "Content-Security-Policy"]
    assert "default-src 'none'" in policy and "unsafe-eval" not in policy
    [allowed] = re.findall(r"script-src ([^;]*)", policy)
    scripts = [
        text for (tag, found), text in zip(parsed.tags, parsed.texts, strict=True) if tag == "script" and not found
    ]
    hashes = [f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" for text in scripts]
    assert allowed.split() == hashes and len(hashes) == 2


def test_it_can_be_read_without_scripts_and_without_eyes(parsed):
    plots = [found for _, found in parsed.tags if found.get("class") == "plot"]
    assert len(plots) == 5 and all(found["role"] == "img" and len(found["aria-label"]) > 20 for found in plots)
    [picture] = [found for tag, found in parsed.tags if tag == "img"]
    assert base64.b64decode(picture["src"].partition(",")[2]).startswith(b"\x89PNG") and picture["alt"]
    assert ("html", {"lang": "en"}) in parsed.tags and len(parsed.named("h1")) == 1
    levels = [int(tag[1]) for tag, _ in parsed.tags if re.fullmatch("h[1-6]", tag)]
    assert all(b <= a + 1 for a, b in zip(levels, levels[1:], strict=False))
    ids = [found["id"] for _, found in parsed.tags if "id" in found]
    assert len(set(ids)) == len(ids)
    links = {found["href"][1:] for tag, found in parsed.tags if tag == "a"}
    assert links <= set(ids) and {"grid-1", "made", "words"} <= links
    assert all(found.get("scope") in ("col", "row") for tag, found in parsed.tags if tag == "th")


def test_how_it_was_made(capture, grid, parsed):
    text = "".join(parsed.named("section", **{"aria-labelledby": "made"}))
    for words in (
        grid.attrs["identity"], f"within {grid.attrs['max_relative_gap']:.1e} of its optimum", "--max-new-tokens 8",
        "--engine transformers", "hiddenlake report lake/made --grid grids/mlp_out.zarr", "no result of `hiddenlake verify`",
    ):  # fmt: skip
        assert words in text
    [typed] = [one for one in parsed.named("code") if "fit_grid" in one]
    call = re.search(r"fit_grid\((.*)\)", typed)[1]
    again = eval(f"fit_grid({call})", {"fit_grid": fit_grid, "capture": capture})
    np.testing.assert_allclose(again.auc, grid.auc, rtol=1e-9)
    assert again.sizes == grid.sizes


def test_several_grids_have_parts_of_their_own(capture, grid, tmp_path):
    some = fit_grid(capture, "mlp_out", layers=[1], positions=["-1", "last_q"], groups="gold", shuffles=0)
    saved = [save_grid(one, tmp_path / f"{i}.zarr") for i, one in enumerate((grid, some))]
    parsed = Parsed(write_report(str(capture.path), saved, tmp_path / "deep" / "page.html").read_text("utf-8"))
    assert len(parsed.named("h2")) == 4 and len(figures(parsed)) == 10
    heads = parsed.named("p", **{"class": "headline"})
    assert "No shuffled labels were fitted" in heads[1] and "3 shuffles" in heads[0]
    assert "groups: gold" in parsed.named("h2")[1]
    assert not list((tmp_path / "deep").glob(".*"))
    assert open_grid(saved[1]).attrs["groups"] == "gold"


def test_the_papers_probe_has_no_held_out_scores(capture):
    parsed = Parsed(render(capture, [fit_grid(capture, "mlp_out", compat="llmsknow")]))
    assert set(figures(parsed)) == {"grid-1-heatmap", "grid-1-curves"}
    assert "With compat llmsknow there is one validation set" in "".join(parsed.named("p"))


def test_a_label_with_gaps(store_capture, make_capture, tmp_path):
    made = store_capture(tmp_path / "lake" / "gaps", make_capture(n=240), correct=[None] * 240)
    with pytest.raises(ProbeError, match="no sample has a value of 'correct'"):
        fit_grid(made, "mlp_out")
    values = make_capture(n=240).correct.values
    table = "key,sure\n" + "\n".join(f"{key},{int(values[i])}" for i, key in enumerate(made.keys) if i % 4)
    (tmp_path / "sure.csv").write_text(table + "\n")
    add_label(made, "sure", tmp_path / "sure.csv")
    grid = fit_grid(made, "mlp_out", label="sure")
    parsed = Parsed(render(made, [grid]))
    assert "tells positive from negative samples" in parsed.named("p", **{"class": "headline"})[0]
    pairs = dict(zip(parsed.named("dt"), parsed.named("dd"), strict=True))
    assert pairs["accuracy"] == "the task has no right or wrong" and pairs["n_unlabelled"] == "60"


def test_one_class_is_refused(store_capture, make_capture, tmp_path):
    made = store_capture(tmp_path / "one", make_capture(n=60), correct=[True] * 60)
    with pytest.raises(ProbeError, match="all 60 samples are of one class"):
        fit_grid(made, "mlp_out")


def test_a_grid_of_another_capture_is_refused(capture, grid, store_capture, make_capture, tmp_path):
    other = store_capture(tmp_path / "other", make_capture(n=300), {"model": "another"})
    with pytest.raises(IdentityError, match="another identity"):
        render(other, [grid])
    fewer = store_capture(tmp_path / "fewer", make_capture(n=200))
    with pytest.raises(IdentityError, match=r"on 300 samples, and .* holds 200"):
        render(fewer, [grid])
    with pytest.raises(IdentityError, match="does not say its identity"):
        render(capture, [grid.drop_attrs()])
    # As many samples of the same identity, whose labels are others: only the numbers can tell.
    relabelled = store_capture(
        tmp_path / "relabelled", make_capture(n=300), correct=(~make_capture(n=300).correct.values[::-1]).tolist()
    )
    with pytest.raises(ProbeError, match="changed since"):
        render(relabelled, [grid])


def test_bad_names_are_refused_before_anything_is_read(tmp_path):
    with pytest.raises(BadInputError, match=r"page.pdf: expected a file whose name ends in .html"):
        write_report(tmp_path / "nowhere", [], tmp_path / "page.pdf")
    with pytest.raises(BadInputError, match="a report of no grid"):
        write_report(tmp_path / "nowhere", [], tmp_path / "page.html")
