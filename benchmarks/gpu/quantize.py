"""The fp8 kernel on CUDA: is it right, and how near to the memory's bandwidth is it?

    python benchmarks/gpu/quantize.py [--quick] [--json FILE]

Rows of bfloat16 become float8_e4m3fn codes and a float32 scale each, ten times as many bytes as the L2 cache holds.
Compared with the same in plain torch, and with the device-to-device copy of a large buffer, which is the limit.
GB/s count what must be moved: values read once, codes and scales written once. Rounds are interleaved. Needs torch,
triton and numpy only.
"""

import argparse
import statistics
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _kernels import COPIED, LIMIT, about, device_copy, in_turns, kernel
from _table import Row, compare, print_table, write_json

ROUNDS, QUICK = 20, 5
TORCH = "the same in plain torch"
OUTLIER = 28288.0  # the largest activation that was measured, beside values of about 1

quantize = kernel("quantize")


@dataclass(frozen=True)
class Case:
    """`rows` rows of `width` columns."""

    name: str
    rows: int
    width: int

    @property
    def bytes(self) -> int:
        return self.rows * (self.width * (2 + 1) + 4)  # bfloat16, a code each, a scale


CASES = (
    Case("576 columns (SmolLM2)", 1 << 19, 576),
    Case("4096 columns (8B)", 1 << 16, 4096),
    Case("14336 columns (8B, mlp_act)", 18725, 14336),
    Case("28672 columns (70B, mlp_act), read twice", 9362, 28672),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rounds instead of {ROUNDS}")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu/quantize.py needs a CUDA device, and torch sees none.")
    rounds = QUICK if arguments.quick else ROUNDS
    facts = about()
    print(f"{facts}\n")
    rows = [row for case in CASES for row in measured(case, rounds)]
    print_table(rows)
    if arguments.json:
        write_json(arguments.json, rows, facts)


def make(case: Case, device: str) -> torch.Tensor:
    """Normal rows of many sizes; every 16th has an outlier, every 64th is zero, and the one after it absent (NaN)."""
    values = torch.randn(case.rows, case.width, device=device, dtype=torch.bfloat16)
    values *= torch.logspace(-6, 6, case.rows, device=device)[:, None].bfloat16()
    values[::16, case.width // 2] = OUTLIER
    values[::64] = 0
    values[1::64] = torch.nan
    return values


def check(case: Case, values: torch.Tensor, codes: torch.Tensor, scale: torch.Tensor) -> None:
    """Every bit is what the reference makes of the values; where it is not, say where, and stop."""
    right, right_scale = quantize.quantize_rows_reference(values)
    wrong = (scale.view(torch.int32) != right_scale.view(torch.int32)) & ~(scale.isnan() & right_scale.isnan())
    if wrong.any():
        r = wrong.nonzero()[0].item()
        sys.exit(f"{case.name}: wrong scale of row {r}: {scale[r].item()!r}, expected {right_scale[r].item()!r}.")
    differs = codes != right
    if differs.any():
        r, c = differs.nonzero()[0].tolist()
        found, expected = codes[r, c].item(), right[r, c].item()
        sys.exit(f"{case.name}: wrong at row {r}, column {c}: {found:#04x}, expected {expected:#04x}.")


def measured(case: Case, rounds: int) -> list[Row]:
    """Two rows: against torch, and against the limit."""
    values = make(case, "cuda")
    check(case, values, *quantize.quantize_rows(values))
    ours = partial(quantize.quantize_rows, values)
    times = in_turns(rounds, ours, partial(quantize.quantize_rows_reference, values), device_copy())
    moved = (case.bytes, case.bytes, 2 * COPIED)
    speeds = [[m / t / 1e9 for t in each] for m, each in zip(moved, times, strict=True)]
    note = f"{statistics.median(times[0]) / case.rows * 1e9:.2f} ns a row"
    return [
        compare(case.name, "GB/s", speeds[0], rival, name, goal=goal, less_is_better=False, note=note)
        for rival, name, goal in ((speeds[1], TORCH, 1.0), (speeds[2], LIMIT, None))
    ]


if __name__ == "__main__":
    main()
