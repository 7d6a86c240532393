"""Counts, rates and percentiles against LoadGen's definitions, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import MS, S, synthetic_run, with_delay, with_facts, with_outcome

from servebench.judge.summary import Distribution, count_outcomes, percentile_index, quantile_of, summarize
from servebench.record.outcome import ERROR_OUTCOMES, Outcome
from servebench.record.rundata import RunData


def distribution(known: list[int], infinite: list[int] | None = None) -> Distribution:
    return Distribution(np.array(known, dtype=np.int64), np.array(infinite or [], dtype=np.int64))


def constant_run(queries: int, response_ms: float = 5) -> RunData:
    """Arrivals every 10 ms from 0."""
    return synthetic_run(queries=queries, target_qps=100, arrivals="constant", response_ns=int(response_ms * MS))


# --- percentiles ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("count", "percentile", "index"),
    [
        pytest.param(100, 99, 99, id="p99-of-100-is-the-largest"),
        pytest.param(50, 99, 49, id="p99-of-50-is-the-largest"),
        pytest.param(1_000, 99.9, 999, id="p99.9-of-1000"),
        pytest.param(1_000, 97, 970, id="p97-of-1000"),
        pytest.param(10, 50, 5, id="p50-of-10-is-the-sixth"),
        pytest.param(1, 99.99, 0, id="of-one-query-the-only-one"),
        pytest.param(100, 57, 56, id="100-times-0.57-is-a-hair-below-57-in-doubles"),
        pytest.param(3, 99.99999999999999, 2, id="never-past-the-end"),
    ],
)
def test_percentile_index_is_loadgens(count: int, percentile: float, index: int) -> None:
    assert percentile_index(count, percentile) == index


def test_quantiles_are_the_doubles_that_loadgen_writes() -> None:
    assert [quantile_of(p) for p in (50, 90, 95, 97, 99, 99.9, 99.99)] == [0.50, 0.90, 0.95, 0.97, 0.99, 0.999, 0.9999]


@given(st.lists(st.integers(0, 10**12), min_size=1, max_size=300), st.sampled_from([50.0, 90.0, 97.0, 99.0, 99.9]))
def test_percentiles_are_elements_of_the_sorted_array(values: list[int], percentile: float) -> None:
    assert distribution(values).percentile(percentile) == sorted(values)[int(len(values) * (percentile / 100))]


def test_infinite_latencies_stay_in_the_percentile() -> None:
    series = distribution(list(range(1, 99)), [7 * S, 5 * S])  # 98 known, 2 infinite
    assert series.count == 100
    assert series.percentile(97) == 98
    assert series.percentile(99) is None
    assert series.above_ns(97) is None
    assert series.above_ns(99) == 7 * S  # index 99: behind the one given up after 5 s
    assert series.over(1_000) == 2
    assert series.over(98) == 2
    assert series.over(97) == 3
    assert (series.min_ns, series.mean_ns, series.max_ns) == (1, 49, 98)  # 4851 / 98 = 49.5, cut as LoadGen's


def test_an_infinite_percentile_is_above_every_known_latency() -> None:
    assert distribution([3 * S], [MS]).above_ns(99) == 3 * S  # a fast refusal is no lower bound


def test_an_empty_distribution_has_no_numbers() -> None:
    block = distribution([]).as_dict((50.0, 99.0))
    assert block == {
        "count": 0,
        "infinite": 0,
        "min_ns": None,
        "mean_ns": None,
        "max_ns": None,
        "percentiles": {"50": None, "99": None},
        "above_ns": {},
    }


def test_the_mean_of_long_latencies_does_not_overflow() -> None:
    day_ns = 86_400 * S
    assert Distribution(np.full(200_000, day_ns), np.empty(0, dtype=np.int64)).mean_ns == day_ns  # sum 1.7e19 > 2**63


# --- the three series ----------------------------------------------------------------------


def test_response_service_and_delay_by_hand() -> None:
    run = with_delay(constant_run(4), slice(None), [0, 1 * MS, 2 * MS, 3 * MS])
    # completed - scheduled was 5 ms each, at the delays the run came with; service times stayed.
    service = (run.completed_ns - run.issued_ns).tolist()
    summary = summarize(run)
    assert summary.delay.as_dict((50.0,)) | {"mean_ns": None} == {
        "count": 4,
        "infinite": 0,
        "min_ns": 0,
        "mean_ns": None,
        "max_ns": 3 * MS,
        "percentiles": {"50": 2 * MS},
        "above_ns": {},
    }
    assert summary.service.max_ns == max(service)
    assert summary.response.max_ns == max(delay + one for delay, one in zip([0, MS, 2 * MS, 3 * MS], service, strict=True))


def test_everything_but_ok_is_infinite_in_response_and_service_time() -> None:
    run = constant_run(len(Outcome) * 10)
    for outcome in Outcome:
        run = with_outcome(run, [outcome * 10], outcome)
    failed = len(Outcome) - 1
    summary = summarize(run)
    assert summary.response.count == summary.service.count == run.planned
    assert summary.response.infinite_count == summary.service.infinite_count == failed
    assert summary.delay.count == run.planned - 2  # SHED and NOT_ISSUED never left
    assert summary.response.max_ns == 5 * MS


def test_a_failed_query_without_an_issue_time_has_no_delay() -> None:
    run = with_outcome(constant_run(100), [3], Outcome.CONNECT)
    issued_ns = run.issued_ns.copy()
    issued_ns[3] = -1
    summary = summarize(replace(run, issued_ns=issued_ns))
    assert (summary.counts.issued, summary.counts.error, summary.delay.count) == (100, 1, 99)


# --- counts --------------------------------------------------------------------------------


def test_the_books() -> None:
    run = constant_run(200)
    for row, outcome in enumerate(sorted(ERROR_OUTCOMES)):
        run = with_outcome(run, [row], outcome)
    run = with_outcome(run, [20, 21], Outcome.TIMEOUT)
    run = with_outcome(run, slice(30, 33), Outcome.SHED)
    run = with_outcome(run, slice(40, 44), Outcome.UNFINISHED)
    run = with_outcome(run, slice(50, 55), Outcome.OUTSTANDING)
    run = with_outcome(run, slice(60, 66), Outcome.NOT_ISSUED)
    counts = count_outcomes(run)
    assert (counts.planned, counts.error, counts.timeout, counts.shed, counts.unfinished) == (200, 7, 2, 3 + 6, 4 + 5)
    assert counts.ok == 200 - 7 - 2 - 9 - 9
    assert counts.issued == 200 - 9
    assert counts.balanced


def test_an_unknown_outcome_breaks_the_books() -> None:
    run = constant_run(10)
    outcome = run.outcome.copy()
    outcome[0] = 99
    assert not count_outcomes(replace(run, outcome=outcome)).balanced


# --- rates ---------------------------------------------------------------------------------


def test_rates_by_hand() -> None:
    run = with_delay(constant_run(101, response_ms=20), slice(None), MS)  # due at 0, 10, ..., 1000 ms
    summary = summarize(run)
    done_ns = int(run.completed_ns[100])
    assert summary.scheduled_qps == pytest.approx(100 / 1.0)
    assert summary.issued_qps == pytest.approx(100 / 1.001)
    assert summary.completed_qps == pytest.approx(100 / (done_ns / S))
    assert summary.goodput_qps(S) == summary.completed_qps


def test_the_completed_rate_ends_with_the_last_issued_query_and_not_with_the_last_reply() -> None:
    response_ns = np.full(101, 20 * MS)
    response_ns[0] = 5 * S
    summary = summarize(synthetic_run(queries=101, target_qps=100, arrivals="constant", response_ns=response_ns))
    assert summary.completed_qps == pytest.approx(100 / 1.020)


def test_failures_never_improve_a_rate() -> None:
    clean = constant_run(101, response_ms=20)
    best = summarize(clean).completed_qps
    assert best is not None
    for rows in ([0], [100], slice(50, 101), slice(0, 101)):
        for outcome in (Outcome.STATUS, Outcome.TIMEOUT, Outcome.UNFINISHED, Outcome.SHED):
            rate = summarize(with_outcome(clean, rows, outcome)).completed_qps
            assert rate is None or rate < best


def test_a_tail_that_was_shed_does_not_shorten_the_run() -> None:
    run = with_outcome(constant_run(101), slice(51, 101), Outcome.SHED)
    assert summarize(run).completed_qps == pytest.approx(50 / 1.0)


def test_a_last_query_that_failed_fast_does_not_shorten_the_run() -> None:
    run = with_outcome(constant_run(101, response_ms=20), [100], Outcome.STATUS)
    completed_ns = run.completed_ns.copy()
    completed_ns[100] = run.issued_ns[100] + 1
    assert summarize(replace(run, completed_ns=completed_ns)).completed_qps == pytest.approx(99 / 1.010)


def test_an_interrupted_run_is_rated_over_the_time_it_ran() -> None:
    run = with_facts(with_outcome(constant_run(101), slice(51, 101), Outcome.SHED), {"state": "interrupted"})
    assert summarize(run).completed_qps == pytest.approx(50 / 0.505)


def test_goodput_counts_ok_queries_within_the_bound() -> None:
    response_ns = np.full(101, 20 * MS)
    response_ns[10:20] = 80 * MS
    run = synthetic_run(queries=101, target_qps=100, arrivals="constant", response_ns=response_ns)
    summary = summarize(with_outcome(run, slice(30, 35), Outcome.STATUS))
    assert summary.goodput_qps(50 * MS) == pytest.approx((101 - 10 - 5 - 1) / 1.020)
    assert summary.goodput_qps(80 * MS) == pytest.approx((101 - 5 - 1) / 1.020)


def test_one_query_has_no_rate() -> None:
    summary = summarize(constant_run(1))
    assert summary.scheduled_qps is None
    assert summary.completed_qps == 0


def test_columns_of_different_length_are_refused() -> None:
    run = constant_run(3)
    with pytest.raises(ValueError, match="differ in length"):
        replace(run, outcome=run.outcome[:2])
