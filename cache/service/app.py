"""The app: routes, behind the gate. Nothing here or below imports torch."""

import asyncio
import ipaddress
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

from fastapi import APIRouter, Depends, FastAPI, Request
from fastapi.dependencies.utils import get_flat_dependant
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from hiddenlake import __version__
from hiddenlake.cache.errors import HiddenlakeError
from hiddenlake.cache.service.database import Database
from hiddenlake.cache.service.gate import Gate
from hiddenlake.cache.service.holdings import Holdings
from hiddenlake.cache.service.jobs import Jobs
from hiddenlake.cache.service.keys import Caller, Keys
from hiddenlake.cache.service.lake import Lake
from hiddenlake.cache.service.metrics import Metrics
from hiddenlake.cache.service.problems import Problem, ProblemBody, problem_of
from hiddenlake.cache.service.resolving import Resolver
from hiddenlake.cache.service.settings import Settings
from hiddenlake.cache.service.tracing import Tracer
from hiddenlake.cache.service.work import Work

# Names by which a server is called that listens at this machine alone.
LOOPBACK = frozenset({"localhost", "127.0.0.1", "[::1]"})

_NOT_FOUND = "GET /openapi.json names all routes"
_DESCRIBED = "GET /openapi.json describes every request"

# Requests and answers to show, and where an operation carries its own until the document is made.
_EXAMPLES = Path(__file__).with_name("examples.json")
_EXAMPLE = "x-example"

# What `_query_of` has worked out: what FastAPI knows of a route, by its id, and that itself, so that the id stays its own.
_QUERIES: dict[int, tuple[Any, dict[str, Any]]] = {}


@dataclass(frozen=True, slots=True)
class Parts:
    """What routes work with.

    turn : whose it is to do in the loop what takes a while.
    """

    settings: Settings
    lake: Lake
    database: Database
    keys: Keys
    metrics: Metrics
    work: Work
    jobs: Jobs
    holdings: Holdings
    resolver: Resolver
    turn: asyncio.Lock = field(default_factory=asyncio.Lock)


# Dependencies are asynchronous although nothing in them waits: others go through a thread each, at every request.


async def parts_of(request: Request) -> Parts:
    return request.app.state.parts


async def caller_of(request: Request) -> Caller:
    """Who asks. The gate has let nobody in whom it does not know."""
    return request.state.caller


With = Annotated[Parts, Depends(parts_of)]
By = Annotated[Caller, Depends(caller_of)]


def need(scope: str) -> Any:
    """A dependency: the caller's key must have this scope."""

    async def check(request: Request) -> None:
        if not (await caller_of(request)).may(scope):
            raise Problem(
                403, "scope", f"this key has no scope `{scope}`", f"ask with a key that was made with `--scope {scope}`"
            )

    return Depends(check)


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """For a route's documentation: these answers have the one shape of errors, beside those that any route may give."""
    return {status: {"model": ProblemBody} for status in (401, 403, 408, 413, 421, 422, 429, 500, *statuses)}


async def known_query(request: Request) -> None:
    """A dependency: a query string holds what the route knows, each once. A misspelt `layer` would else mean all layers."""
    known = _query_of(request.scope["route"].dependant)
    names = [name for name, _ in request.query_params.multi_items()]
    if unknown := set(names) - known.keys():
        raise Problem(
            422, "bad_input", f"{len(unknown)} query parameters are not of this route: it has "
            f"{', '.join(known) or 'none'}", "leave them out",
        )  # fmt: skip
    for name in set(names):
        if names.count(name) > 1 and "list" not in str(known[name]):
            raise Problem(422, "bad_input", f"query parameter `{name}` is there twice", "give it once")


def _query_of(dependant: Any) -> dict[str, Any]:
    """name -> type of a route's query parameters. Worked out once for each."""
    if (found := _QUERIES.get(id(dependant))) is None:
        known = {p.alias: p.field_info.annotation for p in get_flat_dependant(dependant).query_params}
        for name, kind in list(known.items()):
            if isinstance(kind, type) and issubclass(kind, BaseModel):  # whose fields are the parameters
                del known[name]
                known |= {one: about.annotation for one, about in kind.model_fields.items()}
        found = _QUERIES[id(dependant)] = (dependant, known)
    return found[1]


def with_examples(router: APIRouter, file: Path) -> APIRouter:
    """The router, whose routes the OpenAPI document gives examples of.

    file : JSON, "METHOD path" -> parameters, body, and answers by status: what was asked and answered once, lists cut short.
    """
    examples = json.loads(file.read_text())
    for route in router.routes:
        for method in route.methods:
            if (found := examples.get(f"{method} {route.path.replace(':path}', '}')}")) is not None:
                # As text, since FastAPI leaves nulls out of its document.
                route.openapi_extra = {_EXAMPLE: json.dumps(found)}
    return router


