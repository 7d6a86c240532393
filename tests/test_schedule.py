"""When queries are due: LoadGen's published schedules, the stopping rule, the warm-up, and what a schedule may not be."""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import struct
import time
import tracemalloc
from collections.abc import Iterator
from fractions import Fraction
from typing import Any

import numpy as np
import pytest
from scipy import stats

from servebench.errors import ProfileError
from servebench.load.scenario import arrival_share, plan_server, warmup_offsets_ns
from servebench.load.schedule import Schedule, draw_words, make_schedule, std_mt19937
from servebench.profile import Load, Samples

V5_1_SEED = 18209322760996052031  # schedule_rng_seed of MLPerf Inference v5.1
V6_0_SEED = 3936089224930324775
V6_1_SEED = 16159082839903944936
ARRIVALS = ("mlperf", "poisson", "constant")


def _schedule(arrivals: str = "mlperf", **changes: Any) -> Schedule:
    settings = {"target_qps": 1000.0, "seed": 7, "min_duration_ns": 0, "min_query_count": 100}
    return make_schedule(arrivals, **(settings | changes))  # type: ignore[arg-type]


def _plan(library_size: int = 64, samples: dict[str, Any] | None = None, **load: Any) -> Any:
    settings: dict[str, Any] = {"target_qps": 1000.0, "min_duration_s": 0.0}
    return plan_server(Load(**(settings | load)), Samples(**(samples or {})), library_size)


# Server runs of closed submissions to MLPerf Inference v5.1, as mlcommons/inference publishes their logs in
# tools/submission/directory_structure_samples: generated_query_count, generated_query_duration and
# result_scheduled_samples_per_sec. All but the last pad to whole passes over the dataset (equal issue).
@pytest.mark.parametrize(
    ("target_qps", "dataset", "min_duration_ms", "count", "duration_ns", "scheduled_qps"),
    [
        pytest.param(29.5, 24576, 600_000, 24576, 829680614631, "29.6212", id="29.5-pad-24576"),
        pytest.param(61.5, 24576, 600_000, 49152, 794151321718, "61.8935", id="61.5-pad-24576"),
        pytest.param(83.5, 24576, 600_000, 73728, 878749382839, "83.9006", id="83.5-pad-24576"),
        pytest.param(109.0, 24576, 600_000, 73728, 673170390180, "109.523", id="109-pad-24576"),
        pytest.param(335.0, 15000, 1_200_000, 405000, 1210642755555, "334.533", id="335-pad-15000-twenty-minutes"),
        pytest.param(420.0, 15000, 600_000, 255000, 606916186975, "420.156", id="420-pad-15000"),
        pytest.param(15.75, 8313, 600_000, 16626, 1055028977942, "15.7579", id="15.75-pad-8313"),
        pytest.param(16.5, None, 600_000, 9997, 600035703410, "16.6595", id="16.5-with-replacement"),
    ],
)
def test_published_submissions(
    target_qps: float, dataset: int | None, min_duration_ms: int, count: int, duration_ns: int, scheduled_qps: str
) -> None:
    plan = _plan(
        dataset or 1024,
        {"order": "equal_issue" if dataset else "with_replacement"},
        target_qps=target_qps,
        min_duration_s=min_duration_ms / 1000,
        min_query_count=100,
        schedule_seed=V5_1_SEED,
    )
    assert (plan.planned, plan.generated_duration_ns) == (count, duration_ns)
    assert f"{plan.scheduled_qps:.6g}" == scheduled_qps
    assert len(plan.offsets_ns) == len(plan.sample_index) == count


def test_first_offsets_of_a_published_submission() -> None:
    offsets_ns = _schedule(target_qps=29.5, seed=V5_1_SEED).offsets_ns
    assert offsets_ns.dtype == np.int64
    assert offsets_ns[:4].tolist() == [0, 62123627, 122943192, 160183430]


