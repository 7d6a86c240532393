"""What a run measured, as counts, rates and distributions: LoadGen's definitions, computed from the columns.

Who is counted where:

- A query is *due* when its time came before the run stopped (`stopped_ns`): in a complete run
  all that were planned are. What was not due is counted as such, and judged by nothing.
- *Response time* (completed - scheduled) and *service time* (completed - issued) are taken
  over all queries that were due. One that failed, timed out, was shed or did not finish has
  an infinite latency: it stays in the percentiles and is over every bound. Minimum, mean and
  maximum are of the OK queries, the only ones with a latency.
- *Issue delay* (issued - scheduled) is taken over the same queries, and infinite for those
  that were never sent.
- A percentile is LoadGen's ``sorted[int(n * p)]``: no interpolation, n counts the infinite
  ones. Where it falls on an infinite latency its value is None, and `Distribution.above_ns`
  gives the lower bound that is known.
- Rates count OK queries only and enclose n - 1 gaps, as LoadGen's; see `Summary.completed_window_ns`.

The rows are read once, some at a time; what is kept of a query is its three latencies, in 4
bytes each unless one of them is over 4.29 s.
"""

from __future__ import annotations

from dataclasses import dataclass
from decimal import Decimal
from typing import Any

import numpy as np
import numpy.typing as npt

from servebench.judge.wording import say_percentile
from servebench.record.outcome import ERROR_OUTCOMES, Outcome
from servebench.record.rundata import Run

Int64s = npt.NDArray[np.int64]
Bytes = npt.NDArray[np.uint8]
#: Latencies in ns, of any integer dtype that holds them.
Latencies = npt.NDArray[np.integer[Any]]

#: The percentiles of every run: LoadGen's six, and one further out.
PERCENTILES = (50.0, 90.0, 95.0, 97.0, 99.0, 99.9, 99.99)
_SUM_CHUNK = 1 << 16  # latencies of up to a day add up to less than 2**63
_UINT32_MAX = (1 << 32) - 1
_NO_OUTCOMES: Bytes = np.empty(0, dtype=np.uint8)


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

    def __init__(self, known_ns: Latencies, infinite_ns: Latencies) -> None:
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
    def known_count(self) -> int:
        """Queries with a latency."""
        return len(self._known_ns)

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
        known = self._known_ns
        if not len(known) or limit_ns < known[0]:
            return self.count
        if limit_ns >= known[-1]:
            return self.infinite_count
        # As the array's own dtype, or numpy converts the whole array to that of the limit.
        return self.count - int(np.searchsorted(known, known.dtype.type(limit_ns), side="right"))

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
    """The books: planned = issued + shed + not due, issued = ok + error + timeout + unfinished."""

    planned: int
    issued: int
    ok: int
    error: int
    timeout: int
    shed: int
    unfinished: int
    not_due: int

    @property
    def due(self) -> int:
        """What all shares are of: the planned queries whose time came before the run stopped."""
        return self.planned - self.not_due


def stopped_ns(run: Run) -> int | None:
    """When a run stopped that did not come to its end, in ns from t=0; None where all that was planned was due.

    A worker that was told to stop says when. Of workers that are gone, the records tell what they did last; those that were
    interrupted first did not issue any more while they waited for replies.
    """
    state = run.facts.get("state")
    if state == "complete":
        return None
    stats = [worker.get("stats") or {} for worker in run.workers]
    told = [one["stopped_ns"] for one in stats if "stopped_ns" in one]
    if told:  # one that was not stopped went on to the end of the schedule
        return min((at_ns for at_ns in told if at_ns is not None), default=None)
    stamps = ("issued_ns",) if state == "interrupted" else ("issued_ns", "completed_ns")
    return max((int(times.max(initial=-1)) for chunk in run.chunks(*stamps) for times in chunk), default=-1)


