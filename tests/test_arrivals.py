"""The tests of the arrival process: true ones pass, the broken ones of other load generators are caught."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest
from scipy import stats
from synthetic import MS, S, synthetic_run

from servebench.judge.arrivals import (
    ArrivalChecks,
    check_arrivals,
    exponential_ks,
    index_of_dispersion,
    serial_correlation,
    shape_distance,
)
from servebench.load.schedule import make_schedule

Int64s = npt.NDArray[np.int64]


def times(gaps_ns: npt.ArrayLike) -> Int64s:
    return np.concatenate(([0], np.cumsum(gaps_ns))).astype(np.int64)


def poisson(seed: int, queries: int, qps: float = 200) -> Int64s:
    return times(np.random.default_rng(seed).exponential(S / qps, queries - 1))


def check(
    scheduled_ns: Int64s, issued_ns: Int64s | None = None, *, arrivals: str = "poisson", qps: float = 200
) -> ArrivalChecks:
    return check_arrivals(scheduled_ns, scheduled_ns if issued_ns is None else issued_ns, arrivals=arrivals, target_qps=qps)


@pytest.mark.parametrize("seed", range(200))
def test_true_poisson_arrivals_pass(seed: int) -> None:
    for queries in (101, 400, 4_000):
        scheduled_ns = poisson(seed, queries)
        checks = check(scheduled_ns, scheduled_ns + 50_000)
        assert checks.result == "ok", checks.problems


@pytest.mark.parametrize("qps", [0.5, 29.5, 1_000, 200_000, 5_000_000])
def test_loadgens_stream_passes_at_every_rate(qps: float) -> None:
    schedule = make_schedule("mlperf", target_qps=qps, seed=16159082839903944936, min_duration_ns=0, min_query_count=500_000)
    checks = check(schedule.offsets_ns, arrivals="mlperf", qps=qps)
    assert checks.result == "ok", checks.problems
    assert checks.cv2 == pytest.approx(1, abs=0.05)
    assert len(checks.dispersion) >= 2
    assert all(scale.index == pytest.approx(1, abs=0.5) for scale in checks.dispersion)


@pytest.mark.parametrize("qps", [7, 333.3, 123_456])
def test_constant_arrivals_pass(qps: float) -> None:
    schedule = make_schedule("constant", target_qps=qps, seed=0, min_duration_ns=0, min_query_count=1_000)
    checks = check(schedule.offsets_ns, arrivals="constant", qps=qps)
    assert checks.result == "ok"
    assert checks.cv2 == pytest.approx(0, abs=1e-6)


def same_seed_in_every_worker(workers: int) -> Int64s:
    """Each of W processes draws the same gaps: e1 W times, then e2 W times, ..."""
    return times(np.repeat(np.random.default_rng(7).exponential(S / 200, 2_000 // workers), workers))


def normalised_to_fill_each_second(seconds: int) -> Int64s:
    """Always 200 arrivals a second, at random times within it."""
    random = np.random.default_rng(7)
    parts = []
    for second in range(seconds):
        gaps = random.exponential(1, 200)
        parts.append((second + np.cumsum(gaps) / gaps.sum()) * S)
    return np.concatenate(parts).astype(np.int64)


@pytest.mark.parametrize(
    ("scheduled_ns", "problem"),
    [
        pytest.param(same_seed_in_every_worker(10), "neighbouring gaps are correlated", id="one-seed-for-ten-workers"),
        pytest.param(same_seed_in_every_worker(10), "vary more than Poisson's", id="one-seed-for-ten-workers-is-bursty"),
        pytest.param(same_seed_in_every_worker(2), "neighbouring gaps are correlated", id="one-seed-for-two-workers"),
        pytest.param(normalised_to_fill_each_second(10), "vary less than Poisson's", id="normalised-per-second-10-s"),
        pytest.param(normalised_to_fill_each_second(60), "vary less than Poisson's", id="normalised-per-second-60-s"),
        pytest.param(times(np.full(1_000, S // 200)), "not exponential", id="constant-claimed-as-poisson"),
        pytest.param(times(np.random.default_rng(1).uniform(0, 2 * S / 200, 2_000)), "not exponential", id="uniform-gaps"),
        pytest.param(
            poisson(1, 4_000, qps=180), "not exponential at the target rate", id="drifting-to-nine-tenths-of-the-rate"
        ),
    ],
)
def test_broken_processes_are_caught(scheduled_ns: Int64s, problem: str) -> None:
    checks = check(scheduled_ns)
    assert checks.result == "wrong"
    assert any(problem in one for one in checks.problems), checks.problems


def test_poisson_claimed_as_constant_is_caught() -> None:
    assert check(poisson(1, 1_000), arrivals="constant").result == "wrong"


def test_arrivals_out_of_order_are_caught() -> None:
    assert check(np.array([0, 2, 1], dtype=np.int64)).result == "wrong"


@pytest.mark.parametrize("queries", [1, 2, 100])
def test_too_few_arrivals_to_tell(queries: int) -> None:
    assert check(times(np.full(queries - 1, S // 200))).result == "too_few"  # constant, but nobody could know


def test_issued_in_bunches_is_caught() -> None:
    scheduled_ns = poisson(1, 4_000)
    bunch_ns = 4 * S
    issued_ns = -(-scheduled_ns // bunch_ns) * bunch_ns  # held until the end of each 4 s
    checks = check(scheduled_ns, issued_ns)
    assert checks.problems == ()
    assert len(checks.issue_problems) == 1
    assert checks.issued_cv2 is not None
    assert checks.issued_cv2 > 100


def test_issued_with_ordinary_lateness_is_fine() -> None:
    scheduled_ns = poisson(1, 4_000)
    late_ns = np.random.default_rng(2).exponential(2 * MS, 4_000).astype(np.int64)
    assert check(scheduled_ns, scheduled_ns + late_ns).result == "ok"


def test_only_what_was_issued_is_compared() -> None:
    scheduled_ns = poisson(1, 4_000)
    issued_ns = scheduled_ns.copy()
    issued_ns[1_000:3_000] = -1
    checks = check(scheduled_ns, issued_ns)
    assert checks.result == "ok"
    assert checks.issued_ks_distance == pytest.approx(0, abs=1 / 2_000)


# --- the statistics themselves, against scipy ----------------------------------------------


def test_ks_is_scipys() -> None:
    gaps_ns = np.diff(poisson(3, 2_000))
    theirs = stats.kstest(gaps_ns, stats.expon(scale=S / 210).cdf, method="asymp")
    distance, p_value = exponential_ks(gaps_ns, S / 210)
    assert distance == pytest.approx(theirs.statistic)
    assert p_value == pytest.approx(theirs.pvalue, rel=1e-3)


def test_serial_correlation_is_pearsons() -> None:
    gaps_ns = np.diff(poisson(3, 2_000))
    level = np.exp(-gaps_ns / gaps_ns.mean())
    correlation, p_value = serial_correlation(gaps_ns)
    theirs = stats.pearsonr(level[:-1], level[1:])
    assert correlation == pytest.approx(theirs.statistic, abs=2e-3)
    assert p_value == pytest.approx(theirs.pvalue, abs=0.02)


def test_index_of_dispersion_is_the_chi_squared_test() -> None:
    scheduled_ns = poisson(3, 2_000)
    scale = index_of_dispersion(scheduled_ns, S // 2)
    counts, _ = np.histogram(scheduled_ns, np.arange(scale.windows + 1) * (S // 2))
    assert scale.windows == scheduled_ns[-1] // (S // 2)
    assert scale.index == pytest.approx(counts.var(ddof=1) / counts.mean())
    tail = stats.chi2(scale.windows - 1)
    statistic = (scale.windows - 1) * scale.index
    assert scale.p_value == pytest.approx(2 * min(tail.cdf(statistic), tail.sf(statistic)))


def test_shape_distance_is_the_two_sample_ks() -> None:
    planned_ns, issued_ns = poisson(1, 500), np.sort(poisson(2, 500))
    theirs = stats.ks_2samp(planned_ns / planned_ns[-1], issued_ns / issued_ns[-1])
    assert shape_distance(planned_ns, issued_ns) == pytest.approx(theirs.statistic)


def test_the_checks_of_a_run_are_of_its_own_columns() -> None:
    run = synthetic_run(queries=500)
    checks = check_arrivals(run.scheduled_ns, run.issued_ns, arrivals="poisson", target_qps=200)
    assert checks.as_dict()["gaps"] == 499
    assert isinstance(checks.as_dict()["dispersion"], list)
