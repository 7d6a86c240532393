"""The numpy histogram against the ``hdrhistogram`` library, exact nearest ranks, and plain arithmetic."""

import math
from fractions import Fraction

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram
from hypothesis import example, given
from hypothesis import strategies as st

from servebench.record.histogram import (
    BUCKETS,
    COUNTS_LENGTH,
    HIGHEST_TRACKABLE_NS,
    LOWEST_EQUIVALENT_NS,
    SLOT_WIDTH_NS,
    SUB_BUCKETS,
    Histogram,
    count_index,
)

HOUR_NS = 3_600_000_000_000
#: Where a bucket or a slot begins, and the values on either side.
EDGES = sorted({(1 << bits) + step for bits in range(42) for step in (-1, 0, 1)} - {-1} | {HOUR_NS - 1, HOUR_NS})


def library_histogram() -> HdrHistogram:
    return HdrHistogram(1_000, HOUR_NS, 3)


def recorded(values_ns: list[int]) -> Histogram:
    histogram = Histogram()
    histogram.record(np.array(values_ns, dtype=np.int64))
    return histogram


def library_counts(histogram: HdrHistogram) -> list[int]:
    return list(histogram.counts)


def latencies(count: int, seed: int = 11) -> np.ndarray:
    return np.random.default_rng(seed).lognormal(16, 1.5, count).astype(np.int64)


def test_the_layout_is_the_librarys() -> None:
    library = library_histogram()
    assert (library.bucket_count, library.sub_bucket_count, library.counts_len) == (BUCKETS, SUB_BUCKETS, COUNTS_LENGTH)
    assert LOWEST_EQUIVALENT_NS.tolist() == [library.get_value_from_index(i) for i in range(library.counts_len)]
    highest = (LOWEST_EQUIVALENT_NS + SLOT_WIDTH_NS - 1).tolist()
    assert highest == [library.get_highest_equivalent_value(int(low)) for low in LOWEST_EQUIVALENT_NS]


def test_the_index_of_every_edge_is_the_librarys() -> None:
    library = library_histogram()
    assert count_index(np.array(EDGES)).tolist() == [library.get_counts_array_index(value) for value in EDGES]


@given(st.lists(st.one_of(st.integers(0, HOUR_NS), st.integers(0, 2_000_000), st.sampled_from(EDGES)), max_size=50))
@example([0])
@example([HOUR_NS])
def test_recording_equals_the_librarys_record_value(values_ns: list[int]) -> None:
    library = library_histogram()
    for value in values_ns:
        assert library.record_value(value)
    ours = recorded(values_ns)
    converted = ours.to_hdrh()
    assert ours.counts.tolist() == library_counts(library) == library_counts(converted)
    assert (converted.total_count, converted.min_value, converted.max_value) == (
        library.total_count,
        library.min_value,
        library.max_value,
    )
    assert ours.encode() == library.encode()
    assert ours.overflow == 0
    if values_ns:
        assert (ours.min_ns, ours.max_ns, ours.sum_ns) == (min(values_ns), max(values_ns), sum(values_ns))


def test_an_empty_histogram_says_nothing() -> None:
    empty = recorded([])
    assert (empty.count, empty.min_ns, empty.max_ns, empty.mean_ns, empty.percentile(99)) == (0, None, None, None, None)
    assert HdrHistogram.decode(empty.encode()).total_count == 0


def test_values_outside_the_range_are_counted_and_kept() -> None:
    histogram = recorded([-5_000, 0, 4_000_000, HOUR_NS, HOUR_NS + 1, 9 * HOUR_NS])
    assert histogram.count == int(histogram.counts.sum()) == 6
    assert histogram.overflow == 2
    assert histogram.counts[0] == 2  # the negative value beside the 0
    assert histogram.counts[count_index(np.array([HIGHEST_TRACKABLE_NS]))[0]] == 3
    assert (histogram.min_ns, histogram.max_ns) == (0, 9 * HOUR_NS)
    assert histogram.sum_ns == 4_000_000 + 11 * HOUR_NS + 1
    assert HdrHistogram.decode(histogram.encode()).total_count == 6


