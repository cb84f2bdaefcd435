"""Arms on one GPU: vLLM as it is shipped beside hiddenlake, round by round."""

import sys
from collections.abc import Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _arms import Arm, in_rotation
from _limits import disk_bandwidth
from _model import Shape, prompts

from hiddenlake.cache.positions import parse_positions, wanted
from hiddenlake.cache.rows import TapTable, tap_table

BATCH = 256

VLLM = "vLLM alone"
ONE_STEP_MORE = "vLLM alone, one more step"


@dataclass(frozen=True)
class Size:
    """Of answers; BATCH run at once."""

    prompt_tokens: int
    new_tokens: int
    rounds: int


@dataclass(frozen=True)
class Capture:
    """What hiddenlake is asked to capture, of all layers.

    waiting : batches whose rows the ring holds. More than one, so that a new answer begins while an old one is stored.
    batches : of a round. The last one is stored when there is nothing more to generate, so that few measure that.
    goal : of throughput, over vLLM's alone.
    """

    name: str
    sites: tuple[str, ...]
    positions: tuple[str, ...]
    waiting: float
    batches: int
    goal: float | None = None

    def table(self, shape: Shape) -> TapTable:
        widths = {"hidden": shape.hidden, "d_attn": shape.heads * 128, "d_mlp": shape.d_ff}
        return tap_table(self.sites, range(shape.layers), widths, shape.layers)

    def ring_bytes(self, shape: Shape, size: Size) -> int:
        names, tokens = parse_positions(self.positions)
        want = wanted(names, tokens, size.prompt_tokens)
        rows = len(want.prompt) + want.answer_rows(size.new_tokens)
        return int(self.waiting * BATCH) * rows * len(self.table(shape)) * 2  # bfloat16


@dataclass(frozen=True)
class Cost:
    """What one round took. tokens : of answers, a second.  stored, home : bytes a second, into files, from the device."""

    tokens: float
    stored: float
    home: float


class Bench:
    """Two engines at a time on one card, each with a share of its memory.

    No prompt is sent twice: vLLM alone would know it from its prefix cache.

    folder : where captures go.  variables : of hiddenlake's processes.
    """

    def __init__(
        self, folder: Path, model: Path, shape: Shape, size: Size, variables: dict[str, str | None], stack: ExitStack
    ) -> None:
        self.folder, self.shape, self.size, self._stack = folder, shape, size, stack
        self._variables = variables
        self._asked = 0
        self._spec = {
            "model": str(model), "end_ids": [shape.vocabulary - 1], "layers": shape.layers, "hidden": shape.hidden,
            # one token for the last step of ours, one for a step more of vLLM's
            "max_length": size.prompt_tokens + size.new_tokens + 2,
            "options": {"load_format": "dummy", "max_num_seqs": BATCH, "gpu_memory_utilization": 0.45},
        }  # fmt: skip
        self._vllm: Arm | None = None
        self.engines: dict[str, dict[str, Any]] = {}
        self.written: list[float] = []

    def vllm(self) -> Arm:
        """vLLM alone, started at the first call and left running."""
        if self._vllm is None:
            # unset: its own choice of a model runner
            self._vllm = self._start(VLLM, "gpu_vllm_alone.py", {"VLLM_USE_V2_MODEL_RUNNER": None})
        return self._vllm

    def ours(self, capture: Capture) -> Arm:
        texts = prompts(self.shape, 0, 1, self.size.prompt_tokens)
        return self._start(
            capture.name, "gpu_hiddenlake.py", self._variables, sites=capture.sites, positions=capture.positions,
            out=str(self.folder / "capture"), texts=texts, max_new_tokens=self.size.new_tokens,
            ring_bytes=capture.ring_bytes(self.shape, self.size),
        )  # fmt: skip

    def _start(self, name: str, script: str, variables: dict[str, str | None], **spec: Any) -> Arm:
        """Ready to be asked. One at a time: vLLM measures how much memory is left on the device."""
        print(f"starting {name}", file=sys.stderr)
        log = self.folder / f"{name}.log"
        arm = self._stack.enter_context(
            closing(Arm(name, sys.executable, script, {**self._spec, **spec}, log, variables))
        )
        arm.wait_until_ready()
        return arm

    def measure(self, capture: Capture, ours: Arm, vllm: Arm) -> dict[str, list[Cost]]:
        """What each did in each round: hiddenlake, vLLM, and vLLM with answers one token longer. A batch warms up."""
        cases = [(capture.name, ours, 0), (VLLM, vllm, 0), (ONE_STEP_MORE, vllm, 1)]
        costs: dict[str, list[Cost]] = {name: [] for name, *_ in cases}
        for name, arm, more in cases:
            self._ask(name, arm, BATCH, more)
        for r in range(self.size.rounds):
            for name, arm, more in in_rotation(cases, r):
                costs[name].append(self._ask(name, arm, capture.batches * BATCH, more))
            self.written.append(disk_bandwidth(self.folder))
            now = ", ".join(f"{name} {of[-1].tokens:,.0f}" for name, of in costs.items())
            print(f"round {r + 1} of {self.size.rounds}, tokens/s: {now}", file=sys.stderr)
        return costs

    def _ask(self, name: str, arm: Arm, count: int, more: int) -> Cost:
        self._asked += 1
        texts = prompts(self.shape, self._asked, count, self.size.prompt_tokens)
        ids = [[int(word[1:]) for word in text.split()] for text in texts]
        length = self.size.new_tokens + more
        answer = arm.ask({"texts": texts, "ids": ids, "max_new_tokens": length, "batch": BATCH, "layer": 0})
        if answer["tokens"] != len(ids) * length:
            print(
                f"{name}: {answer['tokens']} tokens instead of {len(ids) * length}: some answers ended", file=sys.stderr
            )
        self.engines[arm.name] = {key: answer[key] for key in FACTS if key in answer}
        wall = answer["wall"]
        # of the one token more nothing is told: it is there for its step
        return Cost((answer["tokens"] - more * len(ids)) / wall, answer["bytes"] / wall, answer.get("home", 0) / wall)


# What arms say of their engines.
FACTS = ("runner", "graphs", "scheduling", "kv_tokens", "batch", "device_bytes")


def rates(costs: Sequence[Cost], what: str) -> list[float]:
    return [getattr(cost, what) for cost in costs]