@pytest.mark.parametrize(  # generated_query_count and generated_query_duration in logs of LoadGen 6.0.17
    ("seed", "target_qps", "min_duration_ms", "min_query_count", "count", "duration_ns"),
    [
        pytest.param(0, 1000.0, 500, 100, 498, 502206620, id="seed-zero"),
        pytest.param(V6_1_SEED, 2000.0, 300, 100, 601, 300076806, id="v6.1-duration-decides"),
        pytest.param(V6_0_SEED, 137.5, 700, 200, 200, 1405201761, id="v6.0-count-decides"),
    ],
)
def test_loadgen_logs(
    seed: int, target_qps: float, min_duration_ms: int, min_query_count: int, count: int, duration_ns: int
) -> None:
    schedule = _schedule(
        target_qps=target_qps, seed=seed, min_duration_ns=min_duration_ms * 10**6, min_query_count=min_query_count
    )
    assert (len(schedule.offsets_ns), schedule.generated_duration_ns) == (count, duration_ns)


def test_generator_is_the_standard_mt19937() -> None:
    # ISO C++ [rand.predef]: the 10000th value of a default-constructed (seed 5489) std::mt19937.
    assert draw_words(std_mt19937(5489), 10_000)[-1] == 4123659995
    assert draw_words(std_mt19937(5489 + (7 << 32)), 10_000)[-1] == 4123659995


def _standard_words(seed: int) -> Iterator[int]:
    """mt19937 once more, from Python's own: init_genrand of Matsumoto and Nishimura's mt19937ar, then 32-bit outputs."""
    state = [seed & 0xFFFFFFFF]
    for i in range(1, 624):
        state.append((1812433253 * (state[-1] ^ state[-1] >> 30) + i) & 0xFFFFFFFF)
    generator = random.Random()
    generator.setstate((3, (*state, 624), None))
    while True:
        yield generator.getrandbits(32)


@pytest.mark.parametrize("target_qps", [pytest.param(1e-4, id="hours-between"), pytest.param(1e7, id="100-ns-between")])
def test_mlperf_gaps_are_exact_to_the_nanosecond(target_qps: float) -> None:
    # At 1e-4/s a gap of 1e13 ns has its last place at 0.002 ns, so a logarithm that is wrong in
    # the last place (numpy's SIMD one in a fifth of all cases) shifts dozens of these gaps by 1 ns.
    count = 50_000
    words = _standard_words(V6_1_SEED)
    expected = [0]
    for low, high in itertools.islice(zip(words, words, strict=True), count):
        survival = 1.0 - float(low + (high << 32)) / 2.0**64
        expected.append(expected[-1] + int(-math.log(survival) / target_qps * 1e9))
    schedule = _schedule(target_qps=target_qps, seed=V6_1_SEED, min_query_count=count)
    assert schedule.offsets_ns.tolist() == expected[:-1]
    assert schedule.generated_duration_ns == expected[-1]


def test_largest_random_number_stays_below_one(monkeypatch: pytest.MonkeyPatch) -> None:
    # 2^64 - 1 over 2^64 rounds to 1.0, which std::generate_canonical replaces by the double below it: 53 ln 2 = 36.7 mean gaps.
    ones = np.uint32(0xFFFFFFFF)
    monkeypatch.setattr("servebench.load.schedule.draw_words", lambda generator, count: np.full(count, ones))
    assert _schedule(target_qps=1.0).offsets_ns[1] == pytest.approx(53 * math.log(2) * 1e9, abs=1)


