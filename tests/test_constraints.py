"""Every kind of constraint: kept, broken, undecided, at the very bound, and with failures."""

from __future__ import annotations

import numpy as np
import pytest
from synthetic import MS, synthetic_run, with_outcome

from servebench.constraint import parse_constraint
from servebench.judge.constraints import Judgement, evaluate
from servebench.judge.summary import summarize
from servebench.record.outcome import Outcome
from servebench.record.rundata import RunData

_WORDS = {"PASS": "holds", "FAIL": "fails", "INCONCLUSIVE": "is undecided"}


def run_with(queries: int, slow: int = 0, failed: int = 0, slow_ms: float = 60) -> RunData:
    """Queries of 5 ms at 100/s, some of them slow, some failed."""
    response_ns = np.full(queries, 5 * MS)
    response_ns[:slow] = int(slow_ms * MS)
    run = synthetic_run(queries=queries, target_qps=100, arrivals="constant", response_ns=response_ns)
    return with_outcome(run, slice(slow, slow + failed), Outcome.STATUS) if failed else run


def judged(text: str, run: RunData) -> Judgement:
    return evaluate(parse_constraint(text), summarize(run))


@pytest.mark.parametrize(
    ("text", "queries", "slow", "failed", "result", "needed"),
    [
        pytest.param("p99 <= 50ms", 459, 0, 0, "PASS", None, id="p99-none-over"),
        pytest.param("p99 <= 50ms", 458, 0, 0, "INCONCLUSIVE", 1, id="p99-one-short"),
        pytest.param("p99 <= 50ms", 1_000, 3, 0, "INCONCLUSIVE", 1, id="p99-three-over-needs-1001"),
        pytest.param("p99 <= 50ms", 1_000, 9, 0, "INCONCLUSIVE", 874, id="p99-loadgens-percentile-bears-nine-of-1000"),
        pytest.param("p99 <= 50ms", 1_000, 10, 0, "FAIL", None, id="p99-the-tenth-of-1000-is-the-percentile"),
        pytest.param("p99 <= 50ms", 1_000, 0, 10, "FAIL", None, id="p99-failures-are-over-the-bound"),
        pytest.param("p99 <= 50ms", 1_000, 5, 5, "FAIL", None, id="p99-slow-and-failed-add-up"),
        pytest.param("p99 <= 50ms", 10, 1, 0, "FAIL", None, id="p99-a-broken-promise-needs-no-statistics"),
        pytest.param("p90 <= 50ms", 127, 5, 0, "PASS", None, id="p90-five-over"),
        pytest.param("service.p50 < 8ms", 7, 0, 0, "PASS", None, id="service-p50"),
        pytest.param("service.p50 < 8ms", 20, 0, 11, "FAIL", None, id="service-p50-with-failures"),
        pytest.param("delay.p90 < 1ms", 44, 0, 0, "PASS", None, id="delay-p90"),
        pytest.param("within(50ms) >= 99%", 459, 0, 0, "PASS", None, id="within-none-over"),
        pytest.param("within(50ms) >= 99%", 1_000, 10, 0, "INCONCLUSIVE", 1_010, id="within-a-share-of-exactly-99%"),
        pytest.param("within(50ms) > 99%", 1_000, 10, 0, "FAIL", None, id="within-more-than-99%"),
        pytest.param("within(50ms) >= 99%", 1_000, 6, 5, "FAIL", None, id="within-98.9%"),
        pytest.param("within(50ms) >= 100%", 100, 0, 0, "PASS", None, id="within-all-is-not-sampled"),
        pytest.param("within(50ms) >= 100%", 100, 1, 0, "FAIL", None, id="within-all-but-one"),
        pytest.param("errors < 0.1%", 4_603, 0, 0, "PASS", None, id="errors-none-of-4603"),
        pytest.param("errors < 0.1%", 4_602, 0, 0, "INCONCLUSIVE", 1, id="errors-none-of-4602"),
        pytest.param("errors < 0.1%", 1_000, 0, 1, "FAIL", None, id="errors-a-thousandth-is-not-less-than-a-thousandth"),
        pytest.param("errors <= 0.1%", 1_000, 0, 1, "INCONCLUSIVE", 5_636, id="errors-a-thousandth-is-no-more"),
        pytest.param("errors <= 0%", 10, 0, 0, "PASS", None, id="errors-none-at-all-is-not-sampled"),
        pytest.param("errors <= 0%", 10_000, 0, 1, "FAIL", None, id="errors-one-where-none-may-be"),
        pytest.param("completed >= 99%", 662, 0, 1, "PASS", None, id="completed-one-failed-of-662"),
        pytest.param("completed >= 99%", 661, 0, 1, "INCONCLUSIVE", 1, id="completed-one-failed-of-661"),
        pytest.param("completed >= 99%", 100, 0, 2, "FAIL", None, id="completed-98%"),
        pytest.param("mean < 6ms", 100, 0, 0, "PASS", None, id="mean"),
        pytest.param("mean < 6ms", 100, 2, 0, "FAIL", None, id="mean-6.1-ms"),
        pytest.param("mean < 1s", 100, 0, 1, "FAIL", None, id="mean-of-a-failed-query-is-infinite"),
        pytest.param("max <= 60ms", 100, 1, 0, "PASS", None, id="max-at-the-bound"),
        pytest.param("max < 60ms", 100, 1, 0, "FAIL", None, id="max-not-below-it"),
        pytest.param("service.max < 1s", 100, 0, 1, "FAIL", None, id="max-of-a-failed-query-is-infinite"),
        pytest.param("delay.max < 1ms", 100, 0, 1, "PASS", None, id="delay-of-a-failed-query-is-known"),
        pytest.param("goodput(50ms) >= 99/s", 101, 0, 0, "PASS", None, id="goodput"),
        pytest.param("goodput(50ms) >= 99/s", 101, 1, 1, "FAIL", None, id="goodput-98/s"),
    ],
)
def test_results(text: str, queries: int, slow: int, failed: int, result: str, needed: int | None) -> None:
    judgement = judged(text, run_with(queries, slow, failed))
    assert (judgement.result, judgement.needed_queries) == (result, needed), judgement.reason
    assert judgement.text == text
    assert judgement.reason.startswith(f"{text} {_WORDS[result]}: ")


