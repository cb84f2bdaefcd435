"""Routes about grids: a capture's grids, their cells, and a sample's tokens as a cell's probe scores them."""

from pathlib import Path
from typing import Annotated, Any

from anyio.to_thread import run_sync
from fastapi import APIRouter, Query, Request, Response

from hiddenlake.cache.service.app import By, Parts, With, need, problems
from hiddenlake.cache.service.keys import Caller
from hiddenlake.cache.service.problems import Problem, no_such
from hiddenlake.cache.service.raw_zarr import FILE, respond
from hiddenlake.cache.service.samples import sample_row
from hiddenlake.cache.store.reader import Capture
from hiddenlake.probing.probe import different_fields, refuse_other_identity
from hiddenlake.probing.service.cells import Asked, Cell, Cells, Waiting
from hiddenlake.probing.service.findings import Findings, StoredGrid, at_one_moment
from hiddenlake.probing.service.heat import GridList, Heat, entry, heat
from hiddenlake.probing.service.pieces import Pieces, pieces
from hiddenlake.probing.service.refit import Refits
from hiddenlake.probing.service.tokens import TokenScores, token_scores

Layer = Annotated[int, Query(ge=0, le=100_000, description="0-based block index.")]
Position = Annotated[str, Query(max_length=64, examples=["exact_answer_last"])]
OneC = Annotated[float | None, Query(gt=0, description="One of the grid's; that of its best cell by default.")]
Wait = Annotated[float, Query(ge=0, le=3600, description="Seconds; the server waits `max_wait` at most, then 202.")]


_WAITS: dict[int | str, dict[str, Any]] = {202: {"model": Waiting}}


