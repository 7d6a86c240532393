"""The verdict on one run, and the ``run.json`` document that carries it.

INVALID when the measurement is not trusted, whatever it measured; otherwise FAIL when a
promise was broken; otherwise INCONCLUSIVE when one could not be shown; otherwise PASS.

Beside our verdict stands LoadGen's own validity for the headline promise, the first
constraint on a percentile of the response time (MLPerf's target latency).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any, Literal

import numpy as np

from servebench.constraint import Constraint, parse_constraint
from servebench.judge.arrivals import check_issue, check_plan
from servebench.judge.constraints import Judgement, evaluate, limit_ns
from servebench.judge.early_stopping import CONFIDENCE, estimate_index, is_enough, max_over_latency, min_queries
from servebench.judge.evidence import Evidence
from servebench.judge.summary import PERCENTILES, Summary, quantile_of, summarize, was_due
from servebench.judge.trust import judge_trust, run_state
from servebench.record.outcome import INTERRUPTED, Outcome
from servebench.record.rundata import Run

SCHEMA = "servebench.run/1"

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "INVALID"]
#: What is said of queries whose process ended before they did.
_LEFT_OPEN = {
    Outcome.NOT_ISSUED: (Outcome.SHED.kind, "its process ended before it was sent"),
    Outcome.OUTSTANDING: (Outcome.UNFINISHED.kind, "its process ended before the reply was there"),
}
_EXIT_CODES: dict[str, int] = {"PASS": 0, "FAIL": 3, "INCONCLUSIVE": 4, "INVALID": 5}


def exit_code(verdict: str) -> int:
    """What the command exits with: 0 PASS, 3 FAIL, 4 INCONCLUSIVE, 5 INVALID."""
    return _EXIT_CODES[verdict]


def judge(run: Run) -> dict[str, Any]:
    """The ``run.json`` document of a run: JSON-able, described by ``run.schema.json``, a pure function of its argument.

    Reads the run's rows several times over and holds at most three whole columns at once:
    some 25 bytes a query.
    """
    facts, profile, schedule = run.facts, run.section("profile"), run.section("schedule")
    constraints = tuple(parse_constraint(text) for text in profile.get("constraints") or [])
    headline = headline_constraint(constraints)
    # The arrivals first: their tests need whole columns, which are gone before the latencies are gathered.
    checks = check_plan(
        run.column("scheduled_ns"), arrivals=schedule.get("arrivals") or "", target_qps=schedule.get("target_qps")
    )
    checks = check_issue(checks, run.column("scheduled_ns"), run.column("issued_ns"))
    summary = summarize(run)
    judgements = [evaluate(constraint, summary) for constraint in constraints]
    trust = judge_trust(Evidence(run, summary, constraints, checks))
    verdict = _verdict(trust["verdict"], judgements)
    stopping = _early_stopping(headline, summary)
    percentiles = tuple(sorted({*PERCENTILES, *_named_percentiles(constraints)}))
    return {
        "schema": SCHEMA,
        "version": facts.get("version"),
        "command": facts.get("command"),
        "started_at": facts.get("started_at"),
        "state": run_state(facts),
        "stop_reason": facts.get("stop_reason"),
        "profile": profile,
        "schedule": {**schedule, "last_scheduled_ns": summary.last_scheduled_ns, "checks": checks.as_dict()},
        "counts": asdict(summary.counts),
        "rates": {
            "target_qps": summary.target_qps,
            "scheduled_qps": summary.scheduled_qps,
            "issued_qps": summary.issued_qps,
            "completed_qps": summary.completed_qps,
            "goodput_qps": summary.goodput_qps(limit_ns(headline)) if headline else None,
        },
        "response_time": summary.response.as_dict(percentiles),
        "service_time": summary.service.as_dict(percentiles),
        "issue_delay": summary.delay.as_dict(percentiles),
        "errors": _errors(run, summary.stopped_ns),
        "output_check": facts.get("output_check"),
        "constraints": [judgement.as_dict() for judgement in judgements],
        "early_stopping": stopping,
        "loadgen_validity": _loadgen_validity(headline, summary, profile, stopping),
        "trust": trust,
        "verdict": verdict,
        "reasons": _sentences(trust, judgements),
        "workers": run.workers,
        "server": run.section("server"),
        "environment": run.environment,
    }


def headline_constraint(constraints: Sequence[Constraint]) -> Constraint | None:
    """The first constraint on a percentile of the response time; None when there is none."""
    return next((item for item in constraints if item.kind == "percentile" and item.series == "response"), None)


def _verdict(trust: str, judgements: Sequence[Judgement]) -> Verdict:
    results = {judgement.result for judgement in judgements}
    if trust == "INVALID":
        return "INVALID"
    if "FAIL" in results:
        return "FAIL"
    return "INCONCLUSIVE" if "INCONCLUSIVE" in results else "PASS"


def _sentences(trust: dict[str, Any], judgements: Sequence[Judgement]) -> list[str]:
    """What spoke against the measurement, if it is INVALID, then one sentence a constraint."""
    invalid = [f"{reason['text']}; {reason['remedy']}." for reason in trust["reasons"] if reason["severity"] == "INVALID"]
    return invalid + [judgement.reason for judgement in judgements]


def _named_percentiles(constraints: Sequence[Constraint]) -> set[float]:
    return {item.percentile for item in constraints if item.kind == "percentile" and item.percentile is not None}


def _early_stopping(headline: Constraint | None, summary: Summary) -> dict[str, Any] | None:
    """LoadGen's early-stopping test of the headline, with the numbers behind it."""
    if headline is None or headline.percentile is None:
        return None
    quantile, response = quantile_of(headline.percentile), summary.response
    queries, over = response.count, response.over(limit_ns(headline))
    required, at = min_queries(over, quantile), estimate_index(queries, quantile)
    return {
        "constraint": headline.text,
        "percentile": headline.percentile,
        "latency_bound_ns": headline.latency_bound_ns,
        "confidence": CONFIDENCE,
        "queries": queries,
        "over_latency": over,
        "allowed_over_latency": max_over_latency(queries, quantile),
        "required_queries": required,
        "needed_queries": max(required - queries, 0),
        "estimate_ns": response.at(at) if at is not None else None,
        "met": is_enough(queries, over, quantile),
    }


