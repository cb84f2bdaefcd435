"""What the service costs, beside nginx that serves the same bytes as a file.

    python benchmarks/service.py [--quick] [--json FILE] [--no-misses]

Over loopback, one and 64 clients by wrk, keep-alive, everything in the page cache; rounds of 4 s, and of 16 s where they are
named, go through all in rotated order. nginx is there twice: as the system has it, and with the TCP congestion control that
hiddenlake asks for where it listens at this machine alone, Reno. (It has no setting for that. Where the system's is BBR, whose
timers pace what never leaves the machine, this doubles what it sends; elsewhere both are the same.) The goals are of the first.
A read is X[layer, position] of all samples, 4 MB or 1 MB: checked against its checksums, the default, or not. A hit is a
resolve of one prompt by its token ids. Misses are single prompts that 8 clients ask for one after the other, computed by
vLLM with the demo model: published together when they come within 2 seconds. wrk and nginx are Debian's packages.
"""

import argparse
import itertools
import json
import os
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
from _served import ANSWER_TOKENS, Load, Process, compute, need_programs, nginx, serve, write_capture, wrk
from _table import Row, compare, machine, print_table, write_json

from hiddenlake.cache.demo_model import demo_model
from hiddenlake.cache.store.catalog import list_captures
from hiddenlake.cache.store.compact import compact
from hiddenlake.cache.store.reader import open_capture

SAMPLES = 1024
WIDTHS = {"4 MB": 2048, "1 MB": 512}

# What rows call nginx as the system has it, and nginx that sends with Reno.
PLAIN, RENO = "nginx, the same bytes as a file", "nginx with Reno, the same bytes as a file"

# Of what plain nginx answers a second.
GOALS = {"unchecked": 0.8, "checked": 0.5}
P99_GOAL = 3.0
HITS_GOAL = 500.0
# Of what the process takes, over the last four fifths of its requests.
MEMORY_GOAL = 1.1


def reads(
    key: str, ours: Process, theirs: dict[str, Process], rounds: int, seconds: float, *, clients: Sequence[int] = (1, 64),
    sizes: Sequence[str] = tuple(WIDTHS), suffix: str = "",
) -> list[Row]:  # fmt: skip
    """theirs : PLAIN, RENO -> nginx."""
    rows = []
    for count in clients:
        for size in sizes:
            found: dict[str, list[Load]] = {arm: [] for arm in (*GOALS, *theirs)}
            for n in range(rounds):
                for arm in np.roll(list(found), n).tolist():
                    if arm in theirs:
                        found[arm].append(wrk(f"{theirs[arm].url}/{_name(size)}", count, seconds))
                    else:
                        found[arm].append(wrk(_read_url(ours, size, arm == "checked"), count, seconds, key))
            rates = {arm: [load.rate for load in loads] for arm, loads in found.items()}
            for arm, rival in itertools.product(GOALS, theirs):
                rows.append(
                    compare(
                        f"read {size}, {arm}, {count} client{'s' * (count > 1)}{suffix}",
                        "requests/s",
                        rates[arm],
                        rates[rival],
                        rival,
                        goal=GOALS[arm] if size == "4 MB" and rival == PLAIN else None,
                        less_is_better=False,
                        note=f"p50 {_ms(found[arm], 'p50')} ms, p99 {_ms(found[arm], 'p99')} ms",
                    )  # fmt: skip
                )
            if count == 64 and size == "1 MB":
                slow, usual = ([getattr(load, name) for load in found["checked"]] for name in ("p99", "p50"))
                rows.append(
                    compare(
                        "99th percentile, 1 MB, checked, 64 clients", "ms", slow, usual, "its median", goal=P99_GOAL
                    )
                )
    return rows


def hits(key: str, ours: Process, prompts: list[list[int]], rounds: int, seconds: float) -> Row:
    bodies = [
        json.dumps({"inputs": [{"token_ids": ids}], "layers": [1], "positions": ["last_q"],
                    "generation": {"max_new_tokens": ANSWER_TOKENS}, "only_if_cached": True})
        for ids in prompts[:256]
    ]  # fmt: skip
    script = (
        f"local bodies = {{{', '.join(f'[==[{body}]==]' for body in bodies)}}}\nlocal n = 0\n"
        "request = function()\n  n = n % #bodies + 1\n"
        '  return wrk.format("POST", nil, nil, bodies[n])\nend\n'
    )
    loads = [wrk(f"{ours.url}/v1/activations:resolve", 8, seconds, key, script) for _ in range(rounds)]
    return compare(
        "resolve hits, 8 clients", "hits/s", [load.rate for load in loads], [HITS_GOAL] * rounds, "the goal", goal=1.0,
        less_is_better=False, note=f"p50 {_ms(loads, 'p50')} ms, p99 {_ms(loads, 'p99')} ms",
    )  # fmt: skip