def was_due(outcome: Bytes, scheduled_ns: Int64s, stop_ns: int | None) -> npt.NDArray[np.bool_]:
    """Which queries of a run that stopped at ``stop_ns`` were due: those whose time had come, or that were sent."""
    if stop_ns is None:
        return np.ones(len(outcome), dtype=np.bool_)
    due: npt.NDArray[np.bool_] = (scheduled_ns <= stop_ns) | ((outcome != Outcome.NOT_ISSUED) & (outcome != Outcome.SHED))
    return due


def _tally(outcome: Bytes) -> Int64s:
    return np.bincount(outcome, minlength=256)


def _books(counts: Int64s, not_due: int) -> Counts:
    tally = counts.tolist()
    ok, timeout = tally[Outcome.OK], tally[Outcome.TIMEOUT]
    error = sum(tally[outcome] for outcome in ERROR_OUTCOMES)
    unfinished = tally[Outcome.UNFINISHED] + tally[Outcome.OUTSTANDING]
    shed = tally[Outcome.SHED] + tally[Outcome.NOT_ISSUED]
    return Counts(sum(tally) + not_due, ok + error + timeout + unfinished, ok, error, timeout, shed, unfinished, not_due)


def _commonest_failure(counts: Int64s) -> str | None:
    failures = {outcome: int(counts[outcome]) for outcome in Outcome if outcome != Outcome.OK}
    commonest = max(failures, key=failures.__getitem__)
    return commonest.kind if failures[commonest] else None


@dataclass(frozen=True, slots=True)
class Summary:
    """Counts, distributions and windows of one run; durations are ns from t=0."""

    counts: Counts
    commonest_failure: str | None  #: the kind of outcome that most queries without a latency had; None when there are none
    response: Distribution
    service: Distribution
    delay: Distribution
    target_qps: float | None
    stopped_ns: int | None  #: see `stopped_ns`
    last_scheduled_ns: int  #: when the last planned query was due
    last_due_ns: int | None  #: when the last of the issued queries was due
    last_shed_ns: int | None  #: when the last of the shed queries was due
    last_issued_ns: int | None
    #: The time that completed rates divide by; None when nothing was issued. LoadGen's is the done time of the last-issued
    #: query, not the last done time. Two guards, idle in a run where every query succeeds, keep failures from improving the
    #: rate: when that query failed, the last moment at which anything ended counts; and in a complete run the window is no
    #: shorter than the schedule, whatever was shed at its end.
    completed_window_ns: int | None

    @property
    def scheduled_qps(self) -> float | None:
        """LoadGen's scheduled rate, (n - 1) / last scheduled time; None where no time passes."""
        return _rate(self.counts.planned, self.last_scheduled_ns)

    @property
    def issued_qps(self) -> float | None:
        """(issued - 1) / last issue time, from t=0 like the scheduled rate, so that the two compare."""
        return _rate(self.delay.known_count, self.last_issued_ns)

    @property
    def completed_qps(self) -> float | None:
        """(OK - 1) / `completed_window_ns`: LoadGen's completed samples per second, of OK queries only."""
        return _rate(self.counts.ok, self.completed_window_ns)

    def goodput_qps(self, limit_ns: int) -> float | None:
        """(OK and no slower than ``limit_ns`` - 1) / `completed_window_ns`: equals the completed rate when all are good."""
        return _rate(self.counts.due - self.response.over(limit_ns), self.completed_window_ns)

    def series(self, name: str) -> Distribution:
        """``response``, ``service`` or ``delay``."""
        return {"response": self.response, "service": self.service, "delay": self.delay}[name]


class _Series:
    """Collects the latencies of one series in as little memory as they need."""

    def __init__(self, rows: int) -> None:
        self._known, self._infinite = _Store(rows), _Store(rows)

    def add(self, end_ns: Int64s, start_ns: Int64s, ok: npt.NDArray[np.bool_]) -> None:
        """Rows with their ends and beginnings, -1 where there was none; those not ``ok`` have an infinite value."""
        self._known.add(end_ns[ok] - start_ns[ok])
        failed = ~ok
        if failed.any():
            ended_ns, began_ns = end_ns[failed], start_ns[failed]
            known_age_ns = np.where((ended_ns >= 0) & (began_ns >= 0), ended_ns - began_ns, 0)
            self._infinite.add(np.maximum(known_age_ns, 0))

    def distribution(self) -> Distribution:
        return Distribution(self._known.values(), self._infinite.values())


