"""Counts, rates and percentiles against LoadGen's definitions, by hand."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import MS, S, interrupted, killed, synthetic_run, with_delay, with_facts, with_outcome

from servebench.judge.summary import Distribution, percentile_index, quantile_of, summarize
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
    assert (summary.delay.count, summary.delay.infinite_count) == (run.planned, 2)  # SHED and NOT_ISSUED never left
    assert summary.response.max_ns == 5 * MS


def test_a_failed_query_without_an_issue_time_has_no_delay() -> None:
    run = with_outcome(constant_run(100), [3], Outcome.CONNECT)
    issued_ns = run.issued_ns.copy()
    issued_ns[3] = -1
    summary = summarize(replace(run, issued_ns=issued_ns))
    assert (summary.counts.issued, summary.counts.error) == (100, 1)
    assert (summary.delay.count, summary.delay.infinite_count) == (100, 1)


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
    counts = summarize(run).counts
    assert (counts.planned, counts.error, counts.timeout, counts.shed, counts.unfinished) == (200, 7, 2, 3 + 6, 4 + 5)
    assert counts.ok == 200 - 7 - 2 - 9 - 9
    assert counts.issued == 200 - 9
    assert counts.not_due == 0


# --- runs that did not come to their end ---------------------------------------------------


def test_what_was_not_due_when_a_run_was_interrupted_is_in_nothing_but_the_books() -> None:
    """Due every 10 ms, interrupted at 505 ms, with three errors and one query shed by a cap before."""
    run = with_outcome(with_outcome(constant_run(101), [3, 4, 5], Outcome.STATUS), [50], Outcome.SHED)
    summary = summarize(interrupted(run, 505 * MS))
    counts = summary.counts
    assert (counts.planned, counts.not_due, counts.due) == (101, 50, 51)
    assert (counts.issued, counts.ok, counts.error, counts.shed) == (50, 47, 3, 1)
    for series in (summary.response, summary.service):
        assert (series.count, series.infinite_count, series.percentile(50)) == (51, 4, series.at(25))
    assert (summary.delay.count, summary.delay.infinite_count) == (51, 1)
    assert summary.last_shed_ns == 500 * MS
    assert summary.last_scheduled_ns == 1_000 * MS
    assert summary.commonest_failure == "status"


def test_what_a_late_client_had_not_sent_when_it_was_interrupted_was_due_all_the_same() -> None:
    run = with_outcome(interrupted(constant_run(101), 505 * MS), slice(41, 101), Outcome.SHED)
    counts = summarize(run).counts
    assert (counts.issued, counts.shed, counts.not_due) == (41, 10, 50)


@pytest.mark.parametrize("workers", [1, 2])
def test_a_killed_run_was_stopped_when_its_records_end(workers: int) -> None:
    run = killed(
        synthetic_run(queries=101, target_qps=100, arrivals="constant", response_ns=35 * MS, workers=workers), 505 * MS
    )
    last_ns = max(int(run.issued_ns.max()), int(run.completed_ns.max()))
    assert 500 * MS < last_ns <= 505 * MS
    counts = summarize(run).counts
    assert (counts.not_due, counts.shed, counts.unfinished, counts.ok) == (50, 0, 3, 48)


def test_a_killed_run_that_had_held_queries_back_owes_them() -> None:
    """Nothing was sent from 300 ms on, and a reply at 405 ms is the last that is known."""
    run = killed(constant_run(101), 299 * MS)
    completed_ns = run.completed_ns.copy()
    completed_ns[29] = 405 * MS
    counts = summarize(replace(run, completed_ns=completed_ns)).counts
    assert (counts.shed, counts.not_due) == (11, 60)  # due at 300, 310, ..., 400 ms


def test_replies_after_an_interrupt_do_not_make_more_queries_due() -> None:
    """An interrupted run whose workers were then killed: one reply came 300 ms after the last query was sent."""
    run = with_facts(killed(constant_run(101), 505 * MS), {"state": "interrupted"})
    completed_ns = run.completed_ns.copy()
    completed_ns[10] = 800 * MS
    assert summarize(replace(run, completed_ns=completed_ns)).counts.not_due == 50


def test_where_one_worker_is_lost_and_another_went_on_all_was_due() -> None:
    run = with_outcome(synthetic_run(queries=100, workers=2), slice(51, 100, 2), Outcome.NOT_ISSUED)
    run = with_facts(run, {"state": "failed", "workers.1.state": "lost", "workers.1.stats": None})
    counts = summarize(run).counts
    assert (counts.ok, counts.shed, counts.not_due) == (75, 25, 0)


def test_one_interrupt_that_comes_too_late_changes_nothing() -> None:
    run = interrupted(with_outcome(constant_run(101), [100], Outcome.SHED), 2 * S)
    assert (summarize(run).counts.shed, summarize(run).counts.not_due) == (1, 0)


def test_workers_that_heard_of_an_interrupt_one_after_the_other_owe_nothing_after_the_first() -> None:
    run = interrupted(synthetic_run(queries=100, target_qps=100, arrivals="constant", workers=2), 500 * MS)
    run = with_facts(run, {"workers.0.stats.stopped_ns": 520 * MS})
    assert (summarize(run).counts.shed, summarize(run).counts.not_due) == (0, 49)


def test_what_was_sent_after_another_worker_had_stopped_was_due() -> None:
    """Of those due at 510 and 520 ms the second is the slower worker's, and has its reply."""
    run = synthetic_run(queries=100, target_qps=100, arrivals="constant", workers=2)
    stopped = with_outcome(run, [51, *range(53, 100)], Outcome.SHED)
    stopped = with_facts(interrupted(stopped, 2 * S), {"workers.1.stats.stopped_ns": 500 * MS})
    counts = summarize(stopped).counts
    assert (counts.ok, counts.shed, counts.not_due) == (52, 0, 48)


def test_rates_of_an_interrupted_run_know_nothing_of_what_was_not_due() -> None:
    """50 of the 51 queries that were due at 0, 10, ..., 500 ms were sent, each 1 ms late; 40 had their reply in 20 ms."""
    run = with_outcome(with_delay(constant_run(101, response_ms=20), slice(None), MS), slice(0, 10), Outcome.STATUS)
    summary = summarize(interrupted(with_outcome(run, [30], Outcome.SHED), 505 * MS))
    assert summary.issued_qps == pytest.approx(49 / 0.501)
    done_ns = int(run.completed_ns[50])
    assert summary.completed_qps == summary.goodput_qps(S) == pytest.approx(39 / (done_ns / S))


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
    run = interrupted(constant_run(101), 505 * MS)
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
