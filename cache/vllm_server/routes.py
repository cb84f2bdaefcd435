"""Routes beside those of vLLM's server: what may be captured, and what has become of a sample.

All of them lie under /v1, where vLLM's own middleware asks for the API key if there is one.
"""

from argparse import Namespace
from dataclasses import asdict
from typing import Annotated, Any

from fastapi import APIRouter, FastAPI, HTTPException, Path, Query, Request
from starlette.datastructures import State

import hiddenlake
from hiddenlake.cache.vllm_server.service import Service
from hiddenlake.cache.vllm_server.start import start_service

# As long as a client may wait for a sample in one request, in seconds.
_LONGEST_WAIT = 60.0

_Key = Annotated[str, Path(pattern="^[0-9a-f]{32}$", description="A sample's key.")]
_RequestId = Annotated[str, Path(max_length=256, description="A response's id, or the X-Request-Id it was asked with.")]

router = APIRouter(prefix="/v1/hiddenlake", tags=["hiddenlake"])


def _service(request: Request) -> Service:
    return request.app.state.hiddenlake


@router.get("")
async def facts(request: Request) -> dict[str, Any]:
    """What is tapped, what one request may ask for, and how many samples there are in each state."""
    service = _service(request)
    offer = service.intake.offer
    return {
        "version": hiddenlake.__version__,
        "model": offer.model.name,
        "dtype": offer.model.dtype,
        "sites": offer.sites,
        "layers": offer.layers,
        "positions": offer.positions,
        "row_bytes": offer.row_bytes,
        "max_request_bytes": offer.max_request_bytes,
        "samples": service.states.counts(),
        "workers": await service.stats(),
    }


@router.get("/samples/{key}")
async def sample(
    request: Request, key: _Key, wait: Annotated[float, Query(ge=0, le=_LONGEST_WAIT)] = 0
) -> dict[str, Any]:
    """{"state": "pending" | "committed" | "failed", "cause": why it failed, "capture": its name}.

    wait : seconds after which a pending sample is reported as such.
    """
    found = await _service(request).state(key, wait)
    if found is None:
        raise HTTPException(
            404, f"sample {key} is not known: it was never asked for here, or was lost with an earlier server"
        )
    return {"key": key, **asdict(found)}


@router.get("/requests/{request_id}")
async def keys(request: Request, request_id: _RequestId) -> dict[str, Any]:
    """The keys of one request's samples, one list a prompt, in the order of its answers: for clients that stream."""
    asked = _service(request).states.of_request(request_id)
    if not asked:
        raise HTTPException(404, f"no captured request has the id {request_id!r}")
    if len({each.request for each in asked}) < len(asked):
        raise HTTPException(409, f"{request_id!r} was the id of several requests: give each an X-Request-Id of its own")
    return {"capture": asked[0].capture, "keys": [each.keys for each in asked]}


@router.post("/flush")
async def flush(request: Request) -> dict[str, int]:
    """Publish everything that has finished. Returns how many samples are in each state."""
    service = _service(request)
    await service.flush()
    return service.states.counts()


class Plugin:
    """vLLM's endpoint plugin. Without the settings that `hiddenlake vllm` leaves, it adds nothing."""

    name = "hiddenlake"
    required_tasks = ("generate",)

    def attach_router(self, app: FastAPI) -> None:
        if hasattr(app.state.args, "hiddenlake"):
            app.include_router(router)

    async def init_state(self, engine_client: Any, state: State, args: Namespace) -> None:
        if hasattr(args, "hiddenlake"):
            state.hiddenlake = await start_service(engine_client, args.hiddenlake)