def make_app(parts: Parts, routers: Sequence[APIRouter] = (), tracer: Tracer | None = None) -> Gate:
    """The whole service as an ASGI app.

    routers : of other rooms, each with its scopes.  tracer : is told of every request.
    """
    from hiddenlake.cache.service import administration, captures, computing, raw_zarr, reads

    app = FastAPI(
        title="hiddenlake",
        version=__version__,
        summary="Activations by (layer, token), read from a lake of captures, or computed.",
        docs_url=None,  # its scripts come from elsewhere
        redoc_url=None,
        openapi_url=None,  # a route of ours, which needs a key as all do
        redirect_slashes=False,  # to wherever the request's `Host` says
        separate_input_output_schemas=False,
        dependencies=[Depends(known_query)],
        responses=problems(),
    )
    app.state.parts = parts
    mine = (_own(parts), captures.router, reads.router, raw_zarr.router, computing.router, administration.router)
    for router in (*(with_examples(router, _EXAMPLES) for router in mine), *routers):
        app.include_router(router)
    app.add_exception_handler(HiddenlakeError, _problem)
    app.add_exception_handler(RequestValidationError, _problem)
    app.add_exception_handler(HTTPException, _problem)
    app.add_exception_handler(Exception, _problem)
    settings = parts.settings
    return Gate(
        app,
        keys=parts.keys,
        metrics=parts.metrics,
        lake=str(parts.lake.place),
        max_body=settings.max_body,
        max_concurrent=settings.max_concurrent,
        hosts=LOOPBACK | {settings.host} if is_loopback(settings.host) else None,
        tracer=tracer,
    )


def is_loopback(host: str) -> bool:
    """Whether an address to listen at is this machine's alone. Any other name may mean anything."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _own(parts: Parts) -> APIRouter:
    """About the server itself."""
    router = APIRouter(tags=["server"])
    read = [need("read")]

    @router.get("/healthz", summary="Whether the process answers; needs no key", response_class=PlainTextResponse)
    async def healthz() -> str:
        return "ok\n"

    @router.get(
        "/readyz", summary="Whether it can work: database, lake, room on the disk", dependencies=read,
        responses=problems(503),
    )  # fmt: skip
    def readyz() -> dict[str, Any]:
        parts.database.read("SELECT 1")
        free = parts.lake.place.free_bytes()
        if free is not None and free < parts.settings.min_free:
            raise Problem(
                503,
                "no_room",
                f"{free} bytes are free, {parts.settings.min_free} must be",
                "make room on the lake's disk",
            )
        return {"ready": True, "free_bytes": free}

    @router.get("/metrics", summary="For Prometheus", dependencies=read, response_class=PlainTextResponse)
    def metrics() -> Response:
        return Response(generate_latest(parts.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    @router.get("/version", summary="Of hiddenlake", dependencies=read)
    async def version() -> dict[str, str]:
        return {"hiddenlake": __version__}

    @router.get("/openapi.json", include_in_schema=False, dependencies=read)
    def openapi(request: Request) -> dict[str, Any]:
        return _document(request.app)

    return router


async def _problem(request: Request, error: Exception) -> Response:
    if isinstance(error, RequestValidationError):
        known = _names(_document(request.app))
        found = [f"{_where(item['loc'], known)}: {item['msg']}" for item in error.errors()[:3]]
        problem = Problem(422, "bad_input", "; ".join(found), _DESCRIBED)
    elif isinstance(error, HTTPException) and error.status_code == 400:
        # Of FastAPI, for what is no text, nested a thousand times, or a number of thousands of digits.
        problem = Problem(422, "bad_input", "the body cannot be read as JSON", _DESCRIBED)
    elif isinstance(error, HTTPException):
        kind = {404: "not_found", 405: "method"}.get(error.status_code, "http")
        problem = Problem(error.status_code, kind, str(error.detail), _NOT_FOUND, headers=dict(error.headers or {}))
    else:
        problem = problem_of(error, str((await parts_of(request)).lake.place))
    return JSONResponse(problem.body(request.state.request_id), problem.status, problem.headers)


def _document(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document. FastAPI describes errors by the media type of what a route gives when all is well."""
    if app.openapi_schema is None:
        content = {"application/json": {"schema": {"$ref": "#/components/schemas/ProblemBody"}}}
        for operations in app.openapi()["paths"].values():
            for operation in operations.values():
                for status, response in operation["responses"].items():
                    if int(status) >= 400:
                        response["content"] = content
                _place(json.loads(operation.pop(_EXAMPLE, "{}")), operation)
    return app.openapi_schema


def _place(example: dict[str, Any], operation: dict[str, Any]) -> None:
    """Put a route's example to what it is one of."""
    given = example.get("parameters", {})
    for parameter in operation.get("parameters", ()):
        if parameter["name"] in given:
            parameter["example"] = given[parameter["name"]]
    if "body" in example:
        operation["requestBody"]["content"]["application/json"]["example"] = example["body"]
    for status, answer in example.get("answers", {}).items():
        for content in operation["responses"][status]["content"].values():
            content["example"] = answer


def _where(place: Iterable[str | int], known: set[str]) -> str:
    """Where in a request something is wrong, without what was sent, which may be a prompt: also as a field's name."""
    return ".".join(str(part) if isinstance(part, int) or part in known else "?" for part in place)


def _names(document: Any) -> set[str]:
    """Of all fields and parameters that an OpenAPI document describes."""
    if isinstance(document, list):
        return set().union(*map(_names, document))
    if not isinstance(document, dict):
        return set()
    own = document.get("properties")
    found = {"body", "query", "path", "header", *(own if isinstance(own, dict) else ())}
    if "in" in document and isinstance(document.get("name"), str):
        found.add(document["name"])
    return found.union(*map(_names, document.values()))
