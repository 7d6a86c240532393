"""Recomputes every report of a run directory from its records: no server, no clock."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from servebench.judge.verdict import judge
from servebench.record.files import write_json
from servebench.record.histogram import Histogram
from servebench.record.outcome import Outcome
from servebench.record.rundata import Array, Run
from servebench.record.rundir import RUN, open_run
from servebench.report.hdr_files import split_by_interval, write_hgrm, write_hlog

HLOG = "latency.hlog"
HGRM = "latency.hgrm"


def rewrite_reports(directory: Path) -> dict[str, Any]:
    """Judge the run in ``directory`` and write ``run.json``, ``latency.hlog`` and ``latency.hgrm``; returns the run document.

    `ProfileError` when the directory is not a run's; `OSError` when it cannot be written.
    """
    run = open_run(directory)
    document = judge(run)
    write_reports(run, document, directory)
    return document


def write_reports(run: Run, document: dict[str, Any], directory: Path) -> None:
    """Write a run's document and its latency files. `OSError` when they cannot be written."""
    write_json(directory / RUN, document)
    _write_histograms(run, document["response_time"]["infinite"], directory)


def _write_histograms(run: Run, failed: int, directory: Path) -> None:
    histogram, in_order, last_ns = Histogram(), True, 0
    for outcome, scheduled_ns, completed_ns in run.chunks("outcome", "scheduled_ns", "completed_ns"):
        ok = outcome == Outcome.OK
        histogram.record(completed_ns[ok] - scheduled_ns[ok])
        in_order &= bool(scheduled_ns[0] >= last_ns and np.diff(scheduled_ns).min(initial=0) >= 0)
        last_ns = int(scheduled_ns[-1])
    write_hgrm(directory / HGRM, histogram, failed_queries=failed)
    clock = run.section("clocks").get("start") or {}
    start_realtime_s = 0.0
    if clock and run.facts.get("start_ns"):
        start_realtime_s = (clock["realtime_ns"] + run.facts["start_ns"] - clock["monotonic_ns"]) / 1e9
    response = _latencies_by_due_time(run, "scheduled_ns", in_order=in_order)
    service = _latencies_by_due_time(run, "issued_ns", in_order=in_order)
    write_hlog(
        directory / HLOG,
        {"": split_by_interval(response), "service": split_by_interval(service)},
        start_realtime_s=start_realtime_s,
        failed_queries=failed,
    )


def _latencies_by_due_time(run: Run, since: str, *, in_order: bool) -> Iterator[tuple[Array, Array]]:
    """Due times of OK queries and how long each took since an event, as `split_by_interval` wants them.

    A plan is in time order; only a damaged run is not, and is sorted as a whole.
    """
    names = ("outcome", "scheduled_ns", since, "completed_ns")
    for outcome, scheduled_ns, since_ns, completed_ns in run.chunks(*names) if in_order else [_sorted(run, names)]:
        ok = outcome == Outcome.OK
        yield scheduled_ns[ok], completed_ns[ok] - since_ns[ok]


def _sorted(run: Run, names: Sequence[str]) -> tuple[Array, ...]:
    order = np.argsort(run.column("scheduled_ns"), kind="stable")
    return tuple(run.column(name)[order] for name in names)
