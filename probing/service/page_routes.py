"""Routes of the page: its files, and plotly's script, as the installed package has it."""

from functools import cache
from hashlib import sha256
from importlib.resources import files
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from hiddenlake.cache.service.app import need
from hiddenlake.cache.service.problems import no_such

router = APIRouter(tags=["page"], dependencies=[need("read")], include_in_schema=False)

_MEDIA = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
}
_ROOT = "page.html"


@router.get("/")
def page(request: Request) -> Response:
    return _respond(_ROOT, request)


@router.get("/page/{name}")
def page_file(name: str, request: Request) -> Response:
    return _respond(name, request)


@cache
def _files() -> dict[str, Any]:
    """Every file that may be asked for, by name."""
    here = files("hiddenlake.probing.service").joinpath("page")
    found = {file.name: file for file in here.iterdir() if Path(file.name).suffix in _MEDIA}
    # One look with the reports that are sent to colleagues.
    found["base.css"] = files("hiddenlake.probing.report").joinpath("page.css")
    # Not imported for it, which takes a second.
    if (plotly := find_spec("plotly")) is not None:
        found["plotly.min.js"] = Path(plotly.submodule_search_locations[0]) / "package_data" / "plotly.min.js"
    return found


@cache
def _content(name: str) -> tuple[bytes, str]:
    content = _files()[name].read_bytes()
    return content, f'"{sha256(content).hexdigest()[:32]}"'


def _respond(name: str, request: Request) -> Response:
    if name not in _files():
        raise no_such("file of the page", "open the page at /")
    content, etag = _content(name)
    headers = {"ETag": etag, "Cache-Control": "no-cache"}
    if request.headers.get("if-none-match") == etag:
        return Response(status_code=304, headers=headers)
    return Response(content, headers=headers, media_type=_MEDIA[Path(name).suffix])
