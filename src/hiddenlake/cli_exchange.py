"""Commands that write captures as files for other tools, and make captures of what other tools dumped."""

import json
from pathlib import Path
from typing import Annotated

import typer

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cli_output import EXIT_FAILED_SAMPLES, EXIT_INTERRUPTED, Capture, Json, byte_count, numbers, talk

app = typer.Typer()


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
            shard_bytes=byte_count("--shard-bytes", shard_bytes),
            memory_bytes=byte_count("--memory-bytes", memory_bytes),
            watcher=meter,
        )
    if as_json:
        print(json.dumps(asdict(written)))
    talk(f"{written.samples} samples in {written.files} files, {size(written.bytes)}, written to {written.path}")


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
    out: Annotated[
        str, typer.Argument(help="The new capture: LAKE/NAME, or s3://BUCKET/LAKE/NAME.", show_default=False)
    ],
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
    dtype: Annotated[
        str | None, typer.Option(help="`bfloat16`, `float16` or `float32`; default what holds all exactly.")
    ] = None,
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
                numbers("--layer-ids", layer_ids or ""),
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
                numbers("--layers", layers) if layers else [],
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
            done = import_source(
                opened, out, known, buffer_bytes=byte_count("--buffer-bytes", buffer_bytes), watcher=meter
            )
    except KeyboardInterrupt:
        talk("interrupted: what was complete is stored; the same command goes on from here")
        raise typer.Exit(EXIT_INTERRUPTED) from None
    if as_json:
        print(json.dumps(asdict(done)))
    talk(
        f"{done.imported} samples imported into {done.path}, {size(done.bytes)}; {done.present} were there before, "
        f"{done.failed} failed" + (f", {done.elsewhere} are another process's" if done.elsewhere else "")
    )
    for cause in sorted(set(done.causes.values()))[:10]:
        talk(f"  failed: {cause} ({sum(c == cause for c in done.causes.values())} samples)")
    if done.failed:
        raise typer.Exit(EXIT_FAILED_SAMPLES)