@pytest.mark.parametrize(
    ("op", "latency_ns", "result"),
    [
        pytest.param("<=", 50 * MS, "PASS", id="at-most-allows-the-bound"),
        pytest.param("<=", 50 * MS + 1, "FAIL", id="at-most-forbids-one-ns-more"),
        pytest.param("<", 50 * MS - 1, "PASS", id="below-allows-one-ns-less"),
        pytest.param("<", 50 * MS, "FAIL", id="below-forbids-the-bound"),
    ],
)
def test_the_bound_is_exact_to_the_nanosecond(op: str, latency_ns: int, result: str) -> None:
    judgement = judged(f"p99 {op} 50ms", run_with(1_000, slow=1_000, slow_ms=latency_ns / MS))
    assert judgement.result == result
    assert judgement.measured == latency_ns
    assert judgement.bound == 50 * MS


def test_within_includes_its_bound() -> None:
    assert judged("within(60ms) >= 99%", run_with(459, slow=459)).measured == 1
    assert judged("within(59.999999ms) >= 99%", run_with(459, slow=459)).measured == 0


def test_numbers_and_units() -> None:
    run = run_with(1_000, slow=3, failed=2)
    errors, within, p50, goodput = (
        judged(text, run) for text in ("errors < 5%", "within(50ms) >= 90%", "p50 < 1s", "goodput(50ms) > 1/s")
    )
    assert (errors.unit, errors.measured, errors.bound, errors.over) == ("share", 0.002, 0.05, 2)
    assert (within.unit, within.measured, within.bound, within.over) == ("share", 0.995, 0.9, 5)
    assert (p50.unit, p50.measured, p50.bound, p50.over) == ("ns", 5 * MS, 10**9, 2)
    assert goodput.unit == "qps"
    assert goodput.measured == pytest.approx((1_000 - 5 - 1) / (9.99 + 0.005))


def test_an_infinite_percentile_says_what_it_exceeds() -> None:
    judgement = judged("p99 <= 50ms", run_with(100, slow=5, failed=3))
    assert judgement.result == "FAIL"
    assert judgement.measured is None
    assert judgement.measured_above == 60 * MS
    assert "no value (over 60.0 ms), because 3 of 100 queries failed; 8 of 100 queries were over the bound" in judgement.reason


def test_needed_seconds_are_at_the_scheduled_rate() -> None:
    judgement = judged("p99 <= 50ms", run_with(400))
    assert judgement.needed_queries == 59
    assert judgement.needed_seconds == pytest.approx(0.59)
    assert "run at least 59 more (1 s at 100/s)" in judgement.reason


def test_a_goodput_that_was_never_offered_is_named() -> None:
    assert "only 100/s were offered" in judged("goodput(50ms) >= 150/s", run_with(1_001)).reason


def test_shed_queries_are_over_every_bound() -> None:
    run = with_outcome(run_with(1_000), slice(0, 20), Outcome.SHED)
    for text in ("p99 <= 50ms", "service.p99 <= 50ms", "within(3600s) >= 99%", "completed >= 99%"):
        judgement = judged(text, run)
        assert judgement.result == "FAIL", text
        assert judgement.over == 20
