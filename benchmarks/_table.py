"""Rows of a benchmark: ours beside a rival, as ratios with their spread; printed, and written as JSON."""

import json
import os
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

_RESAMPLES = 4_000

# Three of a kind can agree by chance; two always span their interval.
_FEWEST_ROUNDS = 3


@dataclass(frozen=True)
class Row:
    """One comparison. ratio = ours / rival, round by round; low and high are the 90 % interval of its centre.

    ours, rival : medians, in `unit`.  wall : the ratio of the wall clock times, beside ratios of CPU seconds.
    goal : what the interval's worse end must reach; stretch : what it would be good to reach.  met : goal reached.
    note : what is to be known of these numbers, or why there are none.  means : one line for the table's foot.
    """

    case: str
    unit: str
    ours: float | None
    rival: float | None
    rival_name: str
    ratio: float | None = None
    ratio_low: float | None = None
    ratio_high: float | None = None
    wall_ratio: float | None = None
    goal: float | None = None
    stretch: float | None = None
    met: bool | None = None
    rounds: int = 0
    note: str = ""
    means: str = ""


def compare(
    case: str,
    unit: str,
    ours: Sequence[float],
    rival: Sequence[float],
    rival_name: str,
    *,
    goal: float | None = None,
    stretch: float | None = None,
    less_is_better: bool = True,
    judged: bool = True,
    walls: tuple[Sequence[float], Sequence[float]] | None = None,
    note: str = "",
    means: str = "",
) -> Row:
    """A row from what each side measured in the same rounds. Its goal is not judged below three rounds, or unless `judged`."""
    ratio, low, high = spread(ours, rival)
    met = None
    if judged and goal is not None and low is not None:
        met = bool(high <= goal if less_is_better else low >= goal)
    return Row(
        case, unit, float(np.median(ours)), float(np.median(rival)), rival_name, ratio, low, high,
        spread(*walls)[0] if walls else None, goal, stretch, met, len(ours), note, means,
    )  # fmt: skip


def spread(ours: Sequence[float], rival: Sequence[float]) -> tuple[float, float | None, float | None]:
    """(centre of the rounds' ratios, low, high): a 90 % bootstrap interval, None below three rounds.

    The centre is that of Hodges and Lehmann, the median of the means of all pairs: a few disturbed rounds move it no more
    than they move a median, and it needs a third fewer rounds.
    """
    ratios = np.asarray(ours) / np.asarray(rival)
    centre = float(_centre(ratios[None])[0])
    if len(ratios) < _FEWEST_ROUNDS:
        return centre, None, None
    picks = np.random.default_rng(0).integers(len(ratios), size=(_RESAMPLES, len(ratios)))
    low, high = np.quantile(_centre(ratios[picks]), [0.05, 0.95])
    return centre, float(low), float(high)


def _centre(ratios: np.ndarray) -> np.ndarray:
    """(resample,) of (resample, round)."""
    first, second = np.triu_indices(ratios.shape[1])
    return np.median((ratios[:, first] + ratios[:, second]) / 2, axis=1)


def print_table(rows: Sequence[Row]) -> None:
    """As Markdown; below it, one line says what each kind of row means."""
    print("| what | unit | hiddenlake | compared with | ratio (90 %) | wall | goal | note |")
    print("|---|---|---|---|---|---|---|---|")
    for row in rows:
        values = [row.case, row.unit, _number(row.ours), f"{_number(row.rival)} {row.rival_name}".strip()]
        interval = "" if row.ratio_low is None else f" ({_ratio(row.ratio_low)} to {_ratio(row.ratio_high)})"
        values += [_ratio(row.ratio) + interval, _ratio(row.wall_ratio), _goal(row), row.note]
        print(f"| {' | '.join(values)} |")
    print()
    for means in dict.fromkeys(row.means for row in rows if row.means):
        pairs = dict.fromkeys(f"{row.case} / {row.rival_name}" for row in rows if row.means == means)
        print(f"- {'; '.join(pairs)}: {means}.")


def write_json(file: Path, rows: Sequence[Row], machine: dict[str, Any]) -> None:
    file.write_text(json.dumps({"machine": machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")


def machine(*packages: str) -> dict[str, Any]:
    """{"cpu", "cores", "memory_gib", "python", "versions": of packages}."""
    model = next(
        (line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line),
        platform.processor(),
    )
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def _ratio(value: float | None) -> str:
    """1.043, or 1/18.4 where ours is a small part of the rival's."""
    if value is None:
        return ""
    return f"1/{1 / value:.1f}" if 0 < value < 0.5 else f"{value:.3f}"


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    number = _number if row.ratio is None else _ratio  # what is no comparison is judged as it is
    stretch = f", stretch {number(row.stretch)}" if row.stretch else ""
    return f"{number(row.goal)}{stretch}: {'not judged' if row.met is None else 'met' if row.met else 'missed'}"
