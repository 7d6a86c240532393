"""What benchmarks have in common when they report: medians with their spread, and one JSON document each."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servebench.record.environment import collect_environment
from servebench.record.files import write_json

RESULTS = Path(__file__).parent / "results"
#: A quick run of punctuality, truth or start fails on gross regressions only: its targets are this many times as wide.
QUICK_SLACK = 10


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated measurements of one thing: the middle one, and the outermost."""

    median: float
    lowest: float
    highest: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread | None:
        """The spread of ``values``; None when there are none."""
        return cls(statistics.median(values), min(values), max(values)) if values else None


def rate_text(spread: Spread | None) -> str:
    """Queries a second for a table."""
    return _text(spread, ",.0f")


def ratio_text(spread: Spread | None) -> str:
    """A ratio for a table."""
    return _text(spread, ".2f")


def _text(spread: Spread | None, digits: str) -> str:
    """The median, and the outermost where they differ."""
    if spread is None:
        return "-"
    if spread.lowest == spread.highest:
        return f"{spread.median:{digits}}"
    return f"{spread.median:{digits}} ({spread.lowest:{digits}} - {spread.highest:{digits}})"


def write_result(name: str, document: Mapping[str, Any], *, version: int = 1) -> Path:
    """Write ``results/NAME.json``: the document, its schema (``servebench.NAME/VERSION``), the machine. Returns the path."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    write_json(path, {"schema": f"servebench.{name}/{version}", **document, "environment": collect_environment()})
    return path
