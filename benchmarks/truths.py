"""What a turn's latencies should have been, percentile by percentile, in up to three ways; pure functions and values.

``schedule``: Lindley's recursion on the moments the queries were due. Only servebench tells those moments.
``seen``: the stub's own stamps, arrival to departure. That is a stopwatch's truth: it says nothing about queries
that were sent late, or not at all, and under a freeze it is none.
``asked``: what Poisson queries at the asked rate meet, whoever sends them. In the long run that is M/D/1's exact
distribution; the percentiles of single runs as short as these scatter around it, and how far is simulated. With a freeze
the median of the simulated runs is taken.

To each response comes what the loopback, the kernel and wake-ups add, as often as much or little as to a bare socket's
(`benchmarks.arrivals_seen.path_added_ns`). Its median alone would not do: at 50 % load half of the queries take just the
service time, so the p50 is the longest of them, and with it the largest of what was added.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from benchmarks.arrivals_seen import Stamps
from benchmarks.queue_theory import Freeze, Int64s, md1_response_ns, percentiles_ns, response_ns, simulate_runs

PERCENTILES = (50.0, 99.0, 99.9)

TruthName = Literal["schedule", "seen", "asked"]
Percentiles = dict[float, float]  # percentile (0-100) -> ns
TRUTHS: tuple[TruthName, ...] = ("schedule", "seen", "asked")
#: Machines are shared. A turn was disturbed if 1 % of the stub's replies left later than this, or 1 % of the bare socket's
#: came later than usual by this,
MAX_LATE_NS = 600_000
#: or one of the stub's left later than this: what comes while the stub stands still for 10 ms is felt for 30 ms.
MAX_STUB_PAUSE_NS = 5_000_000
#: After a freeze the stub reads what came meanwhile, and is late by that.
_THAW_NS = 100_000_000


@dataclass(frozen=True, slots=True)
class Condition:
    """What the contestants are asked to do to a server of constant service time."""

    name: str
    load: float  #: share of the server's capacity, 0-1
    service_ns: int
    duration_s: float
    freeze: Freeze | None = None  #: relative to the first query

    @property
    def rate_qps(self) -> float:
        """The rate that makes this load."""
        return self.load * 1e9 / self.service_ns


@dataclass(frozen=True, slots=True)
class Asked:
    """What the asked rate leads to."""

    true_ns: Percentiles
    low_ns: Percentiles  #: 95 % of honest runs as long as these report between this
    high_ns: Percentiles  #: and this


def asked_truth(condition: Condition, added_ns: Int64s) -> Asked:
    """The truth about Poisson arrivals at the condition's rate, with its freeze if it has one."""
    runs = simulate_runs(
        PERCENTILES,
        rate_qps=condition.rate_qps,
        service_ns=condition.service_ns,
        duration_s=condition.duration_s,
        freeze=condition.freeze,
        added_ns=added_ns,
    )
    by_percentile = dict(zip(PERCENTILES, runs, strict=True))
    if condition.freeze is None:
        load, service_ns = condition.load, condition.service_ns
        true_ns = {of: md1_response_ns(of, load=load, service_ns=service_ns, added_ns=added_ns) for of in PERCENTILES}
    else:
        true_ns = {of: spread.median_ns for of, spread in by_percentile.items()}
    return Asked(
        true_ns=true_ns,
        low_ns={of: spread.low_ns for of, spread in by_percentile.items()},
        high_ns={of: spread.high_ns for of, spread in by_percentile.items()},
    )


def schedule_truth(due_ns: Int64s, service_ns: int, added_ns: Int64s, freeze: Freeze | None) -> Percentiles:
    """Lindley on due times, with a freeze on the same clock."""
    return _percentiles(response_ns(due_ns, service_ns, freeze), added_ns)


def seen_truth(stamps: Stamps, completed: int, added_ns: Int64s) -> Percentiles | None:
    """What the last ``completed`` queries spent in the server: warm-up comes first. None without any."""
    served = stamps[stamps["departure_ns"] > 0][-completed:] if completed else stamps[:0]
    return _percentiles(served["departure_ns"] - served["arrival_ns"], added_ns) if len(served) else None


def stub_lateness_ns(stamps: Stamps, freeze: Freeze | None) -> tuple[int, int]:
    """p99 and maximum of what the stub's replies left later than its queue said, but for those that a freeze made late."""
    served = stamps[stamps["departure_ns"] > 0]
    if freeze is not None:
        served = served[(served["due_ns"] < freeze.begin_ns) | (served["due_ns"] > freeze.end_ns + _THAW_NS)]
    late_ns = served["departure_ns"] - served["due_ns"]
    return (round(np.percentile(late_ns, 99)), int(late_ns.max())) if len(late_ns) else (0, 0)


def relative_errors(reported_ns: Mapping[float, float], true_ns: Mapping[float, float]) -> Percentiles:
    """Reported / true - 1, for the percentiles that were reported."""
    return {of: reported_ns[of] / true_ns[of] - 1 for of in PERCENTILES if of in reported_ns}


def _percentiles(responses_ns: Int64s, added_ns: Int64s) -> Percentiles:
    found: Sequence[float] = percentiles_ns(np.add.outer(responses_ns, added_ns).ravel(), PERCENTILES).tolist()
    return dict(zip(PERCENTILES, found, strict=True))


@dataclass(frozen=True, slots=True)
class Found:
    """What one contestant reported under one condition, and what it should have."""

    contestant: str
    condition: str
    completed: int
    not_ok: int
    cpu_share: float
    stub_late_p99_ns: int  #: how late the stub itself was, of which the contestant is innocent
    stub_late_max_ns: int
    added_scatter_ns: int  #: p99 less p50 of what the bare socket met before: a disturbed socket would excuse everybody
    reported_ns: Percentiles
    true_ns: dict[str, Percentiles]  #: by the name of the truth, those that are known
    errors: dict[str, Percentiles]  #: reported / true - 1, alike
    honest: dict[float, bool]  #: whether a run of Poisson arrivals could have reported this (95 % do); not known under a freeze

    @property
    def calm(self) -> bool:
        """Whether nothing disturbed the stub, by its own stamps, nor the bare socket: neither is the contestant's doing."""
        late_ns = max(self.stub_late_p99_ns, self.added_scatter_ns)
        return late_ns <= MAX_LATE_NS and self.stub_late_max_ns <= MAX_STUB_PAUSE_NS
