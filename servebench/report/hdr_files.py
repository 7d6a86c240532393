"""HdrHistogram's two text files: the interval log (``.hlog``) and the percentile table (``.hgrm``).

Formats are those of the Java original (log format 1.3, ``outputPercentileDistribution``),
so its HistogramLogProcessor and plotFiles.html open them. The Python
library's own writers are not used: they floor the interval maximum, know no tags, space the
percentile levels unevenly and print an unscaled deviation.

Histograms hold the latencies of OK queries only. A failed query has no latency but counts
as over every bound, so both files state the number of failures in a comment.
"""

from __future__ import annotations

import heapq
import itertools
import math
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import numpy.typing as npt

from servebench.record.files import replacing
from servebench.record.histogram import (
    BUCKETS,
    LOWEST_EQUIVALENT_NS,
    SIGNIFICANT_DIGITS,
    SLOT_WIDTH_NS,
    SUB_BUCKETS,
    Histogram,
)

Int64s = npt.NDArray[np.int64]

_TICKS_PER_HALF_DISTANCE = 5
_NS_PER_MS = 1e6
_NS_PER_S = 1e9


@dataclass(frozen=True, slots=True)
class Interval:
    """The latencies of the queries that were due within ``[start_s, start_s + length_s)`` of the run."""

    start_s: float
    length_s: float
    histogram: Histogram


def interval_histograms(scheduled_ns: Int64s, values_ns: Int64s, *, interval_ns: int = 1_000_000_000) -> Iterator[Interval]:
    """`split_by_interval` of whole arrays, in any order."""
    order = np.argsort(scheduled_ns, kind="stable") if scheduled_ns.shape == values_ns.shape else slice(None)
    return split_by_interval([(scheduled_ns[order], values_ns[order])], interval_ns=interval_ns)


