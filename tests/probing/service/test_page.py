"""The page in a real Chromium, over a real server: what a reader sees, by pointer and by keyboard, and what leaves the page."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from hiddenlake.cache.store.reader import open_capture

from .conftest import CELL, HOSTILE, Server

pytest.importorskip("playwright.sync_api")
CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no chromium: apt-get install chromium")

CAPTURE = "#/captures/cities"
AT = f"layer={CELL['layer']}&position={CELL['position']}"


@pytest.fixture(scope="module")
def server(written_lake, tmp_path_factory) -> Iterator[Server]:
    folder = tmp_path_factory.mktemp("served")
    shutil.copytree(written_lake, folder / "copy")
    running = Server(folder / "copy" / "lake", folder / "log")
    yield running
    running.stop()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


@dataclass
class Reader:
    """A page with somebody in front of it. wrong : what no page may do."""

    page: Any
    server: Server
    wrong: list[str] = field(default_factory=list)

    def open(self, place: str = "") -> Any:
        # What is after "#" alone makes no new page: what is waited for would be found on the one before.
        self.page.goto("about:blank")
        self.page.goto(f"{self.server.url}/{place}")
        self.page.locator("main h1").wait_for()
        return self.page

    def get(self, path: str, **params: Any) -> Any:
        """The same server, asked without a browser."""
        response = httpx.get(f"{self.server.url}{path}", params=params, auth=("", self.server.key), timeout=60)
        assert response.status_code == 200, response.text
        return response.json()

    def listen(self) -> None:
        origin = urlsplit(self.server.url).netloc
        page = self.page
        page.on("console", lambda said: said.type in ("error", "warning") and self.wrong.append(said.text))
        page.on("pageerror", lambda error: self.wrong.append(str(error)))
        page.on("requestfailed", lambda asked: "ABORTED" in (asked.failure or "") or self.wrong.append(asked.url))
        page.on("response", lambda answer: answer.status >= 400 and answer.status != 401 and self.wrong.append(f"{answer.status} {answer.url}"))  # fmt: skip
        page.on("dialog", lambda dialog: (self.wrong.append(dialog.message), dialog.dismiss()))

        def asked(request: Any) -> None:
            if urlsplit(request.url).netloc != origin and urlsplit(request.url).scheme not in ("data", "blob"):
                self.wrong.append(f"asked for {request.url}")

        page.on("request", asked)
        page.expose_function("violated", lambda what: self.wrong.append(f"policy: {what}"))
        page.add_init_script(
            "addEventListener('securitypolicyviolation', (e) => violated(e.violatedDirective + ' ' + e.blockedURI))"
        )


@pytest.fixture
def reader(server, browser) -> Iterator[Callable[..., Reader]]:
    """reader(**settings of the browser's context) -> Reader, of whom nothing went wrong when the test ends."""
    made = []

    def make(at: Server = server, **settings: Any) -> Reader:
        settings = {"viewport": {"width": 1200, "height": 900}} | settings
        context = browser.new_context(http_credentials={"username": "reader", "password": at.key}, **settings)
        made.append((context, Reader(context.new_page(), at)))
        made[-1][1].listen()
        return made[-1][1]

    yield make
    for context, one in made:
        context.close()
        assert one.wrong == []


def cell_of(page: Any, layer: int, position: str, table: int = 0) -> Any:
    return page.locator("table.heat").nth(table).locator(f'td[aria-label^="layer {layer}, {position}, "]')


def test_what_is_listed_by_this_check_is_found_by_it(reader):
    """A page that does what no page may is noticed: the checks of all other tests rest on this."""
    one = reader()
    page = one.open()
    page.evaluate("""() => {
        for (const make of [() => eval("1"), () => fetch("http://127.0.0.2:9/"), () => console.error("told")]) try { make(); } catch {}
        document.body.append(Object.assign(document.createElement("script"), {textContent: "1"}));
    }""")
    page.wait_for_timeout(300)
    found = "\n".join(one.wrong)
    assert "script-src" in found and "connect-src" in found and "told" in found
    one.wrong.clear()


def test_captures_with_size_and_state(reader):
    page = reader().open()
    rows = page.locator("tbody tr")
    assert rows.count() == 2  # `theirs` is another tenant's
    text = rows.nth(0).inner_text()
    assert "cities" in text and "160" in text and "3 x 8" in text and "complete" in text and " KB" in text
    page.get_by_role("link", name="cities").click()
    page.locator("table.heat").wait_for()
    assert page.url.endswith(CAPTURE)


def test_the_heatmap_says_what_the_grid_says(reader):
    one = reader()
    page = one.open(CAPTURE)
    grid = one.get("/v1/captures/cities/grids/one")
    assert page.locator("table.heat td").count() == len(grid["layers"]) * len(grid["positions"])
    row, column = grid["layers"].index(1), grid["positions"].index("exact_answer_first")
    at = {name: values[row][column] for name, values in grid["values"].items()}
    cell = cell_of(page, 1, "exact_answer_first")
    cell.hover()
    tip = page.locator("#tip")
    tip.wait_for()
    text = tip.inner_text().replace("\xa0", " ")
    assert f"AUC {at['auc']:.3f} (95 % {at['auc_lo']:.3f} to {at['auc_hi']:.3f})" in text
    assert f"n {at['n']}: {at['n_wrong']} wrong, {at['n_correct']} correct" in text
    assert f"token alone: AUC {at['token_auc']:.3f}" in text
    page.mouse.move(1, 1)
    tip.wait_for(state="hidden")
    box = page.locator("table.heat td.best").get_attribute("aria-label")
    assert box.startswith(f"layer {grid['best']['layer']}, {grid['best']['position']}, ")
    caption = page.locator("figcaption").first.inner_text()
    for said in (
        "mlp_out",
        "wrong",
        "label correct",
        "group",
        f"C = {grid['C']:g}",
        f"of {grid['n_samples']} samples",
        "95 %",
    ):
        assert said in caption
    darker, lighter = (cell_of(page, *where) for where in ((1, "exact_answer_last"), (0, "exact_answer_last")))
    colours = [sum(map(int, re.findall(r"\d+", c.evaluate("e => getComputedStyle(e).backgroundColor.replace(/[\\d.]+/g, v => v.includes('.') ? Math.round(v * 255) : v)")))) for c in (darker, lighter)]  # fmt: skip
    assert colours[0] < colours[1]


def test_metric_C_and_grid_are_switched_and_the_back_button_undoes_it(reader):
    one = reader()
    page = one.open(CAPTURE)
    page.get_by_label("metric", exact=True).select_option("brier")
    page.locator('table[aria-label="brier of one"]').wait_for()
    page.get_by_label("C", exact=True).select_option("0.01")
    page.wait_for_url("**C=0.01*")
    page.locator("figcaption", has_text="C = 0.01;").wait_for()
    brier = one.get("/v1/captures/cities/grids/one", C=0.01, metric="brier")["values"]["brier"]
    assert f"brier: {float(f'{brier[0][0]:.4g}'):g}" in cell_of(page, 0, "last_q").get_attribute("aria-label")
    page.get_by_label("grid", exact=True).select_option("two")
    page.locator('table[aria-label="brier of two"]').wait_for()
    page.go_back()
    page.locator('table[aria-label="brier of one"]').wait_for()
    page.go_back()
    page.go_back()
    page.locator('table[aria-label="auc of one"]').wait_for()


def test_two_grids_are_compared_on_one_scale(reader):
    one = reader()
    page = one.open(CAPTURE)
    page.get_by_label("compare with").select_option("two")
    page.locator("table.heat").nth(2).wait_for()
    first, second = (one.get(f"/v1/captures/cities/grids/{name}") for name in ("one", "two"))
    assert page.locator("table.heat").nth(2).locator("tbody tr").count() == 2  # `two` has two of the three layers
    row, column = second["layers"].index(1), second["positions"].index("-1")
    a, b = first["values"]["auc"][1][column], second["values"]["auc"][row][column]
    label = cell_of(page, 1, "-1", table=2).get_attribute("aria-label")
    assert float(label.rpartition(": ")[2]) == pytest.approx(a - b, abs=1e-4)
    cell_of(page, 1, "-1", table=1).click()
    page.locator("#cell .js-plotly-plot").nth(2).wait_for()
    assert "of=two" in page.url
    shown = page.locator("#cell p").first.inner_text().replace("\xa0", " ")
    assert shown.startswith(f"AUC {b:.3f}")


def test_a_cell_a_sample_and_back(reader):
    one = reader()
    page = one.open(CAPTURE)
    cell_of(page, **CELL).click()
    page.locator("#cell .js-plotly-plot .main-svg").nth(2).wait_for()
    page.wait_for_url(f"**{AT}*")
    cell = one.get("/v1/captures/cities/grids/one/cell", **CELL, wait=60)
    words = page.locator("#cell p").first.inner_text().replace("\xa0", " ")
    assert (
        f"AUC {cell['auc']:.3f}" in words
        and f"n {cell['n']}: {cell['n_positive']} wrong" in words
        and "The token alone" in words
    )
    assert f"ECE {cell['calibration']['ece']:.3f}" in page.locator("#cell").inner_text()
    worst = page.locator("#cell .examples li").first
    assert worst.locator("strong").inner_text() == f"{cell['alarms'][0]['probability']:.3f}"
    answer = one.get(f"/v1/captures/cities/samples/{cell['alarms'][0]['key']}")["answer"]
    assert worst.locator(".answer").inner_text().replace("exact answer:", "").strip() == answer
    drawn = page.locator("#cell .plot").first.evaluate("e => e.data.at(-1).x")
    assert drawn == cell["roc"]["false"]
    worst.get_by_role("link").click()
    page.locator(".token.scored").first.wait_for()
    key = cell["alarms"][0]["key"]
    scores = one.get(f"/v1/captures/cities/samples/{key}/scores", grid="one", **CELL, C=cell["C"])
    assert page.locator("button.token.scored").count() == len(scores["tokens"])
    sample = one.get(f"/v1/captures/cities/samples/{key}")
    assert page.locator(".token").count() == sample["total_length"]
    page.locator("button.token.scored").last.hover()
    tip = page.locator("#tip")
    tip.wait_for()
    assert f"probability of wrong {scores['tokens'][-1]['probability']:.3f}" in tip.inner_text()
    assert "do not hold this sample" in page.locator("main").inner_text()
    page.get_by_label("layer", exact=True).select_option("0")
    page.locator("caption", has_text="layer 0 of mlp_out").wait_for()
    page.go_back()
    page.locator("caption", has_text="layer 1 of mlp_out").wait_for()
    page.go_back()
    page.locator("#cell .js-plotly-plot").nth(2).wait_for()
    page.go_back()
    page.locator("#cell h2").wait_for(state="detached")
    assert page.locator("table.heat").is_visible()


def test_a_stored_probe_colours_a_sample(reader):
    one = reader()
    key = open_capture(one.server.lake / "cities").keys[5]
    page = one.open(f"{CAPTURE}/samples/{key}")
    page.get_by_label("scored by").select_option("probe best")
    page.get_by_text("Scored by the stored probe best").wait_for()
    score = one.get(f"/v1/captures/cities/samples/{key}/scores", probe="best")["tokens"][0]
    assert f"{score['probability']:.3f}" in page.locator("main table").inner_text()


def test_by_keyboard_alone(reader):
    one = reader()
    page = one.open()

    def tab_to(what: str) -> None:
        for _ in range(40):
            page.keyboard.press("Tab")
            if page.evaluate("s => document.activeElement.matches(s)", what):
                return
        raise AssertionError(f"{what} is not reached")

    tab_to('a[href="#/captures/cities"]')
    page.keyboard.press("Enter")
    page.locator("table.heat").wait_for()
    tab_to("table.heat td")
    assert page.evaluate("document.activeElement.classList.contains('best')")
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    for key in ("Home", "PageUp", "ArrowDown", "ArrowRight"):
        page.keyboard.press(key)
    positions = one.get("/v1/captures/cities/grids/one")["positions"]
    focused = page.evaluate("document.activeElement.getAttribute('aria-label')")
    assert focused.startswith(f"layer 1, {positions[1]}, ")
    assert page.locator("#tip").is_visible()
    page.keyboard.press("Enter")
    page.locator("#cell .js-plotly-plot").nth(2).wait_for()
    assert page.evaluate("document.activeElement.getAttribute('aria-label')") == focused
    assert page.locator("#said").inner_text().startswith(f"Layer 1, {positions[1]}: AUC")
    tab_to("#cell a")
    page.keyboard.press("Enter")
    page.locator("button.token.scored").first.wait_for()
    tab_to("button.token")
    assert page.locator("#tip").is_visible()
    page.keyboard.press("Escape")
    assert not page.locator("#tip").is_visible()


def test_texts_are_texts(reader):
    one = reader()
    capture = open_capture(one.server.lake / "cities")
    key = capture.keys[capture.samples()["group"].to_pylist().index(HOSTILE)]
    page = one.open(f"{CAPTURE}/samples/{key}")
    page.locator("button.token.scored").first.wait_for()
    assert page.locator("dd", has_text=HOSTILE).count() == 1
    page.locator("summary").first.click()
    assert HOSTILE in page.locator("pre.prompt").inner_text()
    page = one.open(f"{CAPTURE}?text=onerror")
    page.locator("#samples ~ * caption", has_text="1 to 1 of 1").wait_for()
    assert page.locator("main img").count() == 0 and page.locator("#samples ~ * tbody tr").count() == 1


def test_samples_are_searched_and_turned(reader):
    one = reader()
    page = one.open(CAPTURE)
    page.get_by_role("button", name="Later").click()
    page.locator("caption", has_text="11 to 20 of 160").wait_for()
    page.get_by_label("correct", exact=True).select_option("false")
    wrong = one.get("/v1/captures/cities/samples", label="correct", value="false", limit=1)["total"]
    page.locator("caption", has_text=f"1 to 10 of {wrong},").wait_for()
    page.get_by_label("prompt or answer contains").fill("prompt of city 77")
    page.keyboard.press("Enter")
    page.wait_for_url("**city*77*")


def test_a_server_that_refuses_is_quoted(reader):
    one = reader()
    page = one.open("#/captures/nothing")
    assert "there is no such capture" in page.locator("[role=alert]").inner_text()
    assert all("404" in told for told in one.wrong)
    one.wrong.clear()


@pytest.mark.parametrize("scheme", ["dark", "light"])
def test_on_a_narrow_screen(reader, tmp_path, scheme):
    """390 pixels, reduced motion: nothing is wider than the screen."""
    one = reader(viewport={"width": 390, "height": 844}, color_scheme=scheme, reduced_motion="reduce")
    key = open_capture(one.server.lake / "cities").keys[7]
    for number, (place, what) in enumerate((
        ("", "table"), (f"{CAPTURE}?grid=one&with=two&{AT}", "#cell .js-plotly-plot"), (f"{CAPTURE}/samples/{key}", ".token.scored"),
    )):  # fmt: skip
        page = one.open(place)
        page.locator(what).first.wait_for()
        assert page.evaluate("document.documentElement.scrollWidth") <= 390
        ink, paper = page.evaluate(
            "['color', 'backgroundColor'].map(n => Number(getComputedStyle(document.body)[n].match(/\\d+/)[0]))"
        )
        assert (ink > paper) == (scheme == "dark")
        shot = Path(tmp_path / f"{number}.png")
        page.screenshot(path=shot, full_page=True)
        assert shot.stat().st_size > 10_000
    page.emulate_media(color_scheme="light" if scheme == "dark" else "dark")


def test_figures_follow_the_colours(reader):
    one = reader(color_scheme="light")
    page = one.open(f"{CAPTURE}?grid=one&{AT}")
    page.locator("#cell .js-plotly-plot").nth(2).wait_for()
    colour = "document.querySelector('#cell .plot').layout.font.color"
    light = page.evaluate(colour)
    page.emulate_media(color_scheme="dark")
    # Not by wait_for_function, which asks again by eval, and that the page's policy forbids.
    for _ in range(100):
        if page.evaluate(colour) != light:
            break
        page.wait_for_timeout(50)
    assert page.evaluate(colour) != light


@pytest.fixture
def worker(server, tiny_model, tmp_path):
    options = "--engine transformers --max-prompt 64 --max-new-tokens 16 --sites mlp_out --shard-samples 4 --publish 0.2 --buffer-bytes 64MiB"
    with (tmp_path / "worker").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "hiddenlake.cli", "worker", str(server.lake), "--model", str(tiny_model), *options.split()],
            stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        )  # fmt: skip
    yield process
    process.terminate()
    process.wait(60)


@pytest.mark.slow
def test_a_job_is_followed_to_its_end(reader, server, worker):
    one = reader()
    page = one.open()
    page.get_by_role("link", name="Jobs").click()
    page.get_by_text("Nothing was asked for").wait_for()
    ask = {
        "inputs": [{"messages": [{"role": "user", "content": f"Name the number {i}."}]} for i in range(6)],
        "sites": ["mlp_out"], "positions": ["last_q", "-1"], "generation": {"max_new_tokens": 4},
    }  # fmt: skip
    for _ in range(240):  # until the worker has said what it can compute
        answer = httpx.post(f"{server.url}/v1/activations:resolve", json=ask, auth=("", server.key), timeout=60)
        if answer.status_code == 202:
            break
        assert worker.poll() is None
        page.wait_for_timeout(500)
    job = answer.json()["job"]
    row = page.locator("tbody tr", has_text=job)
    row.wait_for()
    assert row.locator("progress").get_attribute("max") == "6"
    row.get_by_text("6 of 6").wait_for(timeout=120_000)
    page.locator("tbody tr", has_text=job).get_by_text("done").wait_for()
    assert row.locator("progress").evaluate("e => e.value") == 6
