"""The benchmarks' modules, importable as the scripts beside them import them."""

import sys
from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"

sys.path[:0] = [str(BENCHMARKS), str(BENCHMARKS / "arms")]
