"""Evaluates the promises: each constraint against what was measured, with enough queries or without.

Percentiles, ``within``, ``errors`` and ``completed`` are statements about a share of the
queries, and are judged in the same two steps as LoadGen's server scenario:

1. The run itself must keep the promise (LoadGen's "performance constraint"): the percentile
   ``sorted[int(n * p)]`` is not over its bound, the share is on the right side of its bound.
   Otherwise FAIL, however short the run was.
2. It must show it with 99 % confidence: of n queries, t broke the promise, and
   `servebench.judge.early_stopping` says whether n is enough for t. Otherwise INCONCLUSIVE,
   with how many more queries it takes *if none of them breaks the promise*: a lower bound.

Both steps see failed, shed and unfinished queries as over every bound. A bound of 0 % or
100 % leaves nothing to be shown by sampling, so the first step alone decides; so it is with
``mean``, ``max`` and ``goodput``. One failed query makes the mean and the maximum of
response and service time infinite: FAIL.
"""

from __future__ import annotations

import math
import operator
from dataclasses import asdict, dataclass
from decimal import Decimal
from typing import Any, Literal

from servebench.constraint import Constraint
from servebench.judge.early_stopping import is_enough, max_over_latency, min_queries
from servebench.judge.summary import Summary, quantile_of
from servebench.judge.wording import Unit, say_measured, say_queries, say_rate, say_time
from servebench.record.outcome import Outcome

Result = Literal["PASS", "FAIL", "INCONCLUSIVE"]

_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_NEVER_SENT = (Outcome.SHED.kind, Outcome.NOT_ISSUED.kind)
_UNITS: dict[str, Unit] = {"errors": "share", "completed": "share", "within": "share", "goodput": "qps"}


