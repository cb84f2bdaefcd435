"""The command `hiddenlake paper`: the experiments of "LLMs Know More Than They Show" (arXiv:2410.02707), by any model."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from hiddenlake.cache.errors import BadInputError
from hiddenlake.cli_output import Json, print_table, talk

if TYPE_CHECKING:
    from hiddenlake.cache.job import Job
    from hiddenlake.probing.experiments.table import Table

app = typer.Typer(help="The experiments of 'LLMs Know More Than They Show', by any model.", no_args_is_help=True)

Task = Annotated[
    str,
    typer.Option(
        help="triviaqa, hotpotqa, hotpotqa_with_context, natural_questions_with_context, movies, math, winobias, "
        "winogrande, mnli or imdb."
    ),
]
Model = Annotated[str, typer.Option(help="Hugging Face folder, or hub id.")]
Out = Annotated[Path, typer.Option(help="Folder for the lake, the grids and the pictures.")]
Data = Annotated[Path | None, typer.Option(help="The data set's file; by default it comes from the hub.")]
Limit = Annotated[int | None, typer.Option(help="Only the first so many questions.")]
Strict = Annotated[bool, typer.Option("--strict", help="Judge by whole words and numbers, not by substrings.")]
Extractor = Annotated[
    str | None,
    typer.Option(
        help="Who finds the exact answer in a wrong one: `same` for the model itself, http://HOST/v1 for another on an "
        "OpenAI-compatible server, `none`. Default: `same` where any text may be an answer."
    ),
]
Site = Annotated[str, typer.Option(help="Which site's activations.")]
Engine = Annotated[str, typer.Option(help="`vllm`, or `transformers`, the slower reference.")]
Dtype = Annotated[str | None, typer.Option(help="`bfloat16`, `float16` or `float32`; default the checkpoint's own.")]


@app.callback()
def paper() -> None:
    """The experiments of 'LLMs Know More Than They Show', by any model."""


@app.command("heatmap")
def heatmap_command(
    task: Task,
    model: Model,
    out: Out = Path("paper"),
    data: Data = None,
    limit: Limit = None,
    site: Site = "mlp_out",
    reference: Annotated[Path | None, typer.Option(help="A published grid (CSV) to draw beside it.")] = None,
    compat: Annotated[str | None, typer.Option(help="`llmsknow`: the paper's fit to the letter.")] = None,
    strict: Strict = False,
    extractor: Extractor = None,
    engine: Engine = "vllm",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Which layer and which token know that the answer is wrong: the paper's figures 2 and 6.

    Captures what is not captured yet, fits a probe in every cell, and draws the grid.
    """
    from hiddenlake.cache.progress import counted
    from hiddenlake.probing.experiments.heatmap import by_position, heatmap
    from hiddenlake.probing.experiments.places import paper_job, place_of
    from hiddenlake.probing.grid import best_cell

    _check_compat(compat)
    job = paper_job(task, model, data=data, limit=limit, strict=strict, extractor=extractor, sites=(site,), dtype=dtype)
    place = place_of(out, job)
    _capture(job, place.capture, engine)
    with counted(f"probing {site}") as progress:
        grid, pictures = heatmap(place, site, compat=compat, reference=reference, progress=progress)
    rows, best = by_position(grid), best_cell(grid)
    if as_json:
        print(
            json.dumps({"best": {"layer": best.layer, "position": best.position, "auc": best.auc}, "positions": rows})
        )
    else:
        print_table(rows)
    talk(
        f"{task}, {grid.attrs['n_samples']} answers: best at layer {best.layer}, {best.position}: AUC {best.auc:.3f} "
        f"({best.auc_lo:.3f} to {best.auc_hi:.3f}). {grid.attrs['note']}"
    )
    for picture in pictures:
        talk(str(picture))