# With equal gaps of 1 ms the rule can be worked out by hand: arrival i (from 0) is due at i ms.
@pytest.mark.parametrize(
    ("rule", "count"),
    [
        pytest.param({"min_duration_ns": 0, "min_query_count": 1}, 1, id="one-query-at-zero"),
        pytest.param({"min_query_count": 100}, 100, id="count-decides"),
        pytest.param({"min_duration_ns": 200_000_000}, 201, id="last-offset-equals-min-duration"),
        pytest.param({"min_duration_ns": 200_000_001}, 202, id="min-duration-just-missed"),
        pytest.param({"min_duration_ns": 100_000_000_000}, 100_001, id="across-blocks"),
        pytest.param({"multiple_of": 30}, 120, id="pads-the-count"),
        pytest.param({"multiple_of": 25}, 100, id="needs-no-padding"),
        pytest.param({"multiple_of": 250}, 250, id="at-least-one-pass"),
        pytest.param({"multiple_of": 30, "min_duration_ns": 150_000_000}, 180, id="pads-the-duration"),
        pytest.param({"max_query_count": 40}, 40, id="max-count-beats-min-count"),
        pytest.param({"max_query_count": 1}, 1, id="max-count-one"),
        pytest.param({"max_query_count": 100_000, "min_duration_ns": 10**15}, 100_000, id="max-count-beats-min-duration"),
        pytest.param({"max_query_count": 101}, 100, id="max-count-out-of-reach"),
        pytest.param({"max_duration_ns": 40_000_000}, 41, id="max-duration-is-inclusive"),
        pytest.param({"max_duration_ns": 39_999_999}, 40, id="nothing-after-max-duration"),
        pytest.param({"max_duration_ns": 40_000_000, "max_query_count": 7}, 7, id="smaller-maximum-wins"),
        pytest.param({"max_duration_ns": 40_000_000, "multiple_of": 30}, 41, id="maximum-beats-padding"),
        pytest.param({"max_duration_ns": 70_000_000_000, "min_duration_ns": 10**15}, 70_001, id="max-duration-across-blocks"),
    ],
)
def test_stopping_rule(rule: dict[str, int], count: int) -> None:
    schedule = _schedule("constant", **rule)
    assert len(schedule.offsets_ns) == count
    assert schedule.offsets_ns[-1] == (count - 1) * 1_000_000
    assert schedule.generated_duration_ns == count * 1_000_000  # the sum of as many gaps


@pytest.mark.parametrize("arrivals", ["mlperf", "poisson"])
def test_maximums_cut_the_same_arrivals(arrivals: str) -> None:
    whole = _schedule(arrivals, min_query_count=150_000)
    by_count = _schedule(arrivals, min_query_count=150_000, max_query_count=100_000)
    by_time = _schedule(arrivals, min_query_count=150_000, max_duration_ns=100 * 10**9)
    assert np.array_equal(by_count.offsets_ns, whole.offsets_ns[:100_000])
    assert by_count.generated_duration_ns == whole.offsets_ns[100_000]
    assert np.array_equal(by_time.offsets_ns, whole.offsets_ns[whole.offsets_ns <= 100 * 10**9])


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_one_seed_gives_the_same_random_numbers_at_every_rate(arrivals: str) -> None:
    slow = _schedule(arrivals, target_qps=125.0, min_query_count=70_000).offsets_ns
    fast = _schedule(arrivals, target_qps=1000.0, min_query_count=70_000).offsets_ns
    # Each gap is rounded to whole ns before it is added: after i gaps at most i ns, here 8 i ns.
    assert np.all(np.abs(slow - 8 * fast) <= 9 * np.arange(70_000))


@pytest.mark.parametrize("arrivals", ["mlperf", "poisson"])
def test_seeds_differ_and_repeat(arrivals: str) -> None:
    first, again, other = (_schedule(arrivals, seed=seed) for seed in (1, 1, 2))
    assert first.sha256 == again.sha256 != other.sha256
    assert first.offsets_ns[0] == other.offsets_ns[0] == 0


@pytest.mark.parametrize("arrivals", ["mlperf", "poisson"])
def test_gaps_are_exponential(arrivals: str) -> None:
    gaps_s = np.diff(_schedule(arrivals, target_qps=250.0, seed=11, min_query_count=100_000).offsets_ns) / 1e9
    assert gaps_s.mean() == pytest.approx(1 / 250, rel=5 / math.sqrt(100_000))
    assert stats.kstest(gaps_s, "expon", args=(0, 1 / 250)).pvalue > 0.001


