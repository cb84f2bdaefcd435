"""Routes about probes: which there are, what one is, and its scores of stored samples."""

from typing import Any

import numpy as np
from fastapi import APIRouter
from pydantic import BaseModel, ConfigDict, Field

from hiddenlake.cache.service.app import By, With, need, problems
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

    return router


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