def split_by_interval(chunks: Iterable[tuple[Int64s, Int64s]], *, interval_ns: int = 1_000_000_000) -> Iterator[Interval]:
    """Split latencies by the second in which each query was *due*, from 0 to the last one, empty seconds included.

    A chunk is the due times of some queries, offsets from the run's t=0 in ascending order
    from chunk to chunk, and their values. The due time, not the completion, places a query:
    it is where its response time starts, so the queries that a stall held up stand where the
    stall began instead of piling up at its end, and every series of a run has the same
    counts. One histogram and one chunk exist at a time, so a long run costs no memory.
    `ValueError` for due times out of order, negative, or not as many as values.
    """
    histogram, number, last_ns = Histogram(), 0, None
    for scheduled_ns, values_ns in chunks:
        if scheduled_ns.shape != values_ns.shape:
            raise ValueError(f"{scheduled_ns.size} scheduled times but {values_ns.size} values")
        if scheduled_ns.size == 0:
            continue
        if scheduled_ns.min() < 0:
            raise ValueError("scheduled times are offsets from the run's start and not negative")
        if scheduled_ns[0] < (last_ns or 0) or np.diff(scheduled_ns).min(initial=0) < 0:
            raise ValueError("scheduled times are not in ascending order")
        last_ns = int(scheduled_ns[-1])
        numbers = scheduled_ns // interval_ns
        start = 0
        for following in range(number + 1, last_ns // interval_ns + 1):
            end = int(np.searchsorted(numbers, following))
            histogram.record(values_ns[start:end])
            yield _interval(following - 1, interval_ns, histogram)
            histogram, number, start = Histogram(), following, end
        histogram.record(values_ns[start:])
    if last_ns is not None:
        yield _interval(number, interval_ns, histogram)


def _interval(number: int, interval_ns: int, histogram: Histogram) -> Interval:
    return Interval(number * interval_ns / _NS_PER_S, interval_ns / _NS_PER_S, histogram)


def write_hlog(
    path: Path, series: Mapping[str, Iterable[Interval]], *, start_realtime_s: float, failed_queries: int = 0
) -> None:
    """Write an interval log, in time order, atomically.

    ``series`` maps a tag to its intervals, each in time order; the tag ``""`` is the
    untagged series, which tools show by default. ``start_realtime_s`` is the run's t=0 in
    seconds since the epoch. Values are in ns, Interval_Max in ms.
    """
    for tag in series:
        if re.search(r"[,\s]", tag):
            raise ValueError(f"tag {tag!r} has a comma or white space, which the log format does not allow")
    started = datetime.fromtimestamp(start_realtime_s, UTC).isoformat(sep=" ", timespec="milliseconds")
    rows = heapq.merge(*(_tagged(tag, intervals) for tag, intervals in series.items()), key=lambda row: row[1].start_s)
    with replacing(path) as file:
        file.write("#[Histogram log format version 1.3]\n")
        file.write(f"#[StartTime: {start_realtime_s:.3f} (seconds since epoch), {started}]\n")
        # Says that the stamps below are offsets; readers otherwise guess from their size.
        file.write(f"#[BaseTime: {start_realtime_s:.3f} (seconds since epoch)]\n")
        file.write("#[An interval holds the queries that were due in it. Values: ns, Interval_Max: ms]\n")
        file.write(_failed_comment(failed_queries))
        file.write('"StartTimestamp","Interval_Length","Interval_Max","Interval_Compressed_Histogram"\n')
        for tag, interval in rows:
            prefix = f"Tag={tag}," if tag else ""
            max_ms = (interval.histogram.max_ns or 0) / _NS_PER_MS
            blob = interval.histogram.encode().decode("ascii")
            file.write(f"{prefix}{interval.start_s:.3f},{interval.length_s:.3f},{max_ms:.3f},{blob}\n")


def write_hgrm(path: Path, histogram: Histogram, *, failed_queries: int = 0) -> None:
    """Write the percentile distribution in ms, atomically.

    The numbers are what any HdrHistogram tool computes from the same slots: values are the
    highest equivalent ones, mean and deviation are of the slots' middles.
    """
    digits = SIGNIFICANT_DIGITS
    slots = np.flatnonzero(histogram.counts)
    counts = histogram.counts[slots]
    highest_ms = (LOWEST_EQUIVALENT_NS[slots] + SLOT_WIDTH_NS[slots] - 1) / _NS_PER_MS
    middle_ms = (LOWEST_EQUIVALENT_NS[slots] + SLOT_WIDTH_NS[slots] // 2) / _NS_PER_MS
    mean_ms = float(np.average(middle_ms, weights=counts)) if slots.size else 0.0
    deviation_ms = math.sqrt(np.average((middle_ms - mean_ms) ** 2, weights=counts)) if slots.size else 0.0
    max_ms = highest_ms[-1] if slots.size else 0.0
    with replacing(path) as file:
        file.write(f"{'Value':>12} {'Percentile':>14} {'TotalCount':>10} {'1/(1-Percentile)':>14}\n\n")
        for slot, total, level in _percentile_rows(counts):
            inverse = f" {1 / (1 - level):14.2f}" if level < 1 else ""
            file.write(f"{highest_ms[slot]:12.{digits}f} {level:.12f} {total:10d}{inverse}\n")
        file.write(f"#[Mean    = {mean_ms:12.{digits}f}, StdDeviation   = {deviation_ms:12.{digits}f}]\n")
        file.write(f"#[Max     = {max_ms:12.{digits}f}, Total count    = {histogram.count:12d}]\n")
        file.write(f"#[Buckets = {BUCKETS:12d}, SubBuckets     = {SUB_BUCKETS:12d}]\n")
        file.write("#[Value: ms]\n")
        file.write(_failed_comment(failed_queries))


def _percentile_rows(counts: npt.NDArray[np.int64]) -> Iterator[tuple[int, int, float]]:
    """(slot, cumulative count, level 0-1) of each line: five levels on each halving of the distance to 1, then 1 itself.

    Level j of halving k is 1 - (10 - j) / (10 * 2**k). Levels within the last slot stop
    after the first, as in HdrHistogram, so a file is as long as its data is deep.
    """
    if not counts.size:
        return
    totals = np.cumsum(counts)
    count, last = int(totals[-1]), len(counts) - 1
    for halving in itertools.count():
        for tick in range(_TICKS_PER_HALF_DISTANCE):
            above, scale = 2 * _TICKS_PER_HALF_DISTANCE - tick, (2 * _TICKS_PER_HALF_DISTANCE) << halving
            # In integers, so that a level which a count meets exactly is met.
            rank = count - count * above // scale
            slot = int(np.searchsorted(totals, rank))
            yield slot, int(totals[slot]), 1 - above / scale
            if slot == last:
                yield last, count, 1.0
                return


def _tagged(tag: str, intervals: Iterable[Interval]) -> Iterator[tuple[str, Interval]]:
    return ((tag, interval) for interval in intervals)


def _failed_comment(failed_queries: int) -> str:
    return f"#[Failed queries, over every bound: {failed_queries}]\n"