class _Store:
    """At most ``rows`` integers, as uint32 for as long as all of them fit; memory that is not filled is not used."""

    def __init__(self, rows: int) -> None:
        self._stored: Latencies = np.empty(rows, dtype=np.uint32)
        self._count = 0

    def add(self, values: Int64s) -> None:
        if self._stored.dtype == np.uint32 and values.size and not 0 <= values.min() <= values.max() <= _UINT32_MAX:
            wide = np.empty(len(self._stored), dtype=np.int64)
            wide[: self._count] = self.values()
            self._stored = wide
        self._stored[self._count : self._count + len(values)] = values
        self._count += len(values)

    def values(self) -> Latencies:
        return self._stored[: self._count]


def summarize(run: Run) -> Summary:
    """Counts, distributions and windows of a run."""
    response, service, delay = _Series(run.planned), _Series(run.planned), _Series(run.planned)
    tally, stop_ns = _tally(_NO_OUTCOMES), stopped_ns(run)
    last_scheduled_ns = last_due_ns = last_shed_ns = last_issued_ns = last_ended_ns = last_reply_ns = -1
    last_was_ok = False
    for rows in run.chunks("outcome", "scheduled_ns", "issued_ns", "completed_ns"):
        last_scheduled_ns = max(last_scheduled_ns, int(rows[1].max()))
        due = was_due(rows[0], rows[1], stop_ns)
        outcome, scheduled_ns, issued_ns, completed_ns = rows if due.all() else (column[due] for column in rows)
        if not len(outcome):
            continue
        ok, issued = outcome == Outcome.OK, issued_ns >= 0
        tally += _tally(outcome)
        response.add(completed_ns, scheduled_ns, ok)
        service.add(completed_ns, issued_ns, ok)
        delay.add(issued_ns, scheduled_ns, issued)
        last_due_ns = max(last_due_ns, int(scheduled_ns.max(where=issued, initial=-1)))
        last_shed_ns = max(last_shed_ns, int(scheduled_ns.max(where=outcome == Outcome.SHED, initial=-1)))
        last_ended_ns = max(last_ended_ns, int(completed_ns.max()))
        latest_ns = int(issued_ns.max())
        if latest_ns >= max(last_issued_ns, 0):
            row = int(np.flatnonzero(issued_ns == latest_ns)[-1])
            last_issued_ns, last_was_ok, last_reply_ns = latest_ns, bool(ok[row]), int(completed_ns[row])
    window_ns = None
    if last_issued_ns >= 0:
        window_ns = last_reply_ns if last_was_ok else max(last_ended_ns, last_issued_ns)
        if run.facts.get("state") == "complete":
            window_ns = max(window_ns, last_scheduled_ns)
    return Summary(
        counts=_books(tally, run.planned - int(tally.sum())),
        commonest_failure=_commonest_failure(tally),
        response=response.distribution(),
        service=service.distribution(),
        delay=delay.distribution(),
        target_qps=run.section("schedule").get("target_qps"),
        stopped_ns=stop_ns,
        last_scheduled_ns=max(last_scheduled_ns, 0),
        last_due_ns=last_due_ns if last_issued_ns >= 0 else None,
        last_shed_ns=last_shed_ns if last_shed_ns >= 0 else None,
        last_issued_ns=last_issued_ns if last_issued_ns >= 0 else None,
        completed_window_ns=window_ns,
    )


def _rate(count: int, window_ns: int | None) -> float | None:
    return max(count - 1, 0) / (window_ns / 1e9) if window_ns else None
