"""The HDR files, read back by the library's reader and as plotFiles.html does, against the library's own numbers.

The table of percentile levels is the one that HdrHistogram's Java original prints (its example files
show it); the golden table was printed by it for the same five values.
"""

import re
from pathlib import Path

import numpy as np
import pytest
from hdrh.histogram import HdrHistogram
from hdrh.log import HistogramLogReader

from servebench.record.histogram import Histogram
from servebench.report.hdr_files import interval_histograms, write_hgrm, write_hlog

START_S = 1_760_000_000.25
PERCENTILES = (50, 90, 95, 97, 99, 99.9, 99.99, 100)
#: Levels that HdrHistogram prints with five ticks per half distance, down to 1 - 2**-4.
PUBLISHED_LEVELS = [
    *(0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.775, 0.8, 0.825, 0.85, 0.875),
    *(0.8875, 0.9, 0.9125, 0.925, 0.9375, 0.94375, 0.95, 0.95625, 0.9625, 0.96875),
]

#: Printed by HdrHistogram 2.2 (Java), `outputPercentileDistribution(out, 5, 1e6)`; the last two lines are ours.
GOLDEN = """\
       Value     Percentile TotalCount 1/(1-Percentile)

      10.002 0.000000000000          1           1.00
      10.002 0.100000000000          1           1.11
      10.002 0.200000000000          1           1.25
      20.005 0.300000000000          2           1.43
      20.005 0.400000000000          2           1.67
      30.015 0.500000000000          3           2.00
      30.015 0.550000000000          3           2.22
      30.015 0.600000000000          3           2.50
      40.010 0.650000000000          4           2.86
      40.010 0.700000000000          4           3.33
      40.010 0.750000000000          4           4.00
      40.010 0.775000000000          4           4.44
      40.010 0.800000000000          4           5.00
     500.171 0.825000000000          5           5.71
     500.171 1.000000000000          5
#[Mean    =      120.007, StdDeviation   =      190.279]
#[Max     =      500.171, Total count    =            5]
#[Buckets =           23, SubBuckets     =         2048]
#[Value: ms]
#[Failed queries, over every bound: 4]
"""


def histogram_of(values_ns: np.ndarray) -> Histogram:
    histogram = Histogram()
    histogram.record(values_ns)
    return histogram


def traffic(count: int = 6_000, seconds: float = 8.0) -> tuple[np.ndarray, np.ndarray]:
    """Scheduled offsets with an empty stretch from 3 s to 5 s, in no order, and latencies."""
    generator = np.random.default_rng(5)
    scheduled = (generator.uniform(0, seconds, count) * 1e9).astype(np.int64)
    scheduled = scheduled[(scheduled < 3_000_000_000) | (scheduled >= 5_000_000_000)]
    return scheduled, generator.lognormal(16, 1.2, scheduled.size).astype(np.int64)


def read_hlog(path: Path) -> tuple[HistogramLogReader, list[HdrHistogram]]:
    reader = HistogramLogReader(str(path), HdrHistogram(1_000, 3_600_000_000_000, 3))
    histograms = []
    while (histogram := reader.get_next_interval_histogram()) is not None:
        histograms.append(histogram)
    reader.close()
    return reader, histograms


def plotted(text: str) -> list[list[float]]:
    """The rows that plotFiles.html draws: four numbers, no comment."""
    rows = []
    for line in text.splitlines():
        fields = line.strip().split()
        if len(fields) == 4 and not line.startswith("#") and re.fullmatch(r"[\d.]+", fields[0]):
            rows.append([float(field) for field in fields])
    return rows


def trailer_number(text: str, name: str) -> float:
    match = re.search(rf"{name} *= +([\d.]+)[,\]]", text)
    assert match is not None
    return float(match[1])


