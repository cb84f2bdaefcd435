"""Routes about probes: which there are, what one is, and its scores of stored samples."""

from typing import Any

import numpy as np
from anyio.to_thread import run_sync
from fastapi import APIRouter, Response
from pydantic import BaseModel, ConfigDict, Field

from hiddenlake.cache.identity import model_key
from hiddenlake.cache.service.app import By, Parts, With, need, problems
from hiddenlake.cache.service.asked import Generation, Input, Resolved, ResolveRequest
from hiddenlake.cache.service.computing import resolve
from hiddenlake.cache.service.keys import Caller
from hiddenlake.cache.service.problems import Problem
from hiddenlake.cache.store.reader import Capture
from hiddenlake.probing.probe import Probe, different_fields, probability_of, score_rows
from hiddenlake.probing.service.findings import Findings, at_one_moment
from hiddenlake.probing.service.heat import plain


class ProbeEntry(BaseModel):
    """A stored probe, without its weights."""

    name: str
    site: str
    layer: int
    position: str
    label: str
    positive_class: str
    width: int = Field(description="Of the activations that it takes.")
    identity: dict[str, Any] = Field(description="Of the capture that it was fitted on.")
    fit: dict[str, Any] = Field(description="How it was fitted, its certificate, and its cross-validated AUC.")


class ProbeList(BaseModel):
    probes: list[ProbeEntry]


class ScoreRequest(BaseModel):
    """Which stored samples a probe scores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    capture: str = Field(description="The capture's name.", max_length=128, examples=["cities"])
    samples: tuple[str | int, ...] | None = Field(
        None, description="Keys, or rows in task order; all by default.", max_length=1_000_000
    )
    force: bool = Field(
        False,
        description="Also where the activations are of another identity, e.g. another model's; the answer is marked.",
    )


class Scores(BaseModel):
    """A probe's scores, a sample each. null : the sample has no token at the probe's position."""

    probe: str
    capture: str
    positive_class: str
    samples: list[str] = Field(description="Keys.")
    score: list[float | None] = Field(description="Log-odds of the positive class.")
    probability: list[float | None]
    forced: bool = Field(description="Whether these are activations of another identity.")
    differs: list[str] = Field(description="The fields of the identity in which they differ.")


class PromptsRequest(BaseModel):
    """Prompts, stored or new, that a probe scores."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    inputs: tuple[Input, ...] = Field(min_length=1, max_length=100_000)
    generation: Generation | None = Field(None, description="As for resolve: without it prompts, and answers, are fed.")
    only_if_cached: bool = False
    wait: float = Field(0.0, ge=0, le=3600, description="Seconds to wait for what is computed.", allow_inf_nan=False)


class PromptScore(BaseModel):
    """One answer's score. null : it has no token at the probe's position."""

    input: int
    sample_index: int
    capture: str
    sample: str
    score: float | None = Field(description="Log-odds of the positive class.")
    probability: float | None


class PromptScores(BaseModel):
    probe: str
    positive_class: str
    scores: list[PromptScore]