def test_the_sum_of_many_hours_does_not_wrap() -> None:
    histogram = Histogram()
    histogram.record(np.full(3_000_000, HOUR_NS, dtype=np.int64))
    assert histogram.sum_ns == 3_000_000 * HOUR_NS > 2**63
    assert histogram.mean_ns == HOUR_NS


@pytest.mark.parametrize("dtype", [np.float64, np.int32, np.uint64])
def test_only_int64_is_recorded(dtype: type) -> None:
    with pytest.raises(TypeError, match="int64"):
        Histogram().record(np.array([1], dtype=dtype))


@pytest.mark.parametrize("percentile", [1, 50, 90, 95, 97, 99, 99.9, 99.99, 100])
@pytest.mark.parametrize("count", [1, 2, 10, 93, 1_000, 9_999])
def test_percentiles_are_the_slot_of_the_nearest_rank(percentile: float, count: int) -> None:
    values = latencies(count)
    rank = math.ceil(Fraction(str(percentile)) * count / 100)
    exact = int(np.sort(values)[rank - 1])
    assert recorded(values.tolist()).percentile(percentile) == library_histogram().get_highest_equivalent_value(exact)


@pytest.mark.parametrize(("share", "rank"), [(0.07, 7), (0.14, 14), (0.55, 55)])
def test_a_percentile_with_a_rounding_error_is_not_the_next_rank(share: float, rank: int) -> None:
    assert share * 100 > rank  # by one ulp
    values = [1_000_000 * k for k in range(1, 101)]
    expected = library_histogram().get_highest_equivalent_value(1_000_000 * rank)
    assert recorded(values).percentile(share * 100) == expected


@pytest.mark.parametrize("percentile", [0, 50, 90, 95, 97, 99, 99.9, 100])
def test_percentiles_equal_the_librarys_where_the_rank_is_whole(percentile: float) -> None:
    histogram = recorded(latencies(10_000).tolist())
    assert histogram.percentile(percentile) == histogram.to_hdrh().get_value_at_percentile(percentile)


@pytest.mark.parametrize("percentile", [-0.1, 100.1])
def test_a_percentile_out_of_range_is_refused(percentile: float) -> None:
    with pytest.raises(ValueError, match="0 and 100"):
        recorded([1]).percentile(percentile)


def test_merging_equals_recording_together() -> None:
    left, right = latencies(700, seed=1), latencies(900, seed=2)
    together = recorded([*left.tolist(), *right.tolist(), 2 * HOUR_NS])
    merged = recorded(left.tolist())
    merged.merge(Histogram())
    merged.merge(recorded([*right.tolist(), 2 * HOUR_NS]))
    assert merged.counts.tolist() == together.counts.tolist()
    for name in ("count", "overflow", "min_ns", "max_ns", "sum_ns"):
        assert getattr(merged, name) == getattr(together, name)


def test_a_decoded_histogram_keeps_its_slots() -> None:
    original = recorded(latencies(5_000).tolist())
    library = HdrHistogram.decode(original.encode())
    decoded = Histogram.from_hdrh(library)
    assert decoded.counts.tolist() == original.counts.tolist()
    assert decoded.count == original.count
    assert [decoded.percentile(p) for p in (0, 50, 99.9, 100)] == [original.percentile(p) for p in (0, 50, 99.9, 100)]
    assert (decoded.min_ns, decoded.max_ns) == (library.get_min_value(), library.get_max_value())
    assert decoded.mean_ns == pytest.approx(library.get_mean_value(), rel=1e-12)
    assert decoded.mean_ns == pytest.approx(original.mean_ns, rel=1e-3)


def test_an_empty_histogram_survives_decoding() -> None:
    decoded = Histogram.from_hdrh(HdrHistogram.decode(Histogram().encode()))
    assert (decoded.count, decoded.min_ns, decoded.sum_ns) == (0, None, 0)


def test_another_precision_is_refused() -> None:
    with pytest.raises(ValueError, match="precision"):
        Histogram.from_hdrh(HdrHistogram(1_000, HOUR_NS, 2))