def _loadgen_validity(
    headline: Constraint | None, summary: Summary, profile: dict[str, Any], stopping: dict[str, Any] | None
) -> dict[str, bool] | None:
    """``result_validity`` of LoadGen's server scenario and its parts (loadgen/results.cc)."""
    if headline is None or headline.percentile is None or stopping is None:
        return None
    load = profile.get("load") or {}
    latency_ns = summary.response.percentile(headline.percentile)
    parts = {
        "min_duration_met": (summary.last_due_ns or 0) >= (load.get("min_duration_s") or 0) * 1e9,
        "min_queries_met": summary.counts.issued >= (load.get("min_query_count") or 0),
        "perf_constraints_met": latency_ns is not None and latency_ns <= limit_ns(headline),
        "early_stopping_met": stopping["met"],
    }
    return {**parts, "valid": all(parts.values())}


def _errors(run: Run, stop_ns: int | None) -> list[dict[str, Any]]:
    """Failures by kind and detail, most frequent first, as many of each kind as there are among the queries that were due.

    The records say how many; the workers told the details, but one that was lost told nothing. What a process left open when
    it was killed is shed or unfinished, as in the books.
    """
    found, examples, not_due = np.zeros(256, dtype=np.int64), dict[int, int](), 0
    at = 0
    for outcomes, scheduled_ns in run.chunks("outcome", "scheduled_ns"):
        due = was_due(outcomes, scheduled_ns, stop_ns)
        not_due += int(np.count_nonzero(outcomes[~due] == Outcome.SHED))
        tally = np.bincount(outcomes[due], minlength=256)
        for code in np.flatnonzero(tally).tolist():
            if code not in examples:
                examples[code] = at + int(np.argmax((outcomes == code) & due))
        found += tally
        at += len(outcomes)
    errors = []
    told = Counter[str]()
    for error in run.facts.get("errors") or []:
        count = error["count"]
        if (error["kind"], error["detail"]) == (Outcome.SHED.kind, INTERRUPTED):
            count -= min(not_due, count)
        if count:
            errors.append({**error, "count": count})
            told[error["kind"]] += count
    for outcome in Outcome:
        kind, detail = _LEFT_OPEN.get(outcome, (outcome.kind, ""))
        untold = int(found[outcome]) - (0 if outcome in _LEFT_OPEN else told[kind])
        if untold > 0 and outcome != Outcome.OK:
            errors.append({"kind": kind, "detail": detail, "count": untold, "example": examples[outcome]})
    return sorted(errors, key=lambda error: -error["count"])