def test_queries_are_placed_by_the_second_they_were_due_in() -> None:
    scheduled, values = traffic()
    intervals = list(interval_histograms(scheduled, values))
    assert [interval.start_s for interval in intervals] == [0, 1, 2, 3, 4, 5, 6, 7]
    assert {interval.length_s for interval in intervals} == {1.0}
    due_in = np.bincount(scheduled // 1_000_000_000, minlength=8)
    assert [interval.histogram.count for interval in intervals] == due_in.tolist()
    assert due_in[3] == due_in[4] == 0
    in_second_6 = values[(scheduled >= 6_000_000_000) & (scheduled < 7_000_000_000)]
    assert intervals[6].histogram.counts.tolist() == histogram_of(in_second_6).counts.tolist()


@pytest.mark.parametrize(
    ("scheduled", "expected"),
    [
        pytest.param([], [], id="no query, no interval"),
        pytest.param([0], [1], id="due at t=0"),
        pytest.param([499_999_999, 500_000_000], [1, 1], id="an edge belongs to the later interval"),
    ],
)
def test_interval_edges(scheduled: list[int], expected: list[int]) -> None:
    offsets = np.array(scheduled, dtype=np.int64)
    intervals = interval_histograms(offsets, offsets + 1, interval_ns=500_000_000)
    assert [interval.histogram.count for interval in intervals] == expected


@pytest.mark.parametrize(
    ("scheduled", "values", "message"),
    [
        pytest.param([1, 2], [1], "2 scheduled times but 1 values", id="different lengths"),
        pytest.param([-1], [1], "not negative", id="before the start"),
    ],
)
def test_bad_interval_input_is_refused(scheduled: list[int], values: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        list(interval_histograms(np.array(scheduled), np.array(values)))


def test_the_log_reads_back_with_the_same_counts_and_percentiles(tmp_path: Path) -> None:
    scheduled, response = traffic()
    service = response // 3
    path = tmp_path / "latency.hlog"
    series = {"": interval_histograms(scheduled, response), "service": interval_histograms(scheduled, service)}
    write_hlog(path, series, start_realtime_s=START_S, failed_queries=17)

    reader, intervals = read_hlog(path)
    assert reader.get_start_time_sec() == START_S
    assert [interval.get_tag() for interval in intervals] == [None, "service"] * 8
    for tag, values in ((None, response), ("service", service)):
        mine = [interval for interval in intervals if interval.get_tag() == tag]
        assert [interval.get_start_time_stamp() for interval in mine] == [(START_S + k) * 1000 for k in range(8)]
        assert [interval.get_end_time_stamp() for interval in mine] == [(START_S + k + 1) * 1000 for k in range(8)]
        total = HdrHistogram(1_000, 3_600_000_000_000, 3)
        expected = HdrHistogram(1_000, 3_600_000_000_000, 3)
        for interval in mine:
            total.add(interval)
        for value in values.tolist():
            expected.record_value(value)
        assert total.get_total_count() == values.size
        assert total.get_percentile_to_value_dict(PERCENTILES) == expected.get_percentile_to_value_dict(PERCENTILES)


def test_the_log_states_maxima_and_failures(tmp_path: Path) -> None:
    path = tmp_path / "latency.hlog"
    series = {"": interval_histograms(np.array([0, 10, 1_500_000_000]), np.array([900_000, 123_456, 42_000_000]))}
    write_hlog(path, series, start_realtime_s=START_S, failed_queries=2)
    lines = path.read_text().splitlines()
    assert lines[0] == "#[Histogram log format version 1.3]"
    assert lines[1] == "#[StartTime: 1760000000.250 (seconds since epoch), 2025-10-09 08:53:20.250+00:00]"
    assert lines[2] == "#[BaseTime: 1760000000.250 (seconds since epoch)]"
    assert "#[Failed queries, over every bound: 2]" in lines
    assert lines[-3] == '"StartTimestamp","Interval_Length","Interval_Max","Interval_Compressed_Histogram"'
    assert lines[-2].startswith("0.000,1.000,0.900,HISTFAAAA")  # the maximum is not floored to 0 ms
    assert lines[-1].startswith("1.000,1.000,42.000,HISTFAAAA")


@pytest.mark.parametrize("tag", ["a b", "a,b", "a\nb"])
def test_a_tag_that_would_break_the_log_is_refused(tmp_path: Path, tag: str) -> None:
    with pytest.raises(ValueError, match="tag"):
        write_hlog(tmp_path / "x.hlog", {tag: []}, start_realtime_s=START_S)
    assert list(tmp_path.iterdir()) == []


def test_a_log_that_fails_half_way_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "latency.hlog"
    path.write_text("old")
    with pytest.raises(ValueError, match="scheduled"):
        write_hlog(path, {"": interval_histograms(np.array([1, 2]), np.array([1]))}, start_realtime_s=START_S)
    assert [file.name for file in tmp_path.iterdir()] == ["latency.hlog"]
    assert path.read_text() == "old"


def test_the_percentile_table_is_javas(tmp_path: Path) -> None:
    path = tmp_path / "latency.hgrm"
    write_hgrm(path, histogram_of(np.array([10, 20, 30, 40, 500]) * 1_000_000), failed_queries=4)
    assert path.read_text() == GOLDEN


def test_the_percentile_table_agrees_with_the_library(tmp_path: Path) -> None:
    histogram = histogram_of(traffic(count=20_000)[1])
    path = tmp_path / "latency.hgrm"
    write_hgrm(path, histogram)
    text, library = path.read_text(), histogram.to_hdrh()
    rows = plotted(text)
    assert [row[1] for row in rows[: len(PUBLISHED_LEVELS)]] == PUBLISHED_LEVELS
    for value_ms, level, total, inverse in rows:
        assert inverse == pytest.approx(1 / (1 - level), abs=0.005)
        slot_ns = library.get_value_at_percentile(100 * total / histogram.count)
        assert value_ms == pytest.approx(slot_ns / 1e6, abs=0.0005)
        assert total >= level * histogram.count
        if level:  # the slot before holds too few: this is the lowest value at that level
            below = library.get_lowest_equivalent_value(slot_ns) - 1
            assert sum(list(library.counts)[: library.get_counts_array_index(below) + 1]) < level * histogram.count
    assert trailer_number(text, "Mean") == pytest.approx(library.get_mean_value() / 1e6, abs=0.0005)
    assert trailer_number(text, "StdDeviation") == pytest.approx(library.get_stddev() / 1e6, abs=0.0005)
    assert trailer_number(text, "Max") == pytest.approx(library.get_max_value() / 1e6, abs=0.0005)
    assert trailer_number(text, "Total count") == histogram.count
    assert trailer_number(text, "Buckets") == library.bucket_count
    assert trailer_number(text, "SubBuckets") == library.sub_bucket_count


def test_an_empty_percentile_table_is_readable(tmp_path: Path) -> None:
    path = tmp_path / "latency.hgrm"
    write_hgrm(path, Histogram(), failed_queries=9)
    text = path.read_text()
    assert plotted(text) == []
    assert trailer_number(text, "Total count") == trailer_number(text, "Mean") == trailer_number(text, "Max") == 0
    assert "#[Failed queries, over every bound: 9]" in text
