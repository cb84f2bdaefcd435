"""Table: what an experiment found, as rows to print and facts to read them by."""

import json
import math
import os
import uuid
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from hiddenlake.cache.errors import StoreError


@dataclass(frozen=True, slots=True)
class Table:
    """rows : of plain values, in the order of print.  facts : what was compared, and how.  notes : sentences to say."""

    rows: list[dict[str, Any]]
    facts: dict[str, Any]
    notes: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """A plain dict; what is not a number is null."""
        return _plain({**self.facts, "notes": list(self.notes), "rows": self.rows, "hiddenlake": version("hiddenlake")})

    def save(self, path: Path) -> Path:
        """Write it as JSON, whole or not at all. Raises StoreError."""
        new = path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.new")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            new.write_text(json.dumps(self.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n", "utf-8")
            os.replace(new, path)
        except OSError as error:
            raise StoreError(f"{path}: {error.strerror or error}: the table was not saved") from error
        finally:
            with suppress(OSError):
                new.unlink()
        return path


def interval(lo: float, hi: float) -> str:
    """As a reader sees it; empty where there is none."""
    return f"{lo:.3f} to {hi:.3f}" if math.isfinite(lo) else ""


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(name): _plain(item) for name, item in value.items()}
    if isinstance(value, str) or not isinstance(value, Iterable):
        return None if isinstance(value, float) and not math.isfinite(value) else value
    return [_plain(item) for item in value]
