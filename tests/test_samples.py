"""Which sample each query carries: LoadGen's orders, their properties, and settings that cannot be."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from scipy import stats

from servebench.errors import ProfileError
from servebench.load.samples import performance_set, sample_order
from servebench.load.scenario import Plan, plan_server
from servebench.profile import Load, Samples

ORDERS = ("with_replacement", "equal_issue", "unique", "same")


def _order(order: str = "with_replacement", **changes: Any) -> np.ndarray:
    settings = {"set_size": 64, "count": 1000, "min_query_count": 100, "seed": 7}
    return sample_order(order, **(settings | changes))  # type: ignore[arg-type]


def _plan(library_size: int, **samples: Any) -> Plan:  # takes two keys of load besides
    load = {key: samples.pop(key) for key in ("min_query_count", "schedule_seed") if key in samples}
    return plan_server(Load(target_qps=1000, min_duration_s=0.5, **load), Samples(**samples), library_size)


@pytest.mark.parametrize(  # observed with LoadGen 6.0.17: loaded_qsl_set, and the indices it issued
    ("size", "min_query_count", "loaded", "issued"),
    [
        pytest.param(10, 40, [3, 8, 5, 2, 4, 6, 7, 1], [2, 3, 7, 5, 7, 0, 7, 5], id="ten-samples"),
        pytest.param(10, 100, [3, 8, 5, 2, 4, 6, 7, 1], [2, 7, 8, 4, 8, 5, 4, 4], id="ten-samples-more-passes-skipped"),
        pytest.param(
            1000,
            100,
            [920, 367, 120, 809, 356, 117, 208, 561],
            [554, 200, 955, 167, 635, 765, 840, 551],
            id="thousand-samples",
        ),
    ],
)
def test_loadgen_with_replacement(size: int, min_query_count: int, loaded: list[int], issued: list[int]) -> None:
    assert performance_set(size, seed=5)[:8].tolist() == loaded
    plan = _plan(size, min_query_count=min_query_count, sample_set_seed=5, sample_order_seed=7)
    assert plan.sample_index.dtype == np.int32
    assert plan.sample_index[:8].tolist() == issued


# First and last three of std::shuffle(0..size-1, std::mt19937(1)), from a C++ program built with GCC 12's
# libstdc++: both of its algorithms, either side of the size where it changes, sizes with many rejections.
@pytest.mark.parametrize(
    ("size", "first", "last"),
    [
        pytest.param(2, [1, 0], [1, 0], id="2"),
        pytest.param(3, [1, 0, 2], [1, 0, 2], id="3"),
        pytest.param(10, [9, 0, 2], [3, 1, 8], id="10"),
        pytest.param(64, [49, 56, 23], [37, 51, 0], id="64"),
        pytest.param(24576, [22663, 14268, 22445], [750, 19727, 7374], id="24576"),
        pytest.param(60001, [15614, 40919, 19575], [56704, 44033, 36913], id="60001"),
        pytest.param(65534, [55407, 14268, 22445], [13765, 26066, 31489], id="65534"),
        pytest.param(65535, [15614, 40919, 19575], [59241, 25875, 30027], id="65535"),
        pytest.param(65536, [7199, 23693, 50844], [52626, 45445, 6113], id="65536"),
        pytest.param(65537, [7199, 23693, 50844], [45445, 6113, 49472], id="65537"),
        pytest.param(300000, [94617, 96639, 262270], [10386, 111897, 6010], id="300000"),
    ],
)
def test_libstdcxx_shuffle(size: int, first: list[int], last: list[int]) -> None:
    shuffled = performance_set(size, seed=1)
    assert (shuffled[:3].tolist(), shuffled[-3:].tolist()) == (first, last)
    assert np.array_equal(np.sort(shuffled), np.arange(size))


# After 1 + ceil(100 000 / size) such shuffles from std::mt19937(7), std::uniform_int_distribution<>(0, size - 1):
# draws 1, 2, 3, 99 999 and 100 000 of the same program.
@pytest.mark.parametrize(
    ("size", "first", "last"),
    [
        pytest.param(2, [1, 1, 0], [1, 1], id="2"),
        pytest.param(3, [2, 2, 0], [0, 2], id="3"),
        pytest.param(64, [39, 49, 49], [12, 10], id="64"),
        pytest.param(1000, [694, 168, 411], [671, 750], id="1000"),
        pytest.param(24576, [17741, 13917, 19565], [4422, 12055], id="24576"),
        pytest.param(65535, [46695, 15777, 54023], [64716, 42520], id="65535"),
        pytest.param(65536, [64135, 16623, 23003], [20785, 41623], id="65536"),
        pytest.param(300000, [199233, 221591, 98002], [205093, 204650], id="300000"),
    ],
)
def test_libstdcxx_uniform_draws_after_the_shuffles(size: int, first: list[int], last: list[int]) -> None:
    drawn = _order(set_size=size, count=100_000, min_query_count=100_000)
    assert (drawn[:3].tolist(), drawn[-2:].tolist()) == (first, last)


def test_with_replacement_is_uniform() -> None:
    counts = np.bincount(_order(count=64_000), minlength=64)
    assert stats.chisquare(counts).pvalue > 0.001


def test_equal_issue_permutes_the_set_in_every_pass() -> None:
    passes = _order("equal_issue", set_size=10, count=100, min_query_count=100).reshape(10, 10)
    assert np.array_equal(np.sort(passes, axis=1), np.tile(np.arange(10), (10, 1)))
    assert len(np.unique(passes, axis=0)) == 10


def test_equal_issue_starts_over_after_the_minimum() -> None:
    order = _order("equal_issue", set_size=10, count=60, min_query_count=25)
    assert np.array_equal(order[30:], order[:30])
    assert not np.array_equal(order[10:20], order[:10])


def test_equal_issue_pads_the_run_to_whole_passes() -> None:
    plan = _plan(48, order="equal_issue")
    assert plan.planned % 48 == 0
    assert set(np.bincount(plan.sample_index).tolist()) == {plan.planned // 48}


def test_unique_issues_each_loaded_sample_once_and_ends() -> None:
    plan = _plan(100, order="unique", performance_sample_count=40)
    assert plan.planned == 40  # min_duration_s would ask for about 500
    assert sorted(plan.sample_index.tolist()) == list(range(40))


def test_unique_obeys_the_maximum() -> None:
    load = Load(target_qps=1000, max_query_count=10)
    plan = plan_server(load, Samples(order="unique"), 40)
    assert len(set(plan.sample_index.tolist())) == plan.planned == 10


def test_same_repeats_one_sample_of_the_loaded_set() -> None:
    plan = _plan(1000, order="same", same_index=2, sample_set_seed=5)
    assert set(plan.sample_index.tolist()) == {120}  # the loaded set begins 920, 367, 120: see above


@pytest.mark.parametrize("order", ORDERS)
def test_single_sample(order: str) -> None:
    plan = _plan(1, order=order)
    assert set(plan.sample_index.tolist()) == {0}


@pytest.mark.parametrize("order", ORDERS)
def test_order_of_a_shorter_run_begins_that_of_a_longer_one(order: str) -> None:
    short, long = (_order(order, set_size=64, count=count, min_query_count=256) for count in (30, 64))
    assert np.array_equal(short, long[:30])


def test_only_the_loaded_set_is_issued() -> None:
    plan = _plan(1000, performance_sample_count=8)
    assert set(plan.sample_index.tolist()) == set(range(8))


def test_seeds_are_independent() -> None:
    base = _plan(64, sample_set_seed=1, sample_order_seed=2, schedule_seed=3)
    other_arrivals = _plan(64, sample_set_seed=1, sample_order_seed=2, schedule_seed=4)
    shared = min(base.planned, other_arrivals.planned)
    assert base.sha256 != other_arrivals.sha256
    assert np.array_equal(base.sample_index[:shared], other_arrivals.sample_index[:shared])
    for changed in ({"sample_set_seed": 9, "sample_order_seed": 2}, {"sample_set_seed": 1, "sample_order_seed": 9}):
        other_samples = _plan(64, schedule_seed=3, **changed)
        assert other_samples.sha256 == base.sha256
        assert not np.array_equal(other_samples.sample_index, base.sample_index)


@pytest.mark.parametrize(
    ("library_size", "samples", "message"),
    [
        pytest.param(
            64,
            {"performance_sample_count": 65},
            r"samples\.performance_sample_count: 65, but the library has 64 samples; allowed: 1 to 64",
            id="set-larger-than-library",
        ),
        pytest.param(
            64,
            {"order": "same", "same_index": 64},
            r"samples\.same_index: 64 is outside the loaded set of 64 samples; allowed: 0 to 63",
            id="same-outside-library",
        ),
        pytest.param(
            64,
            {"order": "same", "same_index": 8, "performance_sample_count": 8},
            r"samples\.same_index: 8 is outside the loaded set of 8 samples; allowed: 0 to 7",
            id="same-outside-set",
        ),
        pytest.param(0, {}, r"samples: the library is empty", id="empty-library"),
    ],
)
def test_bad_settings_are_named(library_size: int, samples: dict[str, Any], message: str) -> None:
    with pytest.raises(ProfileError, match=message) as caught:
        _plan(library_size, **samples)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("set_size", [64, 24_576])
def test_a_million_draws_take_well_under_a_second(set_size: int) -> None:
    started = time.perf_counter()
    _order(set_size=set_size, count=1_000_000, min_query_count=1_000_000)
    assert time.perf_counter() - started < 2.0
