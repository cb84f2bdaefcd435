"""What capture costs on a GPU, and whether CUDA graphs leave its values as they are.

    python benchmarks/gpu/capture.py [--quick] [--small] [--captures NAME,...] [--rounds N] [--runner v1|v2]
                                     [--folder DIR] [--json FILE]
    python benchmarks/gpu/capture.py --check [--json FILE]

A Llama-3.1-8B shape with random weights (load_format="dummy": nothing is downloaded) answers prompts of 64 tokens,
256 at once, with 128 tokens each, CUDA graphs on (--quick: few prompts, 64 tokens, one site only). vLLM as it is
shipped and hiddenlake have a process and half of the card each; rounds alternate, each with prompts that neither has
seen. A ratio is of tokens a second by the wall clock, so the GPU must be ours alone. --small takes a shape that any
GPU holds, to try this out.

--check captures every token at every site of a small model with weights, without graphs and with them, on each of
vLLM's model runners, and compares the rows with each other and with Hugging Face.

Untested versions of vLLM and its V2 runner are refused elsewhere; here they are tried.
"""

import argparse
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import torch
from _arms import ArmError
from _bench import BATCH, ONE_STEP_MORE, VLLM, Bench, Capture, Size, rates
from _check import check
from _device import facts, link_bandwidth, staging_bandwidth, token_latency
from _model import LLAMA_8B, SMALL, Shape, make_model
from _table import Row, compare, print_table, write_json

from hiddenlake.cache.model import cache_folder

FULL = Size(prompt_tokens=64, new_tokens=128, rounds=5)
QUICK = Size(prompt_tokens=64, new_tokens=64, rounds=3)

# batches : what a disk of 64 GB holds of one round.  waiting : what 128 GB of memory hold beside two engines.
CAPTURES = {
    "one-site": Capture("1 site, 15 positions", ("mlp_out",), ("paper",), waiting=2.0, batches=12, goal=0.95),
    "four-sites": Capture(
        "4 sites, 15 positions", ("resid_post", "attn_out", "mlp_in", "mlp_out"), ("paper",), waiting=1.5, batches=3
    ),
    "all-tokens": Capture("1 site, all tokens", ("mlp_out",), ("all",), waiting=1.25, batches=1),
}

VARIABLES = {"v1": {"VLLM_USE_V2_MODEL_RUNNER": "0"}, "v2": {"VLLM_USE_V2_MODEL_RUNNER": "1"}}


def overhead(bench: Bench, capture: Capture, link: float) -> list[Row]:
    """Rows of one capture; one that says why where it could not run."""
    try:
        vllm, ours = bench.vllm(), bench.ours(capture)
        costs = bench.measure(capture, ours, vllm)
        ours.close()
    except ArmError as error:
        print(error.arm.log_tail(), file=sys.stderr)
        error.arm.close()
        return [Row(capture.name, "tokens/s", None, None, VLLM, goal=capture.goal, note=str(error))]
    name, mine = capture.name, costs[capture.name]
    means = (
        f"all layers of {', '.join(capture.sites)}, {capture.batches * BATCH} answers a round, fsynced and committed"
    )
    judged = bench.shape is LLAMA_8B and bench.size.new_tokens == FULL.new_tokens
    rows = [
        compare(
            name, "tokens/s", rates(mine, "tokens"), rates(costs[rival], "tokens"), rival,
            goal=capture.goal if rival == VLLM else None, less_is_better=False, judged=judged, means=means,
        )
        for rival in (VLLM, ONE_STEP_MORE)
    ]  # fmt: skip
    rows += [
        compare(
            f"1 step more ({name})", "tokens/s", rates(costs[ONE_STEP_MORE], "tokens"), rates(costs[VLLM], "tokens"),
            VLLM, less_is_better=False,
            means="vLLM alone, answers one token longer that is not counted: what the last token's step costs by itself",
        ),
        compare(
            name, "GB/s home", [home / 1e9 for home in rates(mine, "home")], [link / 1e9] * len(mine),
            "one large copy into pinned memory (the limit)", less_is_better=False,
            means="rows that may be wanted, from the device to the host while the model generates",
        ),
        compare(
            name, "GB/s stored", [stored / 1e9 for stored in rates(mine, "stored")],
            [written / 1e9 for written in bench.written[-len(mine) :]],
            "a file written and fsynced there (the limit)", less_is_better=False,
            means="activations in committed shards, by the wall clock of the round",
        ),
    ]  # fmt: skip
    return rows


