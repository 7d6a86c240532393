"""servebench as one contestant among others: a run of an ordinary profile, with everything it recorded."""

from __future__ import annotations

import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from servebench.engine.run import Observer, run_profile
from servebench.profile import parse_profile
from servebench.record.progress import Snapshot
from servebench.record.rundata import RunData
from servebench.record.rundir import read_run
from servebench.report.rewrite import rewrite_reports


@dataclass(frozen=True, slots=True)
class OwnRun:
    """A run of servebench's own: what it reports, and every query's times."""

    document: dict[str, Any]  #: ``run.json``
    data: RunData

    @property
    def cpu_share(self) -> float:
        """Share of a core that the worker took while measuring."""
        stats = self.document["workers"][0]["stats"]
        return float(stats["cpu_s"] / stats["wall_s"])

    @property
    def not_ok(self) -> int:
        """Queries that failed in any way, or were never sent."""
        return int(self.document["counts"]["planned"] - self.document["counts"]["ok"])


class _Silent:
    """Observes nothing."""

    def phase(self, name: str, *, duration_s: float | None = None) -> None:
        pass

    def progress(self, snapshot: Snapshot) -> None:
        pass


def run_own(
    url: str,
    endpoint: dict[str, Any],
    *,
    rate_qps: float,
    duration_s: float,
    cpus: Sequence[int],
    pacing: str = "precise",
    arrivals: str = "mlperf",
    schedule_seed: int = 0,
    warmup_s: float = 0.0,
) -> OwnRun:
    """One worker on ``cpus`` sends ``rate_qps`` to a server for ``duration_s``. `ServebenchError` when it cannot be done."""
    settings = {
        "name": "benchmark",
        "server": {"url": url},
        "endpoint": endpoint,
        "samples": {"source": "zero"},
        "load": {
            "target_qps": rate_qps,
            "arrivals": arrivals,
            "min_duration_s": duration_s,
            "min_query_count": 1,
            "schedule_seed": schedule_seed,
            "warmup_s": warmup_s,
            "drain_timeout_s": 5,
        },
        "client": {"cpus": list(cpus), "pacing": pacing},
        "constraints": ["p99 <= 5s"],
    }
    return run_settings(settings, _Silent())


def run_settings(settings: dict[str, Any], observer: Observer) -> OwnRun:
    """Run a profile in a directory that is gone afterwards. `ServebenchError` when it cannot be done."""
    with tempfile.TemporaryDirectory(prefix="benchmark-") as scratch:
        directory = Path(scratch) / "run"
        profile = parse_profile(settings, source="benchmarks.own_client")
        if run_profile(profile, directory, command=["benchmarks.own_client"], observer=observer) != "complete":
            raise KeyboardInterrupt
        return OwnRun(rewrite_reports(directory), read_run(directory))
