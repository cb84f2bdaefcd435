"""Routes that keep and remove captures."""

from fastapi import APIRouter, Response

from hiddenlake.cache.service.app import By, With, need, problems

router = APIRouter(tags=["administration"], dependencies=[need("admin")])


@router.put(
    "/v1/captures/{name}/pin",
    summary="Have a capture stay, whatever the quota",
    status_code=204,
    responses=problems(404, 503),
)
def pin(name: str, parts: With, caller: By) -> Response:
    parts.lake.capture(name, caller)
    parts.holdings.pin(name, True)
    return Response(status_code=204)


@router.delete(
    "/v1/captures/{name}/pin",
    summary="Have a capture go when the quota asks for it",
    status_code=204,
    responses=problems(404, 503),
)
def unpin(name: str, parts: With, caller: By) -> Response:
    parts.lake.capture(name, caller)
    parts.holdings.pin(name, False)
    return Response(status_code=204)


@router.delete("/v1/captures/{name}", summary="Remove a capture", status_code=204, responses=problems(404, 409, 503))
def remove(name: str, parts: With, caller: By) -> Response:
    """Not one that is pinned, or being written. Who reads it meanwhile gets an error, and never other numbers."""
    parts.lake.capture(name, caller)
    parts.holdings.remove(name)
    return Response(status_code=204)