def copies(shape: Shape) -> list[Row]:
    """How near the copies of a step come to the link when nothing else uses it, and what waits behind them."""
    table = CAPTURES["one-site"].table(shape)
    case = f"{BATCH} rows x {len(table) * 2} bytes a step"
    speeds = [(staging_bandwidth(table, BATCH) / 1e9, link_bandwidth() / 1e9) for _ in range(5)]
    waits = [token_latency(table, BATCH) for _ in range(5)]
    return [
        compare(
            case, "GB/s", *map(list, zip(*speeds, strict=True)), "one large copy into pinned memory (the limit)",
            less_is_better=False, means="rows of one site, all layers, by hiddenlake's own staging, no model running",
        ),
        compare(
            case, "us", *([1e6 * wait for wait in each] for each in zip(*waits, strict=True)), "without them",
            means="until the host has a step's sampled tokens, copied beside the rows",
        ),
    ]  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare values with and without graphs; no timing")
    parser.add_argument("--quick", action="store_true", help="minutes: one site, fewer and shorter answers")
    parser.add_argument("--small", action="store_true", help="8 layers x 1024 instead of an 8B shape")
    parser.add_argument("--captures", default=",".join(CAPTURES), help=f"some of {', '.join(CAPTURES)}; default all")
    parser.add_argument("--rounds", type=int, help="rounds of each capture")
    parser.add_argument("--runner", choices=VARIABLES, default="v1", help="vLLM's model runner under capture")
    parser.add_argument(
        "--folder", type=Path, help="where captures are written; default: under the user's cache folder"
    )
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    names = arguments.captures.split(",")
    if unknown := sorted(set(names) - set(CAPTURES)):
        parser.error(f"no capture {', '.join(unknown)}: expected some of {', '.join(CAPTURES)}")
    if not torch.cuda.is_available():
        sys.exit("benchmarks/gpu/capture.py needs a CUDA device, and torch sees none.")
    home = arguments.folder or cache_folder() / "benchmarks"
    home.mkdir(parents=True, exist_ok=True)
    machine = facts() | {"folder": str(home)}
    print(machine, file=sys.stderr)
    with tempfile.TemporaryDirectory(dir=home) as folder, ExitStack() as stack:
        if arguments.check:
            rows = check(Path(folder), VARIABLES)
        else:
            size = QUICK if arguments.quick else FULL
            size = replace(size, rounds=arguments.rounds) if arguments.rounds else size
            shape = SMALL if arguments.small else LLAMA_8B
            captures = [CAPTURES[name] for name in names]
            if arguments.quick:
                captures = [replace(CAPTURES["one-site"], batches=2)]
            for capture in captures:
                waiting = capture.ring_bytes(shape, size) / 2**30
                print(f"{capture.name}: {waiting:.1f} GiB of pinned host memory for waiting rows", file=sys.stderr)
            model = make_model(Path(folder) / "model", shape, weights=False)
            bench = Bench(Path(folder), model, shape, size, VARIABLES[arguments.runner], stack)
            machine |= {"shape": shape.name, "at once": BATCH, "new tokens": size.new_tokens}
            machine["engines"] = bench.engines
            rows = copies(shape)
            link = link_bandwidth()
            for capture in captures:
                rows += overhead(bench, capture, link)
                if arguments.json:  # what is known by now, should time run out
                    write_json(arguments.json, rows, machine)
    print(f"\n{machine}\n")
    print_table(rows)
    if arguments.json:
        write_json(arguments.json, rows, machine)
    if any(row.met is False for row in rows) and arguments.check:
        sys.exit(1)


if __name__ == "__main__":
    main()
