"""Recomputes every report of a run directory from its records: no server, no clock."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from servebench.judge.verdict import judge
from servebench.record.files import write_json
from servebench.record.histogram import Histogram
from servebench.record.outcome import Outcome
from servebench.record.rundata import RunData
from servebench.record.rundir import RUN, read_run
from servebench.report.hdr_files import interval_histograms, write_hgrm, write_hlog

HLOG = "latency.hlog"
HGRM = "latency.hgrm"


def rewrite_reports(directory: Path) -> dict[str, Any]:
    """Judge the run in ``directory`` and write ``run.json``, ``latency.hlog`` and ``latency.hgrm``; returns the run document.

    `ProfileError` when the directory is not a run's; `OSError` when it cannot be written.
    """
    run = read_run(directory)
    document = judge(run)
    write_json(directory / RUN, document)
    _write_histograms(run, directory)
    return document


def _write_histograms(run: RunData, directory: Path) -> None:
    ok = run.outcome == Outcome.OK
    failed = run.planned - int(np.count_nonzero(ok))
    scheduled_ns, completed_ns = run.scheduled_ns[ok], run.completed_ns[ok]
    response_ns = completed_ns - scheduled_ns
    histogram = Histogram()
    histogram.record(response_ns)
    write_hgrm(directory / HGRM, histogram, failed_queries=failed)
    clock = run.section("clocks").get("start") or {}
    start_realtime_s = 0.0
    if clock and run.facts.get("start_ns"):
        start_realtime_s = (clock["realtime_ns"] + run.facts["start_ns"] - clock["monotonic_ns"]) / 1e9
    write_hlog(
        directory / HLOG,
        {
            "": interval_histograms(scheduled_ns, response_ns),
            "service": interval_histograms(scheduled_ns, completed_ns - run.issued_ns[ok]),
        },
        start_realtime_s=start_realtime_s,
        failed_queries=failed,
    )
