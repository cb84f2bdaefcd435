"""Routes that have answers computed, and follow how far they are."""

import asyncio
import time
from collections.abc import AsyncIterable
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Depends, Query, Request, Response
from fastapi.sse import EventSourceResponse, ServerSentEvent

from hiddenlake.cache.service.app import By, Parts, With, need, problems
from hiddenlake.cache.service.asked import Entry, Resolved, ResolveRequest
from hiddenlake.cache.service.jobs import Job
from hiddenlake.cache.service.keys import Caller
from hiddenlake.cache.service.plans import Offer, Plan
from hiddenlake.cache.service.problems import Problem
from hiddenlake.cache.service.resolving import Answer

router = APIRouter(tags=["computing"])

# How soon a job that somebody waits for is looked at again: sooner in the beginning.
_FIRST_SECONDS, _MOST_SECONDS = 0.05, 0.5
_EVENT_SECONDS = 0.25


@router.get(
    "/v1/models", summary="Models that activations can be had of", dependencies=[need("read")], responses=problems()
)
def list_models(parts: With, caller: By) -> dict[str, Any]:
    """Those with a worker, and those of the captures. `live`: whether a worker has given a sign of life lately. Where none
    ever ran, nobody knows how long a prompt or an answer may be."""
    live = parts.work.offers(alive_within=parts.settings.lease)
    return {
        "models": [
            {
                "id": offer.id,
                "name": offer.name,
                "live": offer.id in live,
                "sites": list(offer.sites),
                "layers": list(offer.layers),
                "dtype": offer.dtype,
                "max_prompt": offer.max_prompt if offer.path else None,
                "max_new_tokens": offer.max_new_tokens if offer.path else None,
            }
            for offer in parts.resolver.offers(caller).values()
        ]
    }


@router.post(
    "/v1/activations:resolve",
    summary="Get or compute",
    dependencies=[need("read")],
    responses={202: {"model": Resolved, "description": "Some are being computed."}}
    | problems(404, 409, 413, 424, 503, 507),
)
async def resolve(request: ResolveRequest, response: Response, parts: With, caller: By) -> Resolved:
    """Where the activations of these prompts lie, whoever captured them; what is missing is computed, once for all who ask.

    200 when all are there; 202 with a job otherwise, or after `wait` seconds; 404 with `only_if_cached`. Computing needs
    the scope `compute`. The same request may be sent again at any time.
    """
    deadline = time.monotonic() + min(request.wait, parts.settings.max_wait)
    offer, plan, answers, job = await run_sync(_begin, request, parts, caller)
    tick = _FIRST_SECONDS
    while job is not None and time.monotonic() < deadline:
        if (await run_sync(parts.jobs.get, job, caller)).state != "running":
            offer, plan, answers = await run_sync(parts.resolver.look, request, caller)
            break
        await asyncio.sleep(max(0.0, min(tick, deadline - time.monotonic())))
        tick = min(_MOST_SECONDS, tick * 1.5)
    if all(answer.place for answer in answers):
        return _resolved(offer, plan, answers, None)
    found = await run_sync(parts.jobs.get, job, caller)
    if found.failed and found.state != "running":
        raise Problem(
            424, "failed", f"{found.failed} of {len(answers)} answers could not be computed: {'; '.join(found.causes)}",
            "change the request as the message says, or ask again: what failed is tried anew", there={"job": job},
        )  # fmt: skip
    response.status_code = 202
    response.headers["Location"] = f"/v1/jobs/{job}"
    response.headers["Retry-After"] = "1"
    return _resolved(offer, plan, answers, job)


def _begin(request: ResolveRequest, parts: Parts, caller: Caller) -> tuple[Offer, Plan, list[Answer], str | None]:
    offer, plan, answers = parts.resolver.look(request, caller)
    missing = list({answer.wanted.key: answer.wanted for answer in answers if answer.place is None}.values())
    parts.metrics.hits.inc(len(answers) - len(missing))
    parts.metrics.misses.inc(len(missing))
    if not missing:
        return offer, plan, answers, None
    if request.only_if_cached:
        inputs = sorted({answer.input for answer in answers if answer.place is None})
        raise Problem(
            404, "not_cached", f"{len(missing)} of {len(answers)} answers are not there",
            "ask without `only_if_cached` to have them computed", there={"missing_inputs": inputs[:1000]},
        )  # fmt: skip
    if not caller.may("compute"):
        raise Problem(
            403, "scope", f"{len(missing)} answers would have to be computed, and this key has no scope `compute`",
            "ask with `only_if_cached`, or with a key that was made with `--scope compute`",
        )  # fmt: skip
    parts.resolver.admit(offer, plan, missing)
    numbers = parts.work.add(offer, plan, caller.tenant or "", missing)
    return offer, plan, answers, parts.jobs.add(numbers, caller)


def _resolved(offer: Offer, plan: Plan, answers: list[Answer], job: str | None) -> Resolved:
    entries = []
    for answer in answers:
        capture, sample = answer.place or (None, None)
        state = "ready" if answer.place else "pending"
        entries.append(
            Entry(
                input=answer.input,
                sample_index=answer.sample_index,
                key=answer.wanted.key,
                state=state,
                capture=capture,
                sample=sample,
            )  # fmt: skip
        )
    return Resolved(
        state="complete" if job is None else "pending", model=offer.id, sites=list(plan.sites), layers=list(plan.layers),
        positions=list(plan.positions), tokens=plan.tokens, entries=entries, job=job,
    )  # fmt: skip


@router.get("/v1/jobs", summary="Your jobs, the newest first", dependencies=[need("read")], responses=problems())
def list_jobs(parts: With, caller: By, limit: Annotated[int, Query(ge=1, le=1000)] = 50) -> dict[str, list[Job]]:
    """With a key of scope `admin`, everybody's."""
    return {"jobs": parts.jobs.newest(caller, limit)}


@router.get("/v1/jobs/{id}", summary="How far a job is", dependencies=[need("read")], responses=problems(404))
def get_job(id: str, parts: With, caller: By) -> Job:
    return parts.jobs.get(id, caller)


@router.delete("/v1/jobs/{id}", summary="Cancel a job", dependencies=[need("compute")], responses=problems(404))
def cancel_job(id: str, parts: With, caller: By) -> Job:
    """What another job wants too, and what a worker is at work on, is computed nevertheless."""
    return parts.jobs.cancel(id, caller)


async def _following(id: str, parts: With, caller: By) -> Job:
    """Before the stream begins, so that a job that is not there is a 404."""
    return await run_sync(parts.jobs.get, id, caller)


@router.get(
    "/v1/jobs/{id}/events",
    summary="Follow a job",
    dependencies=[need("read")],
    response_class=EventSourceResponse,
    responses=problems(404),
)
async def follow_job(
    request: Request, job: Annotated[Job, Depends(_following)], parts: With, caller: By
) -> AsyncIterable[ServerSentEvent]:
    """Server-sent events named `job`, each the whole of it, whenever it has changed; the stream ends with the job."""
    last: Job | None = None
    while not await request.is_disconnected():
        if job != last:
            yield ServerSentEvent(data=job.model_dump(), event="job")
            last = job
        if job.state != "running":
            return
        await asyncio.sleep(_EVENT_SECONDS)
        job = await run_sync(parts.jobs.get, job.id, caller)
