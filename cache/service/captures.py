"""Routes about captures and their samples."""

from collections.abc import Iterator
from itertools import chain
from typing import Annotated, Any

from fastapi import APIRouter, Query
from fastapi.responses import Response, StreamingResponse
from pydantic import BaseModel, Field

from hiddenlake.cache.errors import HiddenlakeError
from hiddenlake.cache.service.app import By, With, need, problems
from hiddenlake.cache.service.problems import Problem, no_such, problem_of
from hiddenlake.cache.service.samples import Filter, find_samples, find_tokens, plain, sample_row
from hiddenlake.cache.service.tables import label_parquet, sample_parquet
from hiddenlake.cache.store.catalog import describe, facts

router = APIRouter(tags=["captures"], dependencies=[need("read")])

_PARQUET = "application/vnd.apache.parquet"
_PARQUET_CONTENT: dict[int | str, dict[str, Any]] = {
    200: {"content": {_PARQUET: {"schema": {"type": "string", "format": "binary"}}}}
}


class CaptureEntry(BaseModel):
    """One capture of the list."""

    name: str
    model: Any = None
    task: Any = None
    sites: list[str] = []
    layers: int = 0
    positions: int = 0
    tokens: str | None = Field(None, description="Token-level coverage.")
    dtype: str = ""
    codec: str = ""
    samples: int = Field(0, description="That are committed.")
    planned: int = 0
    bytes: int = 0
    failures: int = 0
    error: str | None = Field(None, description="Why it cannot be opened.")


class CaptureList(BaseModel):
    captures: list[CaptureEntry]


class Page(BaseModel):
    """Part of a capture's samples, in task order."""

    total: int = Field(description="Samples that pass the filter.")
    offset: int
    samples: list[dict[str, Any]]


class TokenPage(BaseModel):
    """Tokens of which there is an activation."""

    total: int
    tokens: list[dict[str, Any]]


@router.get("/v1/captures", summary="Captures that there are", responses=problems(503))
def list_captures(parts: With, caller: By) -> CaptureList:
    entries = []
    for name, found in parts.lake.captures(caller):
        try:
            if isinstance(found, HiddenlakeError):
                raise found
            entries.append(CaptureEntry(name=name, **facts(found)))
        except HiddenlakeError as error:
            entries.append(CaptureEntry(name=name, error=problem_of(error, str(parts.lake.place)).message))
    return CaptureList(captures=entries)


@router.get("/v1/captures/{name}", summary="All that is known of one capture", responses=problems(404, 500, 503))
def get_capture(name: str, parts: With, caller: By) -> dict[str, Any]:
    capture = parts.lake.capture(name, caller)
    found = describe(capture) | {"snapshot": capture.snapshot.name, "labels": sorted(capture.labels())}
    del found["path"]
    return plain(found)


@router.get("/v1/captures/{name}/samples", summary="Samples, filtered", responses=problems(404, 409, 500, 503))
def list_samples(
    name: str,
    parts: With,
    caller: By,
    label: Annotated[str | None, Query(max_length=128, description="A column: `correct`, or an added label.")] = None,
    value: Annotated[
        str | None, Query(max_length=256, description="What the label is: `true`, `false`, `null`, text.")
    ] = None,
    text: Annotated[
        str | None, Query(max_length=1000, description="What prompt or answer contains, in any case.")
    ] = None,
    key: Annotated[list[str] | None, Query(max_length=1000, description="Only these.")] = None,
    offset: Annotated[int, Query(ge=0, le=1 << 40)] = 0,
    limit: Annotated[int, Query(ge=1, le=1_000_000)] = 50,
) -> Page:
    """Everything but activations. Texts are whole: ask for few at a time."""
    if limit > parts.settings.max_rows:
        raise Problem(
            422,
            "bad_input",
            f"limit is {limit}: at most {parts.settings.max_rows} at once",
            "ask page by page, by `offset`",
        )
    if (label is None) != (value is None):
        raise Problem(422, "bad_input", "`label` and `value` go together", "name both, or none")
    capture = parts.lake.capture(name, caller)
    total, rows = find_samples(capture, Filter(label, value, text, None if key is None else tuple(key)), offset, limit)
    return Page(total=total, offset=offset, samples=rows)


@router.get(
    "/v1/captures/{name}/samples.parquet",
    summary="All samples, as Parquet",
    response_class=Response,
    responses=_PARQUET_CONTENT | problems(404, 500, 503),
)
def get_sample_table(
    name: str,
    parts: With,
    caller: By,
    columns: Annotated[list[str] | None, Query(max_length=100, description="Only these; all by default.")] = None,
) -> Response:
    """In task order, streamed. What the capture is lies in the file's metadata, as JSON, under `hiddenlake`."""
    limits = {"read": int(parts.settings.max_read), "body": int(parts.settings.max_body)}
    return _stream(sample_parquet(parts.lake.capture(name, caller).snapshot, columns, limits))


@router.get(
    "/v1/captures/{name}/labels/{label}",
    summary="Labels that were added, as Parquet",
    response_class=Response,
    responses=_PARQUET_CONTENT | problems(404, 500, 503),
)
def get_labels(name: str, label: str, parts: With, caller: By) -> Response:
    """A column `key`, and values. `GET /v1/captures/{name}` names them."""
    found = parts.lake.capture(name, caller).labels()
    if label not in found:
        raise no_such("label", f"GET /v1/captures/{name} names them")
    return _stream(label_parquet(found[label]))


def _stream(parts: Iterator[bytes]) -> Response:
    """The first part is made before the answer begins, so that what is wrong there is said in words."""
    return StreamingResponse(chain([next(parts)], parts), media_type=_PARQUET)


@router.get("/v1/captures/{name}/samples/{key}", summary="One sample", responses=problems(404, 500, 503))
def get_sample(name: str, key: str, parts: With, caller: By) -> dict[str, Any]:
    """Its texts, token ids, log-probabilities, and which token each position means."""
    capture = parts.lake.fresh(name, caller, key)
    found = sample_row(capture, key)
    if found is None:
        raise no_such("sample", f"GET /v1/captures/{name}/samples lists them")
    return found


@router.get("/v1/captures/{name}/tokens", summary="Where a token occurs", responses=problems(404, 409, 500, 503))
def list_tokens(
    name: str,
    parts: With,
    caller: By,
    id: Annotated[int, Query(ge=0, lt=1 << 31, description="The model's id of the token.")],
    captured: Annotated[bool, Query(description="Only where there is an activation.")] = True,
    limit: Annotated[int, Query(ge=1, le=1_000_000)] = 50,
) -> TokenPage:
    """(sample, token index) of every occurrence in prompts and answers; `POST /v1/activations:read` takes both."""
    if limit > parts.settings.max_rows:
        raise Problem(422, "bad_input", f"limit is {limit}: at most {parts.settings.max_rows}", "ask for fewer")
    total, rows = find_tokens(parts.lake.capture(name, caller), id, captured, limit)
    return TokenPage(total=total, tokens=rows)
