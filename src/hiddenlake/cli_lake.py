"""Commands for captures that are there: their size, copies, labels, repair and removal."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cli_output import Capture, Json, numbers, talk

app = typer.Typer()
label_app = typer.Typer(help="Labels by sample key, beside the captured columns.", no_args_is_help=True)
app.add_typer(label_app, name="label")

Lake = Annotated[str, typer.Argument(help="A folder of captures, or one capture.", show_default=False)]
Codec = Annotated[
    str | None, typer.Option(help="`none`, `zstd`, or `fp8` (loses something, and says what); default the capture's.")
]
ShardSamples = Annotated[int | None, typer.Option(help="Samples a shard; default what reads are fastest with.")]


@app.command("du")
def du_command(lake: Lake, as_json: Json = False) -> None:
    """Say what captures take on the disk, site by site."""
    from hiddenlake.cache.progress import size
    from hiddenlake.cache.store.usage import usage

    rows = usage(lake)
    if as_json:
        print(json.dumps(rows))
        return
    for row in rows:
        parts = sorted(row["parts"].items(), key=lambda part: -part[1])
        print(f"{size(row['bytes'])}  {row['path']}")
        for name, bytes_ in parts:
            print(f"  {size(bytes_)}  {name}")


@app.command("select")
def select_command(
    capture: Capture,
    out: Annotated[str, typer.Argument(help="The new capture.", show_default=False)],
    sites: Annotated[str | None, typer.Option(help="Sites, by comma; default all.")] = None,
    layers: Annotated[str | None, typer.Option(help="0-based layers: 13 or 0,5,10-12; default all.")] = None,
    positions: Annotated[str | None, typer.Option(help="Positions, by comma; `none` for tokens alone.")] = None,
    samples: Annotated[
        str | None, typer.Option(help="Keys by comma, rows in task order (0-99,120), or @FILE with a key a line.")
    ] = None,
    tokens: Annotated[bool, typer.Option(help="Whether token-level data are copied.")] = True,
    codec: Codec = None,
    shard_samples: ShardSamples = None,
    as_json: Json = False,
) -> None:
    """Copy a part of a capture: some sites, layers, positions or samples. The same command goes on where it stopped."""
    from hiddenlake.cache.store.copying import plan_select
    from hiddenlake.cache.store.reader import open_capture

    source = open_capture(capture)
    plan = plan_select(
        source,
        sites=sites and sites.split(","),
        layers=numbers("--layers", layers) if layers else None,
        positions=() if positions == "none" else positions and positions.split(","),
        samples=_samples(samples, source.keys) if samples else None,
        tokens=tokens,
        codec=codec,
    )
    _copy(plan, out, shard_samples, as_json)


@app.command("merge")
def merge_command(
    out: Annotated[str, typer.Argument(help="The new capture.", show_default=False)],
    captures: Annotated[list[str], typer.Argument(help="Captures of one identity, without common samples.")],
    codec: Codec = None,
    shard_samples: ShardSamples = None,
    as_json: Json = False,
) -> None:
    """Copy the samples of several captures into one."""
    from hiddenlake.cache.store.copying import plan_merge
    from hiddenlake.cache.store.reader import open_capture

    _copy(plan_merge([open_capture(path) for path in captures], codec), out, shard_samples, as_json)


def _copy(plan: Any, out: str, shard_samples: int | None, as_json: bool) -> None:
    from hiddenlake.cache.progress import counted, size
    from hiddenlake.cache.store.backend import open_backend
    from hiddenlake.cache.store.copying import copy
    from hiddenlake.cache.store.reader import open_capture

    talk(f"{plan.samples} samples, {size(plan.bytes)} of activations (codec {plan.codec}), into {out}")
    with counted("copying samples") as progress:
        copied = copy(plan, open_backend(out), shard_samples=shard_samples, progress=progress)
    losses = {name: asdict(loss) for name, loss in open_capture(out).losses().items()}
    if as_json:
        print(json.dumps({"samples": plan.samples, "copied": copied, "bytes": plan.bytes, "losses": losses}))
    talk(f"{copied} samples copied, {plan.samples - copied} were there before")
    for name, loss in losses.items():
        talk(
            f"  {name}: fp8 lost up to {loss['relative']:.4f} of a row's length, 1 - cosine {loss['cosine']:.2e} on average"
        )


@app.command("compact")
def compact_command(capture: Capture, shard_samples: ShardSamples = None, as_json: Json = False) -> None:
    """Write a capture that came in small shards again in large ones, verify it, and put it in its own place."""
    from hiddenlake.cache.progress import counted, size
    from hiddenlake.cache.store.compact import compact, plan_compact

    plan = plan_compact(capture)
    talk(
        f"{plan.samples} samples, {size(plan.bytes)} of activations are written beside {capture} and then take its place"
    )
    with counted("compacting samples") as progress:
        done = compact(capture, shard_samples=shard_samples, progress=progress)
    if as_json:
        print(json.dumps(asdict(done)))
    talk(f"{done.shards[0]} shards became {done.shards[1]}, {size(done.bytes[0])} became {size(done.bytes[1])}")


@app.command("repair")
def repair_command(capture: Capture, as_json: Json = False) -> None:
    """Mend a damaged capture. Exit status 1 when samples were lost; the same capture command makes them again."""
    from hiddenlake.cache.progress import counted
    from hiddenlake.cache.store.repair import repair

    with counted("repairing shards") as progress:
        done = repair(capture, progress)
    if as_json:
        print(json.dumps(asdict(done)))
    for name in done.rebuilt:
        talk(f"made again: {name}")
    talk(
        f"{len(done.rebuilt)} files made again, {done.moved} samples moved out of damaged shards, {len(done.lost)} lost"
    )
    for key in done.lost:
        talk(f"lost: {key}")
    if done.lost:
        raise typer.Exit(1)


@app.command("rm")
def rm_command(
    captures: Annotated[list[str], typer.Argument(help="Captures.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
) -> None:
    """Remove captures, for good."""
    from hiddenlake.cache.store.removal import remove_capture

    for path in captures:
        _confirm(path, yes)
        remove_capture(path)
        talk(f"{path} removed")


@app.command("purge")
def purge_command(
    captures: Annotated[list[str], typer.Argument(help="Captures: LAKE/NAME.", show_default=False)],
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask.")] = False,
    as_json: Json = False,
) -> None:
    """Remove captures with every trace of their prompts that their lake keeps, and search the rest of it for some.

    Exit status 1 when something is left, e.g. in another capture of the same prompts.
    """
    from hiddenlake.cache.progress import size
    from hiddenlake.cache.service.purging import purge

    found = []
    for path in captures:
        _confirm(path, yes)
        found.append(done := purge(path))
        talk(
            f"{path} removed, {done.samples} samples; {done.files} other files, {size(done.bytes)}, searched for traces"
        )
        for what in done.left:
            talk(f"left: {what}")
    if as_json:
        print(json.dumps([asdict(done) for done in found]))
    if any(done.left for done in found):
        raise typer.Exit(1)


def _confirm(path: str, yes: bool) -> None:
    """Raises BadInputError where a capture is to stay, or nobody can be asked."""
    from hiddenlake.cache.progress import size
    from hiddenlake.cache.store.catalog import list_captures

    if yes:
        return
    row = next(iter(list_captures(path)), {})
    what = f"{row.get('samples', '?')} samples, {size(row.get('bytes', 0))}"
    if not sys.stdin.isatty() or not typer.confirm(f"remove {path} ({what})?", err=True):
        raise BadInputError(f"{path} was not removed: say --yes where nobody can be asked")


@app.command("gc")
def gc_command(
    lake: Lake,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only say what would be removed.")] = False,
    as_json: Json = False,
) -> None:
    """Remove what dead processes left: unfinished files, shards without a commit, half-made folders."""
    from hiddenlake.cache.progress import size
    from hiddenlake.cache.store.removal import collect_garbage

    found = collect_garbage(lake, dry=dry_run)
    if as_json:
        print(json.dumps([asdict(leftover) for leftover in found]))
    else:
        for leftover in found:
            print(f"{size(leftover.bytes)}  {leftover.path}")
    total = sum(leftover.bytes for leftover in found)
    talk(f"{len(found)} leftovers, {size(total)}{' would be' if dry_run else ''} removed")


@label_app.command("add")
def label_add_command(
    capture: Capture,
    name: Annotated[str, typer.Argument(help="The variable it becomes.", show_default=False)],
    file: Annotated[Path, typer.Argument(help="Parquet or CSV with a column `key`.", show_default=False)],
    replace: Annotated[bool, typer.Option("--replace", help="Instead of labels of this name.")] = False,
) -> None:
    """Add columns to a capture's samples, by key. Samples that the file does not name get null."""
    from hiddenlake.cache.store.labels import add_label
    from hiddenlake.cache.store.reader import open_capture

    opened = open_capture(capture)
    labelled = add_label(opened, name, file, replace)
    talk(f"{labelled} of {len(opened)} samples labelled")


def _samples(text: str, keys: list[str]) -> list[str | int]:
    """Keys, or rows where nothing that is asked for is a key."""
    if text.startswith("@"):
        try:
            return [line for line in Path(text[1:]).read_text("utf-8").split() if line]
        except OSError as error:
            raise BadInputError(f"{text[1:]}: {error.strerror}: expected a file with a key a line") from error
    parts = text.split(",")
    return list(parts) if set(parts) & set(keys) else list(numbers("--samples", text))