@dataclass(frozen=True, slots=True)
class Judgement:
    """One constraint, judged. ``measured`` and ``bound`` are in ``unit``: ns, a fraction 0-1, or 1/s."""

    text: str
    unit: Unit
    measured: float | None  #: None: infinite (see ``measured_above``), or nothing to measure
    measured_above: float | None  #: what an infinite value is known to exceed
    bound: float
    result: Result
    queries: int  #: n: the queries it was judged on
    over: int | None  #: t: those of them that broke the promise; None for mean and max
    needed_queries: int | None  #: at least so many more would decide it; None when it is decided
    needed_seconds: float | None  #: the same at the scheduled rate
    reason: str  #: one sentence: the measured and allowed numbers, and what to do

    def as_dict(self) -> dict[str, Any]:
        """The entry of ``run.json``."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class _Share:
    """What a run shows about a promise that a share of queries must keep."""

    measured: float | None
    above: float | None
    queries: int
    over: int
    quantile: float  #: the share that must keep the promise, 0-1
    kept: bool  #: by this run, whatever its length


def limit_ns(constraint: Constraint) -> int:
    """The longest latency that still keeps the promise: times are whole ns, so ``< 50ms`` is ``<= 49999999ns``."""
    assert constraint.latency_bound_ns is not None
    return constraint.latency_bound_ns - (constraint.op == "<" and constraint.kind == "percentile")


def evaluate(constraint: Constraint, summary: Summary) -> Judgement:
    """Judge one constraint."""
    if constraint.kind in ("mean", "max"):
        return _judge_extreme(constraint, summary)
    if constraint.kind == "goodput":
        return _judge_goodput(constraint, summary)
    return _judge_share(constraint, _observe_share(constraint, summary), summary)


def _observe_share(constraint: Constraint, summary: Summary) -> _Share:
    bound, compare = constraint.bound, _COMPARE[constraint.op]
    if constraint.kind in ("errors", "completed"):
        due, failed = summary.counts.due, summary.counts.due - summary.counts.ok
        share = (failed if constraint.kind == "errors" else due - failed) / max(due, 1)
        quantile = _complement(bound) if constraint.kind == "errors" else bound
        return _Share(share, None, due, failed, quantile, compare(share, bound))
    series = summary.series(constraint.series)
    queries, over = series.count, series.over(limit_ns(constraint))
    if constraint.kind == "within":
        share = (queries - over) / queries if queries else 0.0
        return _Share(share, None, queries, over, bound, compare(share, bound))
    assert constraint.percentile is not None
    measured, above = series.percentile(constraint.percentile), series.above_ns(constraint.percentile)
    kept = measured is not None and measured <= limit_ns(constraint)
    return _Share(measured, above, queries, over, quantile_of(constraint.percentile), kept)


def _judge_share(constraint: Constraint, share: _Share, summary: Summary) -> Judgement:
    sampled = 0 < share.quantile < 1
    broke = _failed(constraint, summary) if constraint.kind in ("errors", "completed") else "were over the bound"
    facts = _say(constraint, share.measured, share.above, summary)
    if share.measured is not None or share.over > _without_value(constraint, summary):  # else it is said
        facts += f"; {share.over:,} of {say_queries(share.queries)} {broke}"
    if not share.kept:
        reason = (
            f"{constraint.text} fails: {facts}; {_remedy(constraint, summary, share.over, no_value=share.measured is None)}."
        )
        return _judgement(constraint, share.measured, "FAIL", share.queries, share.over, reason, above=share.above)
    if sampled and not is_enough(share.queries, share.over, share.quantile):
        needed = min_queries(share.over, share.quantile) - share.queries
        rate = summary.scheduled_qps or summary.target_qps
        seconds = needed / rate if rate else None
        time = f" ({math.ceil(seconds):,} s at {say_rate(rate)})" if seconds and rate else ""
        reason = (
            f"{constraint.text} is undecided: {facts}, too few queries to promise it with 99% confidence; "
            f"run at least {needed:,} more{time}."
        )
        return _judgement(
            constraint, share.measured, "INCONCLUSIVE", share.queries, share.over, reason, needed=needed, seconds=seconds
        )
    allowed = f", up to {max_over_latency(share.queries, share.quantile):,} are allowed at 99% confidence" if sampled else ""
    reason = f"{constraint.text} holds: {facts}{allowed}."
    return _judgement(constraint, share.measured, "PASS", share.queries, share.over, reason)


def _judge_extreme(constraint: Constraint, summary: Summary) -> Judgement:
    """Mean or maximum: infinite when the latency of one query is."""
    series = summary.series(constraint.series)
    known = series.mean_ns if constraint.kind == "mean" else series.max_ns
    measured, above = (None, known) if series.infinite_count else (known, None)
    kept = measured is not None and _COMPARE[constraint.op](measured, constraint.bound)
    facts = f"{_say(constraint, measured, above, summary)} over {say_queries(series.count)}"
    if kept:
        reason = f"{constraint.text} holds: {facts}."
    elif series.infinite_count:
        reason = (
            f"{constraint.text} fails: {series.infinite_count:,} of {say_queries(series.count)} have no latency, so the "
            f"{constraint.kind} is infinite; see errors, or promise a percentile and a share of errors instead."
        )
    else:
        reason = f"{constraint.text} fails: {facts}; {_remedy(constraint, summary, 0)}."
    return _judgement(constraint, measured, "PASS" if kept else "FAIL", series.count, None, reason, above=above)


def _judge_goodput(constraint: Constraint, summary: Summary) -> Judgement:
    limit, due, offered = limit_ns(constraint), summary.counts.due, summary.scheduled_qps
    over = summary.response.over(limit)
    measured = summary.goodput_qps(limit)
    kept = measured is not None and _COMPARE[constraint.op](measured, constraint.bound)
    facts = (
        f"{_say(constraint, measured, None, summary)}; {over:,} of {say_queries(due)} {_failed(constraint, summary)} "
        f"or took longer than {say_time(limit)}"
    )
    if kept:
        reason = f"{constraint.text} holds: {facts}."
    elif offered is not None and not _COMPARE[constraint.op](offered, constraint.bound):
        reason = f"{constraint.text} fails: {facts}; only {say_rate(offered)} were offered, raise load.target_qps."
    else:
        reason = f"{constraint.text} fails: {facts}; {_remedy(constraint, summary, over)}."
    return _judgement(constraint, measured, "PASS" if kept else "FAIL", due, over, reason)


def _judgement(
    constraint: Constraint,
    measured: float | None,
    result: Result,
    queries: int,
    over: int | None,
    reason: str,
    *,
    above: float | None = None,
    needed: int | None = None,
    seconds: float | None = None,
) -> Judgement:
    unit = _UNITS.get(constraint.kind, "ns")
    bound = int(constraint.bound) if unit == "ns" else constraint.bound
    return Judgement(constraint.text, unit, measured, above, bound, result, queries, over, needed, seconds, reason)


def _complement(share: float) -> float:
    """1 - share in decimal, so that 0.1 % gives the double nearest to 0.999."""
    return float(1 - Decimal(repr(share)))


def _say(constraint: Constraint, measured: float | None, above: float | None, summary: Summary) -> str:
    if measured is not None:
        return f"measured {say_measured(measured, _UNITS.get(constraint.kind, 'ns'), constraint.bound)}"
    if above is None:
        return "nothing was measured"
    known = f" (over {say_time(above)})" if above else ""
    failed = f"{_without_value(constraint, summary):,} of {say_queries(summary.counts.due)} {_failed(constraint, summary)}"
    return f"no value{known}, because {failed}"


def _without_value(constraint: Constraint, summary: Summary) -> int:
    """Queries over every bound: those that were not OK; of the issue delay, those that were never sent."""
    return summary.series(constraint.series).infinite_count


def _failed(constraint: Constraint, summary: Summary) -> str:
    if constraint.series == "delay":
        return "were never sent"
    return "failed or were never sent" if summary.counts.shed else "failed"


def _remedy(constraint: Constraint, summary: Summary, over: int, *, no_value: bool = False) -> str:
    """What to do when ``over`` queries broke the promise: whether failures did it, or slowness."""
    without_value = _without_value(constraint, summary)
    mostly_without = without_value and (no_value or 2 * without_value >= over)
    if constraint.series == "delay":
        late = "the client was late: give it more cores or client.workers"
        return "see errors for the reason" if mostly_without else late
    if mostly_without:
        if summary.commonest_failure in _NEVER_SENT:
            return "most of those were never sent, see errors for the reason"
        mend = f"mend what failed first (mostly {summary.commonest_failure}, see errors)"
        return f"{mend}, or lower load.target_qps if the server was overloaded"
    return "lower load.target_qps, or make the server faster"