def test_poisson_is_numpys_generator() -> None:
    gaps_ns = np.rint(np.random.Generator(np.random.PCG64(99)).exponential(1.0, 80_000) / 400.0 * 1e9).astype(np.int64)
    schedule = _schedule("poisson", target_qps=400.0, seed=99, min_query_count=80_000)
    assert np.array_equal(schedule.offsets_ns[1:], np.cumsum(gaps_ns)[:-1])
    assert schedule.generated_duration_ns == gaps_ns.sum()


@pytest.mark.parametrize("target_qps", [3.0, 7.3, 999.9, 123_456.7])
def test_constant_offsets_never_accumulate_rounding(target_qps: float) -> None:
    offsets_ns = _schedule("constant", target_qps=target_qps, min_query_count=200_001).offsets_ns
    for i in (0, 1, 2, 3, 65_535, 65_536, 131_072, 199_999, 200_000):
        assert abs(int(offsets_ns[i]) - i * 10**9 / Fraction(target_qps)) <= Fraction(501, 1000)


def test_schedule_is_identified_by_its_bytes() -> None:
    schedule = _schedule(min_query_count=3)
    expected = hashlib.sha256(struct.pack("<3q", *schedule.offsets_ns.tolist())).hexdigest()
    assert schedule.sha256 == expected
    plan = _plan(min_query_count=3, schedule_seed=7)
    assert (plan.sha256, plan.arrivals, plan.target_qps, plan.seed) == (expected, "mlperf", 1000.0, 7)


def test_scheduled_rate_counts_gaps_not_queries() -> None:
    assert _schedule("constant", min_query_count=11).scheduled_qps == pytest.approx(1000)
    assert _schedule("constant", min_query_count=1).scheduled_qps == 0


def test_plan_cannot_be_changed() -> None:
    plan = _plan()
    for array in (plan.offsets_ns, plan.sample_index, *arrival_share(plan, 0, 2)):
        with pytest.raises(ValueError, match="read-only"):
            array[0] = 1


@pytest.mark.parametrize("workers", [1, 2, 3, 7])
def test_workers_share_one_schedule(workers: int) -> None:
    plan = _plan(min_query_count=100)
    shares = [arrival_share(plan, worker, workers) for worker in range(workers)]
    together = sorted(pair for share in shares for pair in zip(*(column.tolist() for column in share), strict=True))
    assert together == sorted(zip(plan.offsets_ns.tolist(), plan.sample_index.tolist(), strict=True))
    assert shares[workers - 1][0][1] == plan.offsets_ns[2 * workers - 1]


def test_more_workers_than_arrivals_leaves_some_idle() -> None:
    plan = _plan(min_query_count=2)
    assert [len(arrival_share(plan, worker, 3)[0]) for worker in range(3)] == [1, 1, 0]


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_warmup_lasts_as_long_as_asked_at_the_same_rate(arrivals: str) -> None:
    offsets_ns = warmup_offsets_ns(Load(target_qps=1000, warmup_s=20.0, arrivals=arrivals))  # type: ignore[arg-type]
    assert offsets_ns.dtype == np.int64
    assert offsets_ns[0] == 0
    assert 19 * 10**9 < offsets_ns[-1] < 20 * 10**9
    assert np.all(np.diff(offsets_ns) >= 0)
    assert len(offsets_ns) == pytest.approx(20_000, abs=0 if arrivals == "constant" else 5 * math.sqrt(20_000))