def memory(key: str, ours: Process, requests: int) -> Row:
    """Of the server, over so many small reads."""
    process, looks, done = psutil.Process(ours.process.pid), [], 0
    url = f"{ours.url}/v1/captures/{_name('1 MB')}/activations?site=mlp_out&layer=1&position=last_q"
    script = (
        'local keys = {}\nfor i = 0, 1023 do keys[i + 1] = string.format("%032x", i) end\nlocal n = 0\n'
        "request = function()\n  n = n % 1024 + 1\n"
        '  local body = \'{"capture": "CAPTURE", "site": "mlp_out", "samples": ["\' .. keys[n] .. \'"]}\'\n'
        '  return wrk.format("POST", "/v1/activations:read", nil, body)\nend\n'
    ).replace("CAPTURE", _name("1 MB"))
    wrk(url, 8, 2, key)
    while done < requests:
        load = wrk(url, 16, 5, key, script)
        done += round(load.rate * 5)
        info = process.memory_full_info()
        looks.append((done, info.uss, process.num_fds()))
    fifth = max(1, len(looks) // 5)
    early = float(np.median([uss for _, uss, _ in looks[fifth : 2 * fifth] or looks[:1]]))
    late = float(np.median([uss for _, uss, _ in looks[-fifth:]]))
    return Row(
        f"memory after {done:,} reads of one sample", "MiB", late / 2**20, early / 2**20, "after a fifth of them",
        ratio=late / early, goal=MEMORY_GOAL, met=late / early <= MEMORY_GOAL, rounds=1,
        note=f"descriptors {looks[0][2]} and {looks[-1][2]}; {done / len(looks) / 5:.0f} reads/s",
    )  # fmt: skip


def misses(folder: Path, prompts: int) -> list[Row]:
    """Single prompts, asked for one by one, computed by vLLM."""
    lake = folder / "computed"
    lake.mkdir()
    server, key = serve(lake)
    options = ("--max-prompt", "128", "--max-new-tokens", "32", "--shard-samples", "64")
    with server, compute(lake, demo_model(), *options):
        waits: list[float] = []

        def ask(first: int) -> None:
            for i in range(first, prompts, 8):
                body = {
                    "inputs": [{"messages": [{"role": "user", "content": f"What is {i} times seven?"}]}], "wait": 60,
                    "generation": {"max_new_tokens": 16},
                }  # fmt: skip
                start = time.perf_counter()
                answer = _post(f"{server.url}/v1/activations:resolve", key, body)
                assert answer["state"] == "complete", answer
                waits.append(time.perf_counter() - start)

        start = time.perf_counter()
        clients = [threading.Thread(target=ask, args=(n,)) for n in range(8)]
        for client in clients:
            client.start()
        for client in clients:
            client.join()
        seconds = time.perf_counter() - start
    [entry] = list_captures(lake)
    capture = open_capture(lake / entry["name"])
    layout = capture.snapshot.layout
    needed = len(capture) * layout.shard_bytes / layout.samples
    if len(capture) != prompts:
        raise RuntimeError(f"{len(capture)} samples of {prompts} were stored")
    compacted = compact(lake / entry["name"]).bytes[1]
    return [
        Row(
            "one-prompt misses, 8 clients", "answers/s", prompts / seconds, None, "", rounds=1,
            note=f"{len(capture.commits)} shards of up to {layout.samples}; a miss takes {np.median(waits):.1f} s in the median, "
            f"at most {max(waits):.1f}",
        ),
        Row(
            "bytes written for them", "MB", capture.nbytes / 1e6, needed / 1e6, "their activations alone",
            ratio=capture.nbytes / needed, rounds=1,
            note=f"the rewrite factor; {compacted / needed:.2f} after `hiddenlake compact`",
        ),
    ]  # fmt: skip


def _post(url: str, key: str, body: dict) -> dict:
    headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
    with urllib.request.urlopen(urllib.request.Request(url, json.dumps(body).encode(), headers)) as response:
        return json.load(response)


def _name(size: str) -> str:
    return f"cells-{size.partition(' ')[0]}"


def _read_url(ours: Process, size: str, check: bool) -> str:
    query = f"site=mlp_out&layer=1&position=-1&format=raw&check={str(check).lower()}"
    return f"{ours.url}/v1/captures/{_name(size)}/activations?{query}"


def _ms(loads: list[Load], name: str) -> str:
    return f"{np.median([getattr(load, name) for load in loads]):.1f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="minutes: fewer rounds and requests")
    parser.add_argument("--no-misses", action="store_true", help="leave out what needs vLLM")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    need_programs()
    rounds, seconds = (3, 1.0) if arguments.quick else (5, 4.0)
    rows: list[Row] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        os.chmod(folder, 0o755)  # nginx's workers are another user
        lake = folder / "lake"
        lake.mkdir()
        prompts = [
            write_capture(lake / _name(size), SAMPLES, width, seed) for seed, (size, width) in enumerate(WIDTHS.items())
        ]
        server, key = serve(lake)
        with server:
            (folder / "www").mkdir()
            for size in WIDTHS:
                request = urllib.request.Request(
                    _read_url(server, size, True), headers={"Authorization": f"Bearer {key}"}
                )
                with urllib.request.urlopen(request) as response:
                    (folder / "www" / _name(size)).write_bytes(response.read())
            with nginx(folder) as plain, nginx(folder, "reno") as reno:
                theirs = {PLAIN: plain, RENO: reno}
                rows += reads(key, server, theirs, rounds, seconds)
                # BBR lets a connection have more under way the longer it lasts.
                rows += reads(
                    key, server, theirs, 3, 4 * seconds, clients=(64,), sizes=("4 MB",), suffix=f", {4 * seconds:g} s",
                )  # fmt: skip
            rows.append(hits(key, server, prompts[0], rounds, seconds))
            rows.append(memory(key, server, 5_000 if arguments.quick else 100_000))
        if not arguments.no_misses:
            rows += misses(folder, 24 if arguments.quick else 200)
    facts = machine("hiddenlake", "fastapi", "uvicorn", "uvloop", "numpy")
    facts["tcp_congestion_control"] = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
    print(f"\n{facts}\n")
    print_table(rows)
    if arguments.json:
        write_json(arguments.json, rows, facts)
    if any(row.met is False for row in rows):
        print("some goals are missed: see the table", file=sys.stderr)


if __name__ == "__main__":
    main()
