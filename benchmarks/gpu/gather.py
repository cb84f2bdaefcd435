"""The gather kernel on CUDA: is it right, and how near to the memory's bandwidth is it?

    python benchmarks/gpu/gather.py [--quick] [--json FILE]

Every tap of a case runs in one CUDA graph, as in vLLM's decoding, on activations of its own, so that the L2 cache
holds none of them. Compared with torch's index_select + add + index_copy in a graph of its own, and with the
device-to-device copy of a large buffer, which is the limit. GB/s count what must be moved: wanted rows, read and
written once. Rounds are interleaved. Needs torch, triton and numpy only.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from _kernels import COPIED, LIMIT, about, device_copy, in_turns, kernel
from _table import Row, compare, print_table, write_json

ROUNDS, QUICK = 20, 5
TORCH = "torch index_select + add + index_copy"


@dataclass(frozen=True)
class Case:
    """`wanted` of `rows` rows out of `tokens`, for each tap, packed into rows of taps x width of `slots`."""

    name: str
    tokens: int
    rows: int
    wanted: int
    width: int
    taps: int
    residual: bool
    slots: int

    @property
    def bytes(self) -> int:
        return self.taps * self.wanted * self.width * 2 * (3 if self.residual else 2)  # bfloat16


CASES = (
    Case("decode, 256 rows x 4096, 32 layers x 4 sites", 256, 256, 256, 4096, 128, True, 4096),
    Case("decode, 256 rows x 14336 (mlp_act), 32 layers", 256, 256, 256, 14336, 32, False, 4096),
    Case("prefill of 8192 tokens, 64 rows x 4096 wanted", 8192, 8192, 64, 4096, 32, True, 8193),
    Case("prefill of 8192 tokens, all rows x 4096 wanted", 8192, 8192, 8192, 4096, 8, True, 8193),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"{QUICK} rounds instead of {ROUNDS}")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu/gather.py needs a CUDA device, and torch sees none.")
    rounds = QUICK if arguments.quick else ROUNDS
    facts = about()
    print(f"{facts}\n")
    rows = [row for case in CASES for row in measured(case, rounds)] + [host(rounds)]
    print_table(rows)
    if arguments.json:
        write_json(arguments.json, rows, facts)


gather = kernel("gather")


def make(case: Case) -> list[tuple]:
    """The arguments of gather_rows for every tap, random activations. The last slot is never wanted."""
    make_random = partial(torch.randn, case.tokens, case.width, device="cuda", dtype=torch.bfloat16)
    rows = torch.zeros(case.rows, dtype=torch.int64, device="cuda")
    rows[: case.wanted] = torch.randperm(case.tokens, device="cuda")[: case.wanted]
    slots = torch.full_like(rows, case.slots - 1)
    slots[: case.wanted] = torch.randperm(case.slots - 1, device="cuda")[: case.wanted]
    count = torch.tensor([case.wanted], device="cuda")
    out = torch.full((case.slots, case.taps * case.width), torch.nan, dtype=torch.bfloat16, device="cuda")
    return [
        (make_random(), make_random() if case.residual else None, rows, slots, count, out, tap * case.width)
        for tap in range(case.taps)
    ]


def torch_way(hidden, residual, rows, slots, count, out, offset) -> None:
    """All rows, since a graph's shapes are fixed: padding is row 0, and lands in the slot that nobody reads."""
    selected = hidden.index_select(0, rows)
    if residual is not None:
        selected += residual.index_select(0, rows)
    out.narrow(1, offset, hidden.shape[1]).index_copy_(0, slots, selected)


def check(case: Case, taps: list[tuple]) -> None:
    """Every bit of out, which was NaN everywhere, is what the reference makes of it."""
    expected = torch.empty(case.slots, case.width, dtype=torch.bfloat16, device="cuda")
    for hidden, residual, rows, slots, count, out, offset in taps:
        gather.gather_rows_reference(hidden, residual, rows, slots, count, expected.fill_(torch.nan), 0)
        found = out.narrow(1, offset, case.width)
        differs = found.view(torch.int16) != expected.view(torch.int16)
        if differs.any():
            r, c = differs.nonzero()[0].tolist()
            sys.exit(f"{case.name}: wrong at row {r}, column {offset + c}: {found[r, c]}, expected {expected[r, c]}.")


def measured(case: Case, rounds: int) -> list[Row]:
    """Two rows: against torch, and against the limit."""
    taps = make(case)
    ours = captured(gather.gather_rows, taps)
    taps[0][5].fill_(torch.nan)
    ours()
    check(case, taps)
    times = in_turns(rounds, ours, captured(torch_way, taps), device_copy())
    moved = (case.bytes, case.bytes, 2 * COPIED)
    speeds = [[m / t / 1e9 for t in each] for m, each in zip(moved, times, strict=True)]
    note = f"{statistics.median(times[0]) / case.taps * 1e6:.2f} us a tap"
    return [
        compare(case.name, "GB/s", speeds[0], rival, name, goal=goal, less_is_better=False, note=note)
        for rival, name, goal in ((speeds[1], TORCH, 1.0), (speeds[2], LIMIT, None))
    ]


def host(rounds: int) -> Row:
    """Outside a graph (long prefills) the host pays for every launch."""
    taps = make(Case("", 8, 8, 8, 4096, 100, True, 16))
    times: tuple[list[float], list[float]] = ([], [])
    for k in range(rounds + 1):
        for function, kept in zip((gather.gather_rows, torch_way), times, strict=True):
            torch.cuda.synchronize()
            start = time.perf_counter()
            for tap in taps:
                function(*tap)
            if k:
                kept.append((time.perf_counter() - start) / len(taps) * 1e6)
    return compare("one call outside a graph", "us of the host", *times, TORCH)


def captured(function: Callable, taps: list[tuple]) -> Callable[[], None]:
    """A CUDA graph of the function on every tap, called once before, as vLLM does."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for tap in taps:
            function(*tap)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for tap in taps:
            function(*tap)
    return graph.replay


if __name__ == "__main__":
    main()