@pytest.mark.parametrize("arrivals", ["mlperf", "poisson"])
def test_warmup_has_its_own_stream(arrivals: str) -> None:
    load = Load(target_qps=1000, warmup_s=2.0, arrivals=arrivals, schedule_seed=3)  # type: ignore[arg-type]
    warmup = np.diff(warmup_offsets_ns(load))
    measured = np.diff(_schedule(arrivals, seed=3, min_query_count=len(warmup) + 1).offsets_ns)
    assert abs(np.corrcoef(warmup, measured)[0, 1]) < 5 / math.sqrt(len(warmup))
    assert np.array_equal(warmup, np.diff(warmup_offsets_ns(load)))
    other_seed = warmup_offsets_ns(load.model_copy(update={"schedule_seed": 4}))
    assert not np.array_equal(warmup[:100], np.diff(other_seed)[:100])


def test_no_warmup() -> None:
    offsets_ns = warmup_offsets_ns(Load(target_qps=1000, warmup_s=0))
    assert (len(offsets_ns), offsets_ns.dtype) == (0, np.int64)


@pytest.mark.parametrize(
    ("load", "message"),
    [
        pytest.param(
            {"target_qps": 1e7, "min_duration_s": 86_400.0},
            r"load\.min_duration_s: about 864,000,000,000 arrivals .* lower load\.target_qps or load\.min_duration_s, "
            r"or set load\.max_query_count",
            id="too-many",
        ),
        pytest.param(
            {"target_qps": 1e7, "min_duration_s": 86_400.0, "max_duration_s": 3600.0},
            r"load\.min_duration_s: about 36,000,000,000 arrivals",
            id="too-many-in-max-duration",
        ),
        pytest.param(
            {"target_qps": 1e-6, "min_query_count": 100},
            r"load\.target_qps: about 100 arrivals at 1e-06 per second take 1,169 days, more than the 104 .* "
            r"raise load\.target_qps, lower load\.min_query_count or set load\.max_query_count",
            id="too-long",
        ),
    ],
)
def test_schedules_too_large_are_refused_before_they_are_made(load: dict[str, float], message: str) -> None:
    with pytest.raises(ProfileError, match=message) as caught:
        _plan(**load)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_months_fit(arrivals: str) -> None:
    plan = _plan(arrivals=arrivals, target_qps=1e-6, min_query_count=7)  # about 81 days of the 104
    assert plan.planned == 7
    assert np.all(np.diff(plan.offsets_ns) > 0)
    assert plan.generated_duration_ns == pytest.approx(7e15, rel=0.9)


def test_padding_counts_towards_the_size() -> None:
    with pytest.raises(
        ProfileError, match=r"load\.target_qps: about 1,000,000 arrivals at 0\.0001 per second take 115,741 days"
    ):
        _plan(1_000_000, {"order": "equal_issue"}, target_qps=1e-4)


def test_a_maximum_makes_a_large_schedule_small() -> None:
    assert _plan(target_qps=1e7, min_duration_s=86_400.0, max_query_count=1000).planned == 1000
    assert _plan(target_qps=1e7, min_duration_s=86_400.0, max_duration_s=0.001).offsets_ns[-1] <= 1_000_000


def test_warmup_too_large_is_refused() -> None:
    with pytest.raises(ProfileError, match=r"load\.warmup_s: about 36,000,000,000 arrivals, .*; lower load\.warmup_s"):
        warmup_offsets_ns(Load(target_qps=1e7, warmup_s=3600))


def test_a_million_arrivals_take_less_than_300_ms() -> None:
    taken_s = []
    for _ in range(5):  # the best one, because a busy machine says nothing about the schedule
        started = time.perf_counter()
        _schedule(min_query_count=1_000_000)
        taken_s.append(time.perf_counter() - started)
    assert min(taken_s) < 0.3


@pytest.mark.parametrize("arrivals", ARRIVALS)
def test_memory_is_a_small_multiple_of_the_result(arrivals: str) -> None:
    tracemalloc.start()
    try:
        result_bytes = _schedule(arrivals, min_query_count=3_000_000).offsets_ns.nbytes
        peak_bytes = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak_bytes < 3 * result_bytes
