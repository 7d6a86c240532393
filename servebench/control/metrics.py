"""Single numbers out of a page of Prometheus metrics (its text format 0.0.4), for what servers say nowhere else."""

from __future__ import annotations

import re

_SAMPLE = re.compile(r"(?P<name>[A-Za-z_:][\w:]*)(?:\{(?P<labels>.*)\})?\s+(?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')


def metric_sum(page: str, name: str, **labels: str) -> int | None:
    """The sum of all samples of ``name`` that have these labels (and any others); None when there is none."""
    total = None
    for line in page.splitlines():
        if not line.startswith(name):  # most lines of a page, comments among them
            continue
        sample = _SAMPLE.match(line)
        if sample is None or sample["name"] != name:
            continue
        found = dict(_LABEL.findall(sample["labels"] or ""))
        if all(found.get(label) == value for label, value in labels.items()):
            total = (total or 0) + round(float(sample["value"]))
    return total
