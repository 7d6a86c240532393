"""What a run measured, as counts, rates and distributions: LoadGen's definitions, computed from the columns.

Who is counted where:

- *Response time* (completed - scheduled) and *service time* (completed - issued) are taken
  over all planned queries. One that failed, timed out, was shed or did not finish has an
  infinite latency: it stays in the percentiles and is over every bound. Minimum, mean and
  maximum are of the OK queries, the only ones with a latency.
- *Issue delay* (issued - scheduled) is taken over the queries that were issued.
- A percentile is LoadGen's ``sorted[int(n * p)]``: no interpolation, n counts the infinite
  ones. Where it falls on an infinite latency its value is None, and `Distribution.above_ns`
  gives the lower bound that is known.
- Rates count OK queries only and enclose n - 1 gaps, as LoadGen's; see `completed_window_ns`.

Arrays are sorted in place; what is kept of a query is its three latencies.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from servebench.judge.wording import say_percentile
from servebench.record.outcome import ERROR_OUTCOMES, Outcome
from servebench.record.rundata import RunData

Int64s = npt.NDArray[np.int64]

#: The percentiles of every run: LoadGen's six, and one further out.
PERCENTILES = (50.0, 90.0, 95.0, 97.0, 99.0, 99.9, 99.99)
_SUM_CHUNK = 1 << 16  # latencies of up to a day add up to less than 2**63


def quantile_of(percentile: float) -> float:
    """The double nearest to ``percentile / 100``: 99.9 gives exactly what the literal 0.999 does, as LoadGen has it."""
    return float(Decimal(repr(float(percentile))) / 100)


def percentile_index(count: int, percentile: float) -> int:
    """LoadGen's index of a percentile (0-100, exclusive) among ``count`` ascending values, in its own double arithmetic."""
    return min(int(count * quantile_of(percentile)), count - 1)


class Distribution:
    """Latencies of one series in ns: those known, ascending, then the infinite ones.

    ``known_ns`` are the latencies, ``infinite_ns`` what is known of each infinite one: how
    long the query had been out when it was given up, 0 where it was never sent. Both arrays
    are taken over and sorted in place.
    """

    __slots__ = ("_infinite_ns", "_known_ns")

    def __init__(self, known_ns: Int64s, infinite_ns: Int64s) -> None:
        known_ns.sort()
        infinite_ns.sort()
        self._known_ns = known_ns
        self._infinite_ns = infinite_ns

    @property
    def count(self) -> int:
        """Queries in the percentiles, the infinite ones included."""
        return len(self._known_ns) + len(self._infinite_ns)

    @property
    def infinite_count(self) -> int:
        """Queries without a latency: over every bound."""
        return len(self._infinite_ns)

    @property
    def min_ns(self) -> int | None:
        """The smallest known latency."""
        return int(self._known_ns[0]) if len(self._known_ns) else None

    @property
    def max_ns(self) -> int | None:
        """The largest known latency."""
        return int(self._known_ns[-1]) if len(self._known_ns) else None

    @property
    def mean_ns(self) -> int | None:
        """Mean of the known latencies, in whole ns as LoadGen's."""
        known = self._known_ns
        if not len(known):
            return None
        return sum(int(known[at : at + _SUM_CHUNK].sum()) for at in range(0, len(known), _SUM_CHUNK)) // len(known)

    def at(self, index: int) -> int | None:
        """The latency at an index of the ascending order; None for an infinite one."""
        return int(self._known_ns[index]) if index < len(self._known_ns) else None

    def percentile(self, percentile: float) -> int | None:
        """LoadGen's percentile (0-100, exclusive); None where it is infinite, or where there is no query at all."""
        return self.at(percentile_index(self.count, percentile)) if self.count else None

    def above_ns(self, percentile: float) -> int | None:
        """For an infinite percentile, the value that it is known to exceed; None for a finite one."""
        behind = percentile_index(self.count, percentile) - len(self._known_ns)
        if not self.count or behind < 0:
            return None
        return max(int(self._infinite_ns[behind]), self.max_ns or 0)

    def over(self, limit_ns: int) -> int:
        """How many queries took longer than ``limit_ns``, the infinite ones included."""
        return self.count - int(np.searchsorted(self._known_ns, limit_ns, side="right"))

    def as_dict(self, percentiles: tuple[float, ...]) -> dict[str, Any]:
        """The block of ``run.json``."""
        block: dict[str, Any] = {
            "count": self.count,
            "infinite": self.infinite_count,
            "min_ns": self.min_ns,
            "mean_ns": self.mean_ns,
            "max_ns": self.max_ns,
            "percentiles": {say_percentile(p): self.percentile(p) for p in percentiles},
        }
        above = {say_percentile(p): self.above_ns(p) for p in percentiles}
        block["above_ns"] = {key: value for key, value in above.items() if value is not None}
        return block


