"""Made: how what a page shows came about: commands, identity, versions, checks, dates."""

import platform
import shlex
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np
import xarray as xr

from hiddenlake.cache.progress import size
from hiddenlake.cache.store.catalog import describe
from hiddenlake.cache.store.reader import Capture
from hiddenlake.probing.metrics import proportion_interval
from hiddenlake.probing.report.facts import arguments

_PACKAGES = ("hiddenlake", "torch", "numpy", "scikit-learn", "xarray", "zarr", "plotly")
Facts = list[tuple[str, str]]


def answers(capture: Capture) -> Facts:
    """(what, value): how many samples there are, how many are right, and where an exact answer was found."""
    table, failures = capture.samples(), capture.failures().num_rows
    facts = [("samples", f"{len(table)} of {capture.planned} planned; {failures} could not be captured")]
    judged = np.array([value is not None for value in table["correct"].to_pylist()], bool)
    right = np.array([bool(value) for value in table["correct"].to_pylist()], bool)
    valid = table["exact_answer_valid"].to_numpy(zero_copy_only=False)
    if not judged.any():
        return [*facts, ("accuracy", "the task has no right or wrong")]
    facts.append(("accuracy", _share(int(right.sum()), int(judged.sum()))))
    for name, side in (("correct", judged & right), ("wrong", judged & ~right)):
        if side.any():
            facts.append(
                (f"{name} answers with a valid exact answer", _share(int((side & valid).sum()), int(side.sum())))
            )
    return facts


def _share(count: int, n: int) -> str:
    low, high = proportion_interval(count, n)
    return f"{count / n:.3f} (95\u00a0% {low:.3f} to {high:.3f}), {count} of {n}"


def identity(capture: Capture) -> Facts:
    """(field, value) of the value identity: what makes two activations the same numbers."""
    return list(_flat(capture.identity))


def provenance(capture: Capture) -> Facts:
    """(what, value): who made the capture, when, what it holds, and what checked it."""
    found = describe(capture)
    facts = [
        ("format", f"{found['dtype']}, codec {found['codec']}, {size(found['bytes'])} in {found['shards']} shards")
    ]
    facts += [
        ("sites", ", ".join(found["sites"])),
        ("layers", _ranges(found["layers"])),
        ("positions", ", ".join(found["positions"])),
    ]
    for one in found["provenance"]:
        facts.append(("made by", ", ".join(f"{name} {value}" for name, value in _flat(one))))
    times = sorted(commit.time for commit in capture.commits)
    if times:
        facts.append(("written", times[0] if times[0] == times[-1] else f"{times[0]} to {times[-1]}"))
    for name, loss in found["losses"].items():
        text = f"largest relative error of a row {loss['relative']:.2g}, {loss['rows']} rows measured"
        facts.append((f"lost by the codec, {name}", text))
    checked = found["verified"]
    if checked is None:
        facts.append(("verified", "not yet: no result of `hiddenlake verify` lies in the capture"))
    else:
        words = "every byte as it was committed" if checked["ok"] else f"{len(checked['problems'])} problems were found"
        facts.append(("verified", f"{checked['time']}: {words}, {checked['samples']} samples"))
    return facts


def versions() -> Facts:
    """(name, version) of what made the page; the grids name their own."""
    facts = [("page made", datetime.now(UTC).isoformat(timespec="seconds")), ("Python", platform.python_version())]
    for name in _PACKAGES:
        try:
            facts.append((name, version(name)))
        except PackageNotFoundError:
            facts.append((name, "not installed"))
    return facts


def commands(capture: Capture, grids: list[xr.Dataset]) -> list[tuple[str, str]]:
    """(what it does, what to type) to make the capture, the grids and the page again."""
    name = f"lake/{capture.place.name}"
    found = []
    if (typed := _capture_command(capture, name)) is not None:
        found.append(("the capture; give the model's folder or hub id, and the task's name or file", typed))
    lines = ["import hiddenlake", f"capture = hiddenlake.open_capture({name!r})"]
    saved = []
    for number, grid in enumerate(grids):
        site = str(grid.attrs["site"])
        saved.append(f"grids/{site}.zarr" if len(grids) == 1 else f"grids/{number + 1}-{site}.zarr")
        lines.append(f"grid = hiddenlake.fit_grid(capture, {site!r}, {_grid_arguments(capture, grid)})")
        lines.append(f"hiddenlake.save_grid(grid, {saved[-1]!r})")
    found.append((f"the grid{'s' * (len(grids) > 1)}, in Python", "\n".join(lines)))
    page = ["hiddenlake", "report", name, *(part for path in saved for part in ("--grid", path))]
    return [*found, ("this page", shlex.join(page))]


def _capture_command(capture: Capture, name: str) -> str | None:
    """None where answers were given, served or imported: no one command makes them again."""
    identity, c = capture.identity, capture.coverage
    decoding = identity.get("decoding")
    sampling = decoding.get("sampling") if isinstance(decoding, dict) else None
    if sampling != "greedy" and not isinstance(sampling, dict):
        return None
    table = capture.samples()
    tokens = [] if c.tokens is None else [str(c.tokens)]
    typed: list[Any] = [
        "hiddenlake", "capture", "--model", identity.get("model"), "--task", identity.get("task"),
        "--limit", max(table["index"].to_pylist(), default=0) + 1, "--sites", ",".join(c.sites), "--layers", _ranges(c.layers),
        f"--positions={','.join([*c.positions, *tokens])}", "--dtype", identity.get("compute_dtype"),
        "--max-new-tokens", decoding["max_new_tokens"],
    ]  # fmt: skip
    if isinstance(sampling, dict):
        for option in ("temperature", "top_p", "top_k", "seed"):
            if option in sampling:
                typed += [f"--{option.replace('_', '-')}", sampling[option]]
        for stop in sampling.get("stop", []):
            typed += ["--stop", stop]
    samples = max(table["sample_index"].to_pylist(), default=0) + 1
    typed += ["--samples", samples] * (samples > 1)
    engines = sorted({str(commit.provenance.get("engine")) for commit in capture.commits})
    typed += ["--engine", *engines] * (len(engines) == 1 and engines != ["vllm"])
    typed += ["--codec", capture.codec] * (capture.codec != "none")
    if identity.get("lora"):
        typed += ["--lora", "FOLDER"]
    return shlex.join(map(str, [*typed, "--out", name]))


def _grid_arguments(capture: Capture, grid: xr.Dataset) -> str:
    """In Python: everything that decides the numbers; layers and positions where they are not all of the capture's."""
    attrs, given = grid.attrs, arguments(grid) if grid.attrs.get("compat", "none") == "none" else {}
    if not given:
        given = {"label": attrs["label"], "compat": attrs["compat"], "seed": int(attrs["seed"])}
    else:
        given |= {"C": tuple(map(float, grid.C.values)), "shuffles": int(attrs["shuffles"])}
    if grid.layer.values.tolist() != list(capture.coverage.layers):
        given["layers"] = grid.layer.values.tolist()
    if grid.position.values.tolist() != list(capture.coverage.positions):
        given["positions"] = grid.position.values.tolist()
    return ", ".join(f"{name}={value!r}" for name, value in given.items())


def _flat(document: dict[str, Any], prefix: str = "") -> Any:
    for name, value in document.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", ", ".join(map(str, value)) if isinstance(value, list) else str(value)


def _ranges(numbers: Any) -> str:
    """0-2,5 of sorted numbers."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ",".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)
