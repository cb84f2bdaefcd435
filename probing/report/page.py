"""Page: one HTML file of a capture and its grids, which asks the network for nothing and runs no script but its own."""

import base64
import hashlib
import os
import uuid
from contextlib import suppress
from datetime import UTC, datetime
from importlib.metadata import version
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path

import xarray as xr

from hiddenlake.cache.errors import BadInputError, HiddenlakeError, StoreError
from hiddenlake.cache.identity import digest
from hiddenlake.cache.store.reader import Capture, open_capture
from hiddenlake.probing.grid import open_grid


def write_report(capture: str | Path | Capture, grids: list[xr.Dataset | str | Path], out: str | Path) -> Path:
    """Write the page of a capture: what probes found in it, with controls, curves, calibration, the samples that they get
    most wrong, and how it was made.

    grids : from fit_grid, or paths of saved ones, each fitted on this capture; every one gets a part of its own.
    out : the .html file.

    Returns the path. Raises IdentityError for a grid of another capture, ProbeError where nothing was fitted,
    HiddenlakeError where Plotly or Jinja2 is missing, and what reading raises.
    """
    out = check_ready(out)
    if not grids:
        raise BadInputError("a report of no grid: give one that fit_grid made")
    capture = capture if isinstance(capture, Capture) else open_capture(capture)
    opened = [grid if isinstance(grid, xr.Dataset) else open_grid(grid) for grid in grids]
    page = render(capture, opened)
    new = out.with_name(f".{out.name}.{uuid.uuid4().hex[:8]}.new")
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        new.write_text(page, "utf-8", newline="\n")
        os.replace(new, out)
    except OSError as error:
        raise StoreError(f"{out}: {error.strerror or error}: the report was not written") from error
    finally:
        with suppress(OSError):
            new.unlink()
    return out


def check_ready(out: str | Path) -> Path:
    """The page's path, where a page could be made: asked before anything long is. Raises BadInputError, HiddenlakeError."""
    out = Path(out)
    if out.suffix != ".html":
        raise BadInputError(f"{out}: expected a file whose name ends in .html")
    if missing := [name for name in ("jinja2", "plotly") if find_spec(name) is None]:
        raise HiddenlakeError(f"{' and '.join(missing)} not installed: pip install 'hiddenlake[report]'")
    return out


def render(capture: Capture, grids: list[xr.Dataset]) -> str:
    """The page's text; see write_report."""
    import jinja2
    import plotly.offline

    from hiddenlake.probing.report import made
    from hiddenlake.probing.report.part import make_part

    here = files(__package__)
    # Every value of the page is escaped: prompts and answers are anybody's text.
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    library, script = (_script(text) for text in (plotly.offline.get_plotlyjs(), (here / "page.js").read_text("utf-8")))
    # Were something not escaped, it would still not run: scripts are named by their hashes, and nothing may be loaded.
    policy = (
        f"default-src 'none'; script-src {_hash(library)} {_hash(script)}; style-src 'unsafe-inline'; img-src data:; "
        f"base-uri 'none'; form-action 'none'"
    )
    identity = capture.identity
    return environment.from_string((here / "page.html").read_text("utf-8")).render(
        title=f"{identity.get('model', 'unknown model')}, {identity.get('task', 'unknown task')}",
        date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        version=version("hiddenlake"),
        policy=policy,
        css=(here / "page.css").read_text("utf-8"),
        plotly=library,
        script=script,
        answers=made.answers(capture),
        parts=[make_part(capture, grid, number) for number, grid in enumerate(grids, 1)],
        commands=made.commands(capture, grids),
        digest=digest(identity),
        identity=made.identity(capture),
        provenance=made.provenance(capture),
        versions=made.versions(),
    )


def _script(text: str) -> str:
    """Of our own or Plotly's, as it may stand between tags."""
    text = text.replace("\r\n", "\n").replace("\r", "\n")  # as a browser reads it, before it is hashed
    if "</script" in text.lower() or "<!--" in text:
        raise HiddenlakeError("a script of the report ends its own tag: install another version of plotly")
    return text


def _hash(script: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()}'"