@dataclass(frozen=True, slots=True)
class Counts:
    """The books: planned = issued + shed, issued = ok + error + timeout + unfinished."""

    planned: int
    issued: int
    ok: int
    error: int
    timeout: int
    shed: int
    unfinished: int

    @property
    def balanced(self) -> bool:
        """Whether every planned query ended in exactly one of the ways there are."""
        ended = self.ok + self.error + self.timeout + self.unfinished
        return self.planned == self.issued + self.shed and self.issued == ended


def count_outcomes(run: RunData) -> Counts:
    """The books of a run. After a killed process, what was due and never sent is shed, what was out is unfinished."""
    tally = np.bincount(run.outcome, minlength=len(Outcome)).tolist()
    ok, timeout = tally[Outcome.OK], tally[Outcome.TIMEOUT]
    error = sum(tally[outcome] for outcome in ERROR_OUTCOMES)
    unfinished = tally[Outcome.UNFINISHED] + tally[Outcome.OUTSTANDING]
    shed = tally[Outcome.SHED] + tally[Outcome.NOT_ISSUED]
    return Counts(run.planned, ok + error + timeout + unfinished, ok, error, timeout, shed, unfinished)


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts, distributions and windows of one run; durations are ns from t=0."""

    counts: Counts
    response: Distribution
    service: Distribution
    delay: Distribution
    target_qps: float | None
    last_scheduled_ns: int  #: when the last planned query was due
    last_due_ns: int | None  #: when the last of the issued queries was due
    last_issued_ns: int | None
    completed_window_ns: int | None

    @property
    def scheduled_qps(self) -> float | None:
        """LoadGen's scheduled rate, (n - 1) / last scheduled time; None where no time passes."""
        return _rate(self.counts.planned, self.last_scheduled_ns)

    @property
    def issued_qps(self) -> float | None:
        """(issued - 1) / last issue time, from t=0 like the scheduled rate, so that the two compare."""
        return _rate(self.delay.count, self.last_issued_ns)

    @property
    def completed_qps(self) -> float | None:
        """(OK - 1) / `completed_window_ns`: LoadGen's completed samples per second, of OK queries only."""
        return _rate(self.counts.ok, self.completed_window_ns)

    def goodput_qps(self, limit_ns: int) -> float | None:
        """(OK and no slower than ``limit_ns`` - 1) / `completed_window_ns`: equals the completed rate when all are good."""
        return _rate(self.counts.planned - self.response.over(limit_ns), self.completed_window_ns)

    def series(self, name: str) -> Distribution:
        """``response``, ``service`` or ``delay``."""
        return {"response": self.response, "service": self.service, "delay": self.delay}[name]


def summarize(run: RunData) -> Summary:
    """Counts, distributions and windows of a run."""
    ok = run.outcome == Outcome.OK
    issued = run.issued_ns >= 0
    last_issued_ns = int(run.issued_ns.max(initial=-1))
    return Summary(
        counts=count_outcomes(run),
        response=_latencies(run.completed_ns, run.scheduled_ns, ok),
        service=_latencies(run.completed_ns, run.issued_ns, ok),
        delay=Distribution(run.issued_ns[issued] - run.scheduled_ns[issued], np.empty(0, dtype=np.int64)),
        target_qps=run.section("schedule").get("target_qps"),
        last_scheduled_ns=int(run.scheduled_ns.max(initial=0)),
        last_due_ns=int(run.scheduled_ns[issued].max()) if last_issued_ns >= 0 else None,
        last_issued_ns=last_issued_ns if last_issued_ns >= 0 else None,
        completed_window_ns=completed_window_ns(run),
    )


def completed_window_ns(run: RunData) -> int | None:
    """The time that completed rates divide by; None when nothing was issued.

    LoadGen's is the done time of the last-issued query, not the last done time. Two guards,
    idle in a run where every query succeeds, keep failures from improving the rate: when
    that query failed, the last moment at which anything ended counts; and in a complete run
    the window is no shorter than the schedule, whatever was shed at its end.
    """
    last_issued_ns = run.issued_ns.max(initial=-1)
    if last_issued_ns < 0:
        return None
    row = int(np.flatnonzero(run.issued_ns == last_issued_ns)[-1])
    if run.outcome[row] == Outcome.OK:
        window_ns = int(run.completed_ns[row])
    else:
        window_ns = max(int(run.completed_ns.max()), int(last_issued_ns))
    if run.facts.get("state") == "complete":
        window_ns = max(window_ns, int(run.scheduled_ns.max()))
    return window_ns


def _latencies(end_ns: Int64s, start_ns: Int64s, ok: npt.NDArray[np.bool_]) -> Distribution:
    failed = ~ok
    ended_ns, began_ns = end_ns[failed], start_ns[failed]
    known_age_ns = np.where((ended_ns >= 0) & (began_ns >= 0), ended_ns - began_ns, 0)
    return Distribution(end_ns[ok] - start_ns[ok], np.maximum(known_age_ns, 0))


def _rate(count: int, window_ns: int | None) -> float | None:
    return max(count - 1, 0) / (window_ns / 1e9) if window_ns else None
