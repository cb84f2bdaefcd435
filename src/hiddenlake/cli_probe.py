"""The commands about probes: `probe`, `probe-classes`, `score`, `heatmap`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cli_output import EXIT_INTERRUPTED, Capture, Json, byte_count, print_table, talk

if TYPE_CHECKING:
    from hiddenlake.cache.store.reader import Capture as OpenCapture
    from hiddenlake.probing.plan import Plan

app = typer.Typer()

Site = Annotated[str, typer.Option(help="Which site's activations.")]
Out = Annotated[Path, typer.Option(help="The grid to write, a .zarr folder.")]
Groups = Annotated[str, typer.Option(help="`group`, `gold` (the gold answer), or another column.")]
Layers = Annotated[str, typer.Option(help="`all`, or 0-based layers: 13 or 0,5,10-12.")]
Positions = Annotated[str, typer.Option(help="`all`, or positions, by comma.")]
Folds = Annotated[int, typer.Option(help="Folds.")]
Strengths = Annotated[str, typer.Option("--C", help="Inverse regularisation strengths, by comma.")]
Scale = Annotated[str, typer.Option(help="`none`, `rms` or `feature`, fitted in the fold.")]
Shuffles = Annotated[int, typer.Option(help="Shuffled-label controls a cell.")]
Seed = Annotated[int, typer.Option(help="Of folds, shuffles and controls.")]


@app.command("probe")
def probe_command(
    capture: Capture,
    site: Site,
    out: Out,
    label: Annotated[str, typer.Option(help="A column of the samples or of labels/.")] = "correct",
    groups: Groups = "group",
    layers: Layers = "all",
    positions: Positions = "all",
    cv: Folds = 5,
    C: Strengths = "0.01",
    scale: Scale = "feature",
    shuffles: Shuffles = 19,
    nested: Annotated[
        bool | None,
        typer.Option(
            help="Also choose the cell on inner folds, and score it on data that did not choose it; default from 3 folds on."
        ),
    ] = None,
    controls: Annotated[
        str, typer.Option(help="`all`, `none`, or some of token, place, random, task, by comma.")
    ] = "all",
    seed: Seed = 0,
    class_weight: Annotated[
        str | None, typer.Option(help="`balanced`: both classes weigh alike in a fit, however rare one is.")
    ] = None,
    penalty: Annotated[str, typer.Option(help="`l2`, `l1`, or `elasticnet` with --l1-ratio.")] = "l2",
    l1_ratio: Annotated[float | None, typer.Option(help="The share of an elastic net that is l1.")] = None,
    solver: Annotated[
        str, typer.Option(help="`auto`, `newton`, `sklearn` or `cuml`, each under the same certificate.")
    ] = "auto",
    device: Annotated[
        str,
        typer.Option(
            help="`cpu`, `cuda` or `cuda:1`: where probes are solved. Run the command once a GPU: they share the grid."
        ),
    ] = "cpu",
    compat: Annotated[str | None, typer.Option(help="`llmsknow`: the paper's fit to the letter.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="For activations and solvers, e.g. 8GiB; half of the machine's by default.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Processes that share the cells; by default one a core.")
    ] = None,
    keep: Annotated[
        Path | None, typer.Option(help="Also fit the best cell on all samples, and keep that probe in this file.")
    ] = None,
) -> None:
    """Fit certified probes over all (layer, position) cells of one site. The same command goes on where it stopped.

    Exit status: 0 the grid is complete, 130 interrupted.
    """
    from dataclasses import asdict

    from hiddenlake.cache.progress import counted, size
    from hiddenlake.cache.store.reader import open_capture
    from hiddenlake.probing.controls import CONTROLS
    from hiddenlake.probing.grid import at_one_C, best_cell, controls_at
    from hiddenlake.probing.run import run_grid

    opened = open_capture(capture)

    def planned(plan: "Plan") -> None:
        batches = "" if plan.columns is None else f", {plan.columns} columns of a fold at once"
        talk(f"{plan.threads} cells at once{batches}: up to {size(plan.memory_bytes)} of memory")

    try:
        with counted(f"probing {site}") as progress:
            grid = run_grid(
                opened,
                site,
                out,
                label=label,
                groups=groups,
                **_cells(opened, layers, positions),
                cv=cv,
                C=_strengths(C),
                class_weight=class_weight,
                penalty=penalty,
                l1_ratio=l1_ratio,
                scale=scale,
                shuffles=shuffles,
                nested=nested,
                controls=CONTROLS if controls == "all" else () if controls == "none" else controls.split(","),
                seed=seed,
                solver=solver,
                device=device,
                compat=compat,
                memory=None if memory is None else byte_count("--memory", memory),
                workers=workers,
                planned=planned,
                progress=progress,
            )
    except KeyboardInterrupt:
        talk(f"interrupted: the cells that were finished are kept beside {out}; the same command goes on from there")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    best = best_cell(grid)
    if keep is not None:
        from hiddenlake.probing.train import fit_probe

        probe = fit_probe(
            opened, site, best.layer, best.position, label=label, groups=groups, C=best.C, cv=cv,
            class_weight=class_weight, penalty=penalty, l1_ratio=l1_ratio, scale=scale, solver=solver, seed=seed,
        )  # fmt: skip
        talk(f"the probe of layer {best.layer}, {best.position} is kept in {probe.save(keep)}")
    found = asdict(best) | controls_at(at_one_C(grid), best.layer, best.position)
    found |= {
        name: grid.attrs[name]
        for name in ("nested_auc", "nested_auc_lo", "nested_auc_hi", "max_t_p")
        if name in grid.attrs
    }
    print(json.dumps({name: value if value == value else None for name, value in found.items()}))


@app.command("probe-classes")
def probe_classes_command(
    capture: Capture,
    site: Site,
    out: Out,
    label: Annotated[str, typer.Option(help="A column of three or more values, of the samples or of labels/.")],
    multiclass: Annotated[
        str, typer.Option(help="`softmax`, one multinomial model, or `ovr`, each class against the rest.")
    ] = "softmax",
    classes: Annotated[str | None, typer.Option(help="Only samples of these values, by comma.")] = None,
    groups: Groups = "group",
    layers: Layers = "all",
    positions: Positions = "all",
    cv: Folds = 5,
    C: Strengths = "0.01",
    scale: Scale = "feature",
    shuffles: Shuffles = 1,
    seed: Seed = 0,
    class_weight: Annotated[str | None, typer.Option(help="`balanced`: all classes weigh alike in a fit.")] = None,
) -> None:
    """Fit certified models of a label of more than two values over all (layer, position) cells of one site."""
    from dataclasses import asdict

    from hiddenlake.cache.progress import counted
    from hiddenlake.cache.store.reader import open_capture
    from hiddenlake.probing.grid import best_cell
    from hiddenlake.probing.multiclass_grid import fit_multiclass_grid
    from hiddenlake.probing.saving import check_target, save_grid

    check_target(out)
    opened = open_capture(capture)
    with counted(f"probing {site}") as progress:
        grid = fit_multiclass_grid(
            opened, site, label=label, classes=None if classes is None else classes.split(","), groups=groups,
            **_cells(opened, layers, positions), multiclass=multiclass, cv=cv, C=_strengths(C), scale=scale,
            shuffles=shuffles, seed=seed, class_weight=class_weight, progress=progress,
        )  # fmt: skip
    save_grid(grid, out)
    best = best_cell(grid)
    each = grid.class_auc.sel(layer=best.layer, position=best.position, C=best.C)
    print(
        json.dumps(
            asdict(best) | {"class_auc": dict(zip(each["class"].values.tolist(), each.values.tolist(), strict=True))}
        )
    )


def _cells(capture: "OpenCapture", layers: str, positions: str) -> dict[str, Any]:
    """The arguments of a grid; None for all."""
    from hiddenlake.cache.sites import parse_layers

    depth = max(capture.coverage.layers, default=-1) + 1
    return {
        "layers": None if layers == "all" else parse_layers(layers, depth),
        "positions": None if positions == "all" else positions.split(","),
    }


def _strengths(C: str) -> tuple[float, ...]:
    try:
        return tuple(float(c) for c in C.split(","))
    except ValueError as error:
        raise BadInputError(f"--C {C!r} is not a list of numbers such as 0.01 or 0.001,0.01") from error


@app.command("score")
def score_command(
    probe: Annotated[Path, typer.Argument(help="A probe, as `probe --keep` wrote it.", show_default=False)],
    capture: Capture,
    out: Annotated[Path | None, typer.Option(help="A .parquet or .csv file; without it a table is printed.")] = None,
    force: Annotated[
        bool, typer.Option("--force", help="Also where model, weights or precision are others; the result says so.")
    ] = False,
    rows: Annotated[int, typer.Option(help="Rows of the table.")] = 10,
    as_json: Json = False,
) -> None:
    """Score every sample of a capture by a kept probe: log-odds and probability of its positive class."""
    from hiddenlake.probing.probe import load_probe, score_capture

    found = score_capture(load_probe(probe), capture, force)
    table = found.to_dataframe().reset_index()
    if found.attrs["forced"]:
        talk(f"forced: the capture differs from the one that the probe was trained on in {found.attrs['differs']}")
    if out is not None:
        if out.suffix not in (".parquet", ".csv"):
            raise BadInputError(f"{out}: expected a file whose name ends in .parquet or .csv")
        table.to_parquet(out) if out.suffix == ".parquet" else table.to_csv(out, index=False)
        talk(f"{len(table)} samples written to {out}")
        return
    shown = table.to_dict("records")
    print(json.dumps({**found.attrs, "scores": shown})) if as_json else print_table(shown[:rows])


@app.command("heatmap")
def heatmap_command(
    grid: Annotated[Path, typer.Argument(help="A grid, as `probe` wrote it.", show_default=False)],
    out: Annotated[Path, typer.Option(help="A .png, .svg or .pdf file.")],
    compare: Annotated[Path | None, typer.Option(help="A reference grid (CSV) to draw beside it.")] = None,
    metric: Annotated[str, typer.Option(help="Which of the grid's variables.")] = "auc",
) -> None:
    """Draw a grid as the paper's layer x token heatmap."""
    from hiddenlake.probing.grid import open_grid
    from hiddenlake.probing.plots import draw_comparison, draw_heatmap

    opened = open_grid(grid)
    if compare is None:
        draw_heatmap(opened, out, metric)
    else:
        draw_comparison(opened, compare, out)
    print(out)