def probe_routes(findings: Findings) -> APIRouter:
    router = APIRouter(tags=["probes"], dependencies=[need("read")])

    @router.get("/v1/probes", summary="Stored probes", responses=problems(503))
    def list_probes(caller: By) -> ProbeList:
        return ProbeList(probes=[_entry(name, probe) for name, probe in findings.probes(caller).items()])

    @router.get("/v1/probes/{probe}", summary="One probe", responses=problems(404, 503))
    def get_probe(probe: str, caller: By) -> ProbeEntry:
        """Its cell, what it was fitted on and how, and its certificate."""
        return _entry(probe, findings.probe(probe, caller))

    @router.post(
        "/v1/probes/{probe}:score", summary="Score stored samples", responses=problems(404, 409, 413, 500, 503)
    )
    def score(probe: str, request: ScoreRequest, parts: With, caller: By) -> Scores:
        """409 where the capture's activations are of another identity than those that the probe was fitted on, unless
        forced."""
        found = findings.probe(probe, caller)
        capture = at_one_moment(parts.lake.capture(request.capture, caller))
        rows = _rows(capture, request.samples)
        needed = 4 * len(rows) * len(found.coef)
        if needed > parts.settings.max_read:
            raise Problem(
                413, "too_large", f"{needed} bytes of activations, {int(parts.settings.max_read)} are read for one answer",
                "ask for fewer samples at once",
            )  # fmt: skip
        odds = score_rows(found, capture, rows, request.force)
        differs = different_fields(found.identity, capture.identity)
        keys = capture.snapshot.keys
        return Scores(
            probe=probe,
            capture=request.capture,
            positive_class=found.positive_class,
            samples=[str(keys[row]) for row in rows],
            score=_numbers(odds),
            probability=_numbers(probability_of(odds)),
            forced=bool(differs),
            differs=differs,
        )

    @router.post(
        "/v1/probes/{probe}:resolve",
        summary="Score prompts, computed where they are not stored",
        responses={200: {"model": PromptScores}, 202: {"model": Resolved, "description": "Some are being computed."}}
        | problems(404, 409, 413, 424, 503, 507),
    )
    async def score_prompts(
        probe: str, request: PromptsRequest, response: Response, parts: With, caller: By
    ) -> PromptScores | Resolved:
        """`POST /v1/activations:resolve` of the probe's cell, by the model that it was fitted on, and its scores."""
        found = await run_sync(findings.probe, probe, caller)
        asked = ResolveRequest(
            model=model_key(found.identity), sites=(found.site,), layers=None if found.layer < 0 else (found.layer,),
            positions=(found.position,), **{name: getattr(request, name) for name in PromptsRequest.model_fields},
        )  # fmt: skip
        resolved = await resolve(asked, response, parts, caller)
        if resolved.state != "complete":
            return resolved
        return await run_sync(_prompt_scores, probe, found, resolved, parts, caller)

    return router


def _prompt_scores(name: str, probe: Probe, resolved: Resolved, parts: Parts, caller: Caller) -> PromptScores:
    """Of answers that are all there."""
    odds = np.full(len(resolved.entries), np.nan)
    for capture in {entry.capture for entry in resolved.entries}:
        mine = [i for i, entry in enumerate(resolved.entries) if entry.capture == capture]
        opened = parts.lake.fresh(capture, caller, resolved.entries[mine[-1]].sample)
        at = at_one_moment(opened)
        odds[mine] = score_rows(probe, at, _rows(at, tuple(resolved.entries[i].sample for i in mine)))
    return PromptScores(
        probe=name,
        positive_class=probe.positive_class,
        scores=[
            PromptScore(
                input=entry.input, sample_index=entry.sample_index, capture=entry.capture, sample=entry.sample,
                score=score, probability=probability,
            )
            for entry, score, probability in zip(
                resolved.entries, _numbers(odds), _numbers(probability_of(odds)), strict=True
            )
        ],
    )  # fmt: skip


def _rows(capture: Capture, samples: tuple[str | int, ...] | None) -> np.ndarray:
    """(n,) rows of keys or rows; of all for None. Raises Problem, which does not repeat what was sent."""
    count, row_of = len(capture), capture.snapshot.row_of
    if samples is None:
        return np.arange(count)
    rows = np.array([row_of.get(one, -1) if isinstance(one, str) else one for one in samples], object)
    if missing := sum(not 0 <= row < count for row in rows):
        raise Problem(
            409, "not_captured", f"{missing} of the {len(rows)} samples that were asked for are not in the capture, which has "
            f"{count}", "ask for keys that GET /v1/captures/{name}/samples lists, or for rows from 0",
        )  # fmt: skip
    return rows.astype(np.int64)


def _numbers(values: np.ndarray) -> list[float | None]:
    return [value if np.isfinite(value) else None for value in values.tolist()]


def _entry(name: str, probe: Probe) -> ProbeEntry:
    return ProbeEntry(
        name=name,
        site=probe.site,
        layer=probe.layer,
        position=probe.position,
        label=probe.label,
        positive_class=probe.positive_class,
        width=len(probe.coef),
        identity=probe.identity,
        fit=plain(probe.fit),
    )