@app.command("detect")
def detect_command(
    task: Task,
    model: Model,
    out: Out = Path("paper"),
    data: Data = None,
    limit: Limit = None,
    site: Site = "mlp_out",
    positions: Annotated[
        str, typer.Option(help="Tokens that are probed, by comma.")
    ] = "last_q,exact_answer_before_first,exact_answer_last,exact_answer_after_last,-2,-1",
    p_true: Annotated[
        bool, typer.Option("--p-true", help="Also ask the model whether its answer is true: 8 short prompts an answer.")
    ] = False,
    strict: Strict = False,
    extractor: Extractor = None,
    engine: Engine = "vllm",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Which scores tell wrong answers from right ones: confidence, p(True), probes. The paper's table 1."""
    from hiddenlake.cache.progress import ProgressBar, counted
    from hiddenlake.cache.store.reader import open_capture
    from hiddenlake.probing.experiments.detect import comparable, detect
    from hiddenlake.probing.experiments.p_true import p_true as ask_p_true
    from hiddenlake.probing.experiments.places import paper_job, place_of

    job = paper_job(task, model, data=data, limit=limit, strict=strict, extractor=extractor, sites=(site,), dtype=dtype)
    place = place_of(out, job)
    _capture(job, place.capture, engine)
    found, named, odds = open_capture(place.capture).dataset(), positions.split(","), None
    if p_true:
        usable, _ = comparable(found, named)
        with ProgressBar() as bar:
            odds = ask_p_true(
                found, usable, job.task.questions, model, place.other("p-true"), dtype=dtype, engine=engine, watcher=bar
            )
    with counted(f"probing {site}") as progress:
        table = detect(found, site, positions=named, p_true=odds, progress=progress)
    _show(table, place.table(f"detect-{site}"), as_json)


K = Annotated[int, typer.Option("--k", help="More answers a question, drawn at temperature 1; the paper draws 30.")]
Compat = Annotated[str | None, typer.Option(help="`llmsknow`: as the paper's code counts, where that differs.")]


@app.command("error-types")
def error_types_command(
    task: Task,
    model: Model,
    out: Out = Path("paper"),
    data: Data = None,
    limit: Limit = None,
    k: K = 30,
    site: Site = "mlp_out",
    layer: Annotated[int | None, typer.Option(help="Of the probes; by default the best one, nested.")] = None,
    position: Annotated[str | None, typer.Option(help="Of the probes; by default the best one, nested.")] = None,
    compat: Compat = None,
    strict: Strict = False,
    extractor: Extractor = None,
    engine: Engine = "vllm",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Which types of error there are, by what K more answers say, and whether the activations know: the paper's table 2."""
    from hiddenlake.cache.progress import ProgressBar, counted
    from hiddenlake.cache.store.reader import open_capture
    from hiddenlake.probing.experiments.error_types import error_types
    from hiddenlake.probing.experiments.places import LEAST, paper_job, place_of
    from hiddenlake.probing.experiments.resamples import read_resamples, resample

    _check_compat(compat)
    if (layer is None) != (position is None):
        raise BadInputError("--layer and --position name one cell together: give both, or none")
    asked = {"data": data, "limit": limit, "strict": strict, "extractor": extractor, "dtype": dtype}
    job = paper_job(task, model, sites=(site,), **asked)
    place = place_of(out, job)
    _capture(job, place.capture, engine)
    more = paper_job(task, model, samples=k, **LEAST, **asked)
    with ProgressBar() as bar:
        drawn = resample(place, more, "resampled", engine=engine, watcher=bar)
    with counted(f"probing {site}") as progress:
        table = error_types(
            open_capture(place.capture).dataset(), read_resamples(drawn, k), site,
            cell=None if layer is None else (layer, position), compat=compat, progress=progress,
        )  # fmt: skip
    _show(table, place.table(f"error-types-{site}" + (f"-{compat}" if compat else "")), as_json)


@app.command("choose")
def choose_command(
    task: Task,
    model: Model,
    out: Out = Path("paper"),
    data: Data = None,
    limit: Limit = None,
    k: K = 30,
    site: Site = "mlp_out",
    position: Annotated[str, typer.Option(help="Of the probe.")] = "exact_answer_last",
    layer: Annotated[int | None, typer.Option(help="Of the probe; by default the best one, nested.")] = None,
    compat: Compat = None,
    strict: Strict = False,
    extractor: Extractor = None,
    engine: Engine = "vllm",
    dtype: Dtype = None,
    as_json: Json = False,
) -> None:
    """Pick one of K answers: greedy, at random, by majority, by a probe. The paper's tables 13 and 14."""
    from hiddenlake.cache.progress import ProgressBar, counted
    from hiddenlake.cache.store.reader import open_capture
    from hiddenlake.probing.experiments.choose import choose, layers_of
    from hiddenlake.probing.experiments.places import paper_job, place_of
    from hiddenlake.probing.experiments.resamples import resample

    _check_compat(compat)
    asked = {"data": data, "limit": limit, "strict": strict, "extractor": extractor, "dtype": dtype, "sites": (site,)}
    job = paper_job(task, model, **asked)
    place = place_of(out, job)
    _capture(job, place.capture, engine)
    greedy = open_capture(place.capture).dataset()
    with counted("choosing a layer") as progress:
        layers = layers_of(greedy, site, position, layer=layer, progress=progress)
    needed = sorted(set(layers))
    more = paper_job(task, model, samples=k, layers=needed, positions=[position], **asked)
    with ProgressBar() as bar:
        kind = f"resampled-{site}-{'.'.join(map(str, needed))}-{position}"
        drawn = resample(place, more, kind, engine=engine, watcher=bar)
    with counted("scoring answers") as progress:
        table = choose(greedy, drawn, k, site, position, layers, compat=compat, progress=progress)
    _show(table, place.table(f"choose-{site}" + (f"-{compat}" if compat else "")), as_json)


@app.command("transfer")
def transfer_command(
    captures: Annotated[
        list[str], typer.Argument(help="Captures of several tasks by one model, as the other commands made them.")
    ],
    out: Out = Path("paper"),
    site: Site = "mlp_out",
    choose: Annotated[
        str, typer.Option(help="Whose best cell: `train`, or `target`, which is optimistic, and the paper's.")
    ] = "train",
    compat: Compat = None,
    as_json: Json = False,
) -> None:
    """Train on one task, test on another, for all pairs, against the model's own confidence: the paper's figure 3."""
    from hiddenlake.cache.progress import counted
    from hiddenlake.cache.store.reader import open_capture
    from hiddenlake.probing.experiments.places import Place
    from hiddenlake.probing.experiments.transfer import transfer
    from hiddenlake.probing.experiments.transfer_plot import draw_transfer

    _check_compat(compat)
    with counted(f"probing {site}") as progress:
        table = transfer(
            [open_capture(path) for path in captures], site, choose=choose, compat=compat, progress=progress
        )
    model = str(table.facts["model"]).replace("/", "-")
    place, kind = Place(out, f"transfer-{model}"), f"{site}-{choose}" + (f"-{compat}" if compat else "")
    _show(table, place.table(kind), as_json)
    talk(str(draw_transfer(table, place.picture(kind))))


def _check_compat(compat: str | None) -> None:
    if compat not in (None, "llmsknow"):
        raise BadInputError(f"--compat {compat!r} does not exist: expected `llmsknow`")


def _capture(job: "Job", out: Path, engine: str) -> None:
    """Capture what is left of it, and say what a language model was asked for it."""
    from hiddenlake.cache.progress import ProgressBar
    from hiddenlake.probing.experiments.places import capture_task

    with ProgressBar() as bar:
        asked = capture_task(job, out, engine=engine, watcher=bar).asked
    if asked.questions or asked.too_long:
        talk(
            f"{asked.questions} questions about answers were put to a model ({asked.prompt_tokens} tokens to read, "
            f"{asked.tokens} replied); {asked.too_long} were too long to be asked"
        )


def _show(table: "Table", path: Path, as_json: bool) -> None:
    """Save it and print it: rows to stdout, notes to stderr."""
    table.save(path)
    if as_json:
        print(json.dumps(table.to_json()))
    else:
        print_table(table.rows)
    for note in table.notes:
        talk(note)
    talk(str(path))