def grid_routes(lake: Path, findings: Findings, refits: Refits) -> APIRouter:
    router = APIRouter(tags=["grids"], dependencies=[need("read")])
    cells = Cells(findings, refits, str(lake))

    def stored(name: str, grid: str, parts: Parts, caller: Caller) -> tuple[Capture, StoredGrid]:
        capture = at_one_moment(parts.lake.capture(name, caller))
        return capture, findings.grid(capture, grid)

    @router.get("/v1/captures/{name}/grids", summary="Grids of a capture", responses=problems(404, 500, 503))
    def list_grids(name: str, parts: With, caller: By) -> GridList:
        """Those that were fitted on a capture of this value identity."""
        capture = parts.lake.capture(name, caller)
        return GridList(grids=[entry(grid, capture) for grid in findings.grids(capture)])

    @router.get("/v1/captures/{name}/grids/{grid}", summary="One grid", responses=problems(404, 409, 500, 503))
    def get_grid(
        name: str,
        grid: str,
        parts: With,
        caller: By,
        C: OneC = None,
        metric: Annotated[list[str], Query(max_length=100, description="More than AUC, interval and n.")] = [],  # noqa: B006
    ) -> Heat:
        """Layer x position, at one C: AUC with its interval, n, and why a cell has no probe."""
        capture, found = stored(name, grid, parts, caller)
        return heat(found, findings.open(found), capture, C, tuple(metric))

    @router.head(
        "/v1/captures/{name}/grids/{grid}/zarr/{edition}/{path:path}", summary="A file of a grid's Zarr group", **FILE
    )
    @router.get(
        "/v1/captures/{name}/grids/{grid}/zarr/{edition}/{path:path}", summary="A file of a grid's Zarr group", **FILE
    )
    def get_grid_file(
        name: str, grid: str, edition: str, path: str, request: Request, parts: With, caller: By
    ) -> Response:
        """`xarray.open_zarr` opens the group at the address that the list of grids gives. A grid that was replaced is not
        there any more: no reader puts two of them together."""
        found = findings.grid(parts.lake.capture(name, caller), grid)
        if found.edition != edition:
            raise no_such("edition of this grid", f"GET /v1/captures/{name}/grids says which there is")
        return respond(request, path, found.read(path))

    @router.get(
        "/v1/captures/{name}/grids/{grid}/cell",
        summary="ROC, calibration, histogram and the worst samples of a cell",
        responses=_WAITS | problems(404, 409, 413, 500, 503),
    )
    async def get_cell(
        name: str, grid: str, parts: With, caller: By, response: Response, layer: Layer, position: Position,
        C: OneC = None, wait: Wait = 10.0,
    ) -> Cell | Waiting:  # fmt: skip
        """From held-out scores, for which the cell is fitted again, in a process beside the server; then it is remembered."""

        def begin() -> Asked:
            return cells.ask(*stored(name, grid, parts, caller), layer, position, C, parts.settings)

        asked = await run_sync(begin)
        found = await asked.wait(min(wait, parts.settings.max_wait))
        if found is None:
            return asked.later(response)
        return Cell(layer=layer, position=position, C=asked.C, **found.shown)

    @router.get(
        "/v1/captures/{name}/samples/{key}/scores",
        summary="A sample's tokens, scored by a probe",
        responses=_WAITS | problems(404, 409, 413, 500, 503),
    )
    async def get_scores(
        name: str, key: str, parts: With, caller: By, response: Response,
        grid: Annotated[str | None, Query(max_length=128, description="A grid's cell: with layer and position.")] = None,
        layer: Annotated[int | None, Query(ge=0, le=100_000)] = None,
        position: Annotated[str | None, Query(max_length=64)] = None,
        C: OneC = None,
        probe: Annotated[str | None, Query(max_length=128, description="Or a stored probe.")] = None,
        force: Annotated[bool, Query(description="Also a probe of another identity; the answer is marked.")] = False,
        wait: Wait = 10.0,
    ) -> TokenScores | Waiting:  # fmt: skip
        """By the cell's probe that did not see the sample, or by a stored probe, which may have. Tokens without a row are
        left out."""
        if (probe is None) == (grid is None) or (grid is not None and (layer is None or position is None)):
            raise Problem(
                422, "bad_input", "which probe is not said", "name `grid`, `layer` and `position`, or `probe`"
            )

        def sample() -> tuple[Capture, int]:
            capture = at_one_moment(parts.lake.capture(name, caller))
            if (row := capture.snapshot.row_of.get(key)) is None:
                raise no_such("sample", f"GET /v1/captures/{name}/samples lists them")
            return capture, row

        capture, row = await run_sync(sample)
        if probe is not None:
            return await run_sync(by_stored, capture, key, row, probe, force, caller)

        def begin() -> tuple[StoredGrid, Asked]:
            found = findings.grid(capture, grid)
            return found, cells.ask(capture, found, layer, position, C, parts.settings)

        found, asked = await run_sync(begin)
        refitted = await asked.wait(min(wait, parts.settings.max_wait))
        if refitted is None:
            return asked.later(response)

        def by_cell() -> TokenScores:
            attrs, fold = found.attrs, int(refitted.fold[row])
            tokens, rows = token_scores(capture, attrs["site"], layer, row, lambda X: refitted.score(X, row))
            who = (
                f"the probe of the {int(attrs['cv']) - 1} folds that do not hold this sample"
                if fold >= 0
                else f"the mean log-odds of all {attrs['cv']} folds' probes, none of which was fitted on this sample"
            )
            words = f"Scored by {who}, fitted at {position}, C = {asked.C:g}. At other tokens it is a direction, and its probability is not calibrated."
            return TokenScores(
                key=key, site=attrs["site"], layer=layer, fitted_at=position, positive_class=attrs["positive_class"],
                probe=words, rows=rows, tokens=tokens,
            )  # fmt: skip

        return await run_sync(by_cell)

    def by_stored(capture: Capture, key: str, row: int, name: str, force: bool, caller: Caller) -> TokenScores:
        found = findings.probe(name, caller)
        refuse_other_identity(found, capture, force)
        differs = different_fields(found.identity, capture.identity)
        tokens, rows = token_scores(capture, found.site, found.layer, row, found.decision_function)
        words = (
            f"Scored by the stored probe {name}, fitted at {found.position} on all samples of its capture, which may hold "
            f"this one. At other tokens it is a direction, and its probability is not calibrated."
        )
        marked = f"Forced: the probe was fitted on activations of another identity ({', '.join(differs)} differ)."
        return TokenScores(
            key=key, site=found.site, layer=found.layer, fitted_at=found.position, positive_class=found.positive_class,
            probe=words, rows=rows, marked=marked if differs else None, tokens=tokens,
        )  # fmt: skip

    @router.get(
        "/v1/captures/{name}/samples/{key}/pieces",
        summary="The texts of a sample's tokens",
        responses=problems(404, 500, 503),
    )
    def get_pieces(name: str, key: str, parts: With, caller: By) -> Pieces:
        """By the model's tokenizer, where the server has it and it gives the stored texts."""
        capture = parts.lake.capture(name, caller)
        if (sample := sample_row(capture, key)) is None:
            raise no_such("sample", f"GET /v1/captures/{name}/samples lists them")
        model = str(capture.identity.get("model", ""))
        return pieces(sample["token_ids"], sample["prompt_length"], sample["prompt"], sample["answer"], model, lake)

    return router
