"""The stub's queue against queueing theory and tables worked by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from pydantic import ValidationError
from scipy import stats
from servebench_servers.stub_faults import Fault, Faults, FaultStream
from servebench_servers.stub_queue import Batch, QueueModel, Service, service_times_ns, simulate

MS = 1_000_000
ARRIVALS = 150_000

CONSTANT = Service(kind="constant", mean_ms=1.0)
EXPONENTIAL = Service(kind="exponential", mean_ms=1.0, seed=5)
LOGNORMAL = Service(kind="lognormal", mean_ms=1.0, sigma=0.8, seed=6)
BATCH = Service(kind="batch", batch_base_ms=2.0, batch_per_query_ms=1.0, max_batch=3)


def poisson_ns(rate_per_ms: float, count: int = ARRIVALS, seed: int = 99) -> np.ndarray:
    gaps_ms = np.random.Generator(np.random.PCG64(seed)).exponential(1 / rate_per_ms, count)
    return np.rint(np.cumsum(gaps_ms) * MS).astype(np.int64)


def lindley_departures_ns(arrivals_ns: np.ndarray, service_ns: np.ndarray) -> np.ndarray:
    """D_n = max(A_n, D_{n-1}) + S_n, unrolled: with C the running sum of S, D_n = C_n + max over k <= n of (A_k - C_{k-1})."""
    served = np.cumsum(service_ns)
    return served + np.maximum.accumulate(arrivals_ns - (served - service_ns))


@pytest.mark.parametrize("service", [CONSTANT, EXPONENTIAL, LOGNORMAL], ids=lambda service: service.kind)
@pytest.mark.parametrize("rate_per_ms", [0.5, 0.95, 1.3])
def test_departures_follow_lindleys_recursion(service, rate_per_ms):
    arrivals_ns = poisson_ns(rate_per_ms, 20_000)
    service_ns = service_times_ns(service, len(arrivals_ns))
    trace = simulate(arrivals_ns, service)
    expected_ns = lindley_departures_ns(arrivals_ns, service_ns)
    np.testing.assert_array_equal(trace.departure_ns, expected_ns)
    np.testing.assert_array_equal(trace.service_ns, service_ns)
    np.testing.assert_array_equal(trace.start_ns, expected_ns - service_ns)
    assert set(trace.batch_size) == {1}


@pytest.mark.parametrize("rho", [0.5, 0.7])
@pytest.mark.parametrize(
    ("service", "squared_variation"),
    [
        pytest.param(CONSTANT, 0.0, id="M/D/1"),
        pytest.param(EXPONENTIAL, 1.0, id="M/M/1"),
        pytest.param(LOGNORMAL, math.exp(0.8**2) - 1, id="M/G/1-lognormal"),
    ],
)
def test_mean_waiting_time_is_pollaczek_khinchines(service, squared_variation, rho):
    arrivals_ns = poisson_ns(rho)
    waits_ms = (simulate(arrivals_ns, service).start_ns - arrivals_ns) / MS
    expected_ms = rho * (1 + squared_variation) / (2 * (1 - rho))  # mean service time 1 ms
    # Waits are correlated; the standard error of their mean comes from means of 100 blocks, each far longer
    # than the queue's memory (a relaxation time of 1 / (1 - sqrt(rho))^2 = 38 services at rho = 0.7).
    block_means_ms = waits_ms.reshape(100, -1).mean(axis=1)
    standard_error_ms = block_means_ms.std(ddof=1) / 10
    assert standard_error_ms < 0.05 * expected_ms
    assert waits_ms.mean() == pytest.approx(expected_ms, abs=4 * standard_error_ms)


def test_response_times_of_mm1_are_exponential():
    rho = 0.7
    arrivals_ns = poisson_ns(rho)
    response_ms = (simulate(arrivals_ns, EXPONENTIAL).departure_ns - arrivals_ns) / MS
    for percentile in (50, 90, 99):
        expected_ms = -math.log(1 - percentile / 100) / (1 - rho)
        assert np.percentile(response_ms, percentile) == pytest.approx(expected_ms, rel=0.08)


@pytest.mark.parametrize(
    ("service", "rho", "limit", "blocked"),
    [
        # Erlang's loss formula for one server holds for any service time: rho / (1 + rho).
        pytest.param(CONSTANT, 0.8, 0, 0.8 / 1.8, id="M/D/1/1"),
        pytest.param(LOGNORMAL, 0.8, 0, 0.8 / 1.8, id="M/G/1/1"),
        # M/M/1/K, K = waiting places + 1: (1 - rho) rho^K / (1 - rho^(K+1)).
        pytest.param(EXPONENTIAL, 0.8, 3, 0.2 * 0.8**4 / (1 - 0.8**5), id="M/M/1/4"),
        pytest.param(EXPONENTIAL, 1.5, 1, -0.5 * 1.5**2 / (1 - 1.5**3), id="M/M/1/2-overloaded"),
    ],
)
def test_share_of_refused_arrivals_is_the_loss_formulas(service, rho, limit, blocked):
    trace = simulate(poisson_ns(rho), service, queue_limit=limit)
    assert np.mean(trace.batch_size == 0) == pytest.approx(blocked, abs=0.006)  # about 5 standard errors


def test_refused_arrivals_use_up_their_draw_and_leave_no_trace():
    arrivals_ns = poisson_ns(2.0, 5_000)
    trace = simulate(arrivals_ns, EXPONENTIAL, queue_limit=2)
    refused = trace.batch_size == 0
    drawn_ns = service_times_ns(EXPONENTIAL, len(arrivals_ns))
    np.testing.assert_array_equal(trace.service_ns[~refused], drawn_ns[~refused])
    np.testing.assert_array_equal(
        trace.departure_ns[~refused], lindley_departures_ns(arrivals_ns[~refused], drawn_ns[~refused])
    )
    assert not trace.departure_ns[refused].any() and not trace.service_ns[refused].any()


@pytest.mark.parametrize(
    ("arrivals_ms", "limit", "starts_ms", "departures_ms", "sizes"),
    [
        pytest.param([0, 10], None, [0, 10], [3, 13], [1, 1], id="idle-server-does-not-wait-for-company"),
        pytest.param(
            [0, 0.5, 1, 1.5, 2, 10],
            None,
            [0, 3, 3, 3, 8, 11],
            [3, 8, 8, 8, 11, 14],
            [1, 3, 3, 3, 1, 1],
            id="takes-who-waits-up-to-3",
        ),
        pytest.param([0, 0.5, 3, 3.1], None, [0, 3, 6, 6], [3, 6, 10, 10], [1, 1, 2, 2], id="a-tie-departs-first"),
        pytest.param([0, 0, 0, 0], None, [0, 3, 3, 3], [3, 8, 8, 8], [1, 3, 3, 3], id="together"),
        pytest.param([0, 0.5, 1, 1.5, 2, 10], 2, [0, 3, 3, 0, 0, 10], [3, 7, 7, 0, 0, 13], [1, 2, 2, 0, 0, 1], id="limit-2"),
    ],
)
def test_batches_of_a_plus_bn_by_hand(arrivals_ms, limit, starts_ms, departures_ms, sizes):
    # 2 ms + 1 ms a query, at most 3 together.
    trace = simulate(np.array([round(ms * MS) for ms in arrivals_ms]), BATCH, queue_limit=limit)
    np.testing.assert_array_equal(trace.start_ns, np.array(starts_ms) * MS)
    np.testing.assert_array_equal(trace.departure_ns, np.array(departures_ms) * MS)
    np.testing.assert_array_equal(trace.batch_size, sizes)


def test_events_one_by_one():
    queue = QueueModel(CONSTANT, queue_limit=1)
    assert queue.next_departure_ns is None and queue.depart(5) is None
    assert queue.arrive(100)
    assert queue.arrive(200)
    assert not queue.arrive(300)
    assert queue.next_departure_ns == 100 + MS
    assert queue.depart(99 + MS) is None
    assert queue.depart(10 * MS) == Batch((0,), 100, MS, 100 + MS)
    assert queue.next_departure_ns == 100 + 2 * MS
    assert queue.depart(10 * MS) == Batch((1,), 100 + MS, MS, 100 + 2 * MS)
    assert queue.next_departure_ns is None


def test_no_arrivals_give_an_empty_trace():
    assert simulate(np.array([], dtype=np.int64), CONSTANT).departure_ns.shape == (0,)


@pytest.mark.parametrize(
    ("service", "distribution"),
    [
        pytest.param(EXPONENTIAL, stats.expon(scale=1.0), id="exponential"),
        pytest.param(LOGNORMAL, stats.lognorm(s=0.8, scale=math.exp(-(0.8**2) / 2)), id="lognormal-of-mean-1"),
    ],
)
def test_service_times_have_the_promised_distribution(service, distribution):
    times_ns = service_times_ns(service, 20_000)
    assert stats.kstest(times_ns / MS, distribution.cdf).pvalue > 0.001


def test_exponential_stream_is_numpys_own():
    drawn_ms = np.random.Generator(np.random.PCG64(5)).exponential(1.0, 10_000)
    np.testing.assert_array_equal(service_times_ns(EXPONENTIAL, 10_000), np.rint(drawn_ms * MS))


@pytest.mark.parametrize("service", [CONSTANT, EXPONENTIAL, LOGNORMAL], ids=lambda service: service.kind)
def test_one_stream_whatever_the_number_of_draws(service):
    np.testing.assert_array_equal(service_times_ns(service, 9_000)[:100], service_times_ns(service, 100))
    assert (service_times_ns(service, 5) == MS).all() == (service is CONSTANT)
    other = service.model_copy(update={"seed": 1})
    assert (service_times_ns(service, 5) == service_times_ns(other, 5)).all() == (service is CONSTANT)


def test_a_batch_service_has_no_times_per_query():
    with pytest.raises(ValueError, match="depends on the batch"):
        service_times_ns(BATCH, 3)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        pytest.param({"kind": "constant"}, "constant needs mean_ms", id="missing-mean"),
        pytest.param({"kind": "lognormal", "mean_ms": 1}, "lognormal needs sigma", id="missing-sigma"),
        pytest.param({"kind": "batch", "batch_base_ms": 1}, "batch needs batch_per_query_ms, max_batch", id="missing-batch"),
        pytest.param({"kind": "constant", "mean_ms": 1, "sigma": 1}, "constant does not use sigma", id="useless-sigma"),
        pytest.param({"kind": "constant", "mean_ms": -1}, "mean_ms", id="negative-time"),
        pytest.param({"kind": "exponential", "mean_ms": math.inf}, "mean_ms", id="endless-time"),
        pytest.param({"kind": "uniform", "mean_ms": 1}, "kind", id="unknown-kind"),
        pytest.param({"kind": "constant", "mean_ms": 1, "meanms": 1}, "meanms", id="unknown-key"),
    ],
)
def test_settings_that_do_not_belong_together_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        Service(**settings)


def draw(faults: Faults, count: int = 20_000) -> list[Fault | None]:
    stream = FaultStream(faults)
    return [stream.next() for _ in range(count)]


def test_faults_hit_with_their_probabilities():
    drawn = draw(Faults(status=0.1, hang=0.2))
    # Five standard errors of a share of 20 000 draws; a hang only counts where no status fault came first.
    assert drawn.count(Fault.STATUS) / len(drawn) == pytest.approx(0.1, abs=0.011)
    assert drawn.count(Fault.HANG) / len(drawn) == pytest.approx(0.9 * 0.2, abs=0.014)
    assert set(drawn) == {None, Fault.STATUS, Fault.HANG}


def test_changing_one_fault_moves_no_other():
    hangs = [fault is Fault.HANG for fault in draw(Faults(hang=0.2))]
    for_both = draw(Faults(hang=0.2, garbage=0.5))
    assert [fault is Fault.HANG for fault in for_both] == hangs
    assert draw(Faults(hang=0.2, seed=1)) != draw(Faults(hang=0.2))


@pytest.mark.parametrize(
    ("probability", "expected"), [pytest.param(0.0, None, id="never"), pytest.param(1.0, Fault.RESET, id="always")]
)
def test_certain_faults(probability, expected):
    assert set(draw(Faults(reset=probability, close_idle=probability), 5_000)) == {expected}
