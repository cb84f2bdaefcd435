"""The child's side of an arm: rounds come in on stdin, what they cost goes out on the descriptor that is named as the
only argument, one JSON object a line."""

import json
import os
import sys
import time
from collections.abc import Callable
from typing import Any, Protocol

import psutil


class Arm(Protocol):
    """One way of answering prompts.

    A round is {"texts": the questions, "ids": their token ids, chat template included, "max_new_tokens",
    "batch": prompts at once, "layer": whose row is to be shown}.
    """

    def prepare(self, round: dict[str, Any]) -> Any:
        """What is to be done, ready to start. Not measured."""

    def run(self, work: Any) -> Any:
        """Do it. Measured."""

    def report(self, round: dict[str, Any], result: Any) -> dict[str, Any]:
        """Check that all was captured, and say how much. Not measured.

        {"tokens": generated, "bytes": of activations, "rows": {site: the row of `layer` at the last token of the
        first prompt}}. Raises RuntimeError where something is missing.
        """


def serve(start: Callable[[dict[str, Any]], Arm]) -> None:
    """Start an arm with the first line of stdin, then run a round for each further line."""
    answers = os.fdopen(int(sys.argv[1]), "w", buffering=1)
    arm = start(json.loads(sys.stdin.readline()))
    print(json.dumps({"ready": True}), file=answers)
    for line in sys.stdin:
        round = json.loads(line)
        work = arm.prepare(round)
        cpu, wall = cpu_seconds(), time.perf_counter()
        result = arm.run(work)
        wall, cpu = time.perf_counter() - wall, cpu_seconds() - cpu
        print(json.dumps({"cpu": cpu, "wall": wall, **arm.report(round, result)}), file=answers)


def cpu_seconds() -> float:
    """User and system time of this process and all below it, those that have ended too."""
    this = psutil.Process()
    total = 0.0
    for process in (this, *this.children(recursive=True)):
        times = process.cpu_times()
        total += times.user + times.system + times.children_user + times.children_system
    return total


def expect(what: str, found: Any, expected: Any) -> None:
    """Raise RuntimeError unless both are equal: what was not captured must not be timed."""
    if found != expected:
        raise RuntimeError(f"{what}: found {found}, expected {expected}")
