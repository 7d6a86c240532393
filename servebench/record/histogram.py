"""HDR histograms of latencies, recorded a whole array at a time.

Layout and definitions are HdrHistogram's (https://hdrhistogram.org, G. Tene): exponential
buckets of `SUB_BUCKETS` linear slots each, so that every value keeps `SIGNIFICANT_DIGITS`
digits. The counts are numpy's, because the Python library's own ``record_value`` and mean
walk them one slot at a time; the library is used to serialise (`Histogram.encode`).
"""

from __future__ import annotations

import math

import numpy as np
import numpy.typing as npt
from hdrh.histogram import HdrHistogram

Int64s = npt.NDArray[np.int64]

LOWEST_DISCERNIBLE_NS = 1_000  #: 1 us
HIGHEST_TRACKABLE_NS = 3_600_000_000_000  #: 1 h
SIGNIFICANT_DIGITS = 3

_UNIT_MAGNITUDE = LOWEST_DISCERNIBLE_NS.bit_length() - 1  # slots of the first bucket are 2**9 ns wide
_SUB_BUCKET_BITS = math.ceil(math.log2(2 * 10**SIGNIFICANT_DIGITS))
_FIRST_BUCKET_BITS = _UNIT_MAGNITUDE + _SUB_BUCKET_BITS  # values of fewer bits share the first bucket
SUB_BUCKETS = 1 << _SUB_BUCKET_BITS
BUCKETS = max(1, HIGHEST_TRACKABLE_NS.bit_length() - _FIRST_BUCKET_BITS + 1)
COUNTS_LENGTH = (BUCKETS + 1) * (SUB_BUCKETS // 2)


def count_index(values_ns: Int64s) -> Int64s:
    """HDR counts-array index of each value, all within 0..`HIGHEST_TRACKABLE_NS`."""
    # frexp's exponent is the bit length, exactly: every value is far below 2**53.
    bits = np.frexp(values_ns.astype(np.float64))[1].astype(np.int64)
    bucket = np.maximum(bits - _FIRST_BUCKET_BITS, 0)
    # Only the upper half of a later bucket is used, so each advances the index by half a bucket.
    return (bucket << (_SUB_BUCKET_BITS - 1)) + (values_ns >> (bucket + _UNIT_MAGNITUDE))


def _slot_bounds_ns() -> tuple[Int64s, Int64s]:
    half = SUB_BUCKETS // 2
    index = np.arange(COUNTS_LENGTH, dtype=np.int64)
    bucket = np.maximum(index // half - 1, 0)
    width = np.int64(1) << (bucket + _UNIT_MAGNITUDE)
    lowest = (index - bucket * half) * width
    return lowest, width


#: The smallest value of each slot, and how many ns wide it is.
LOWEST_EQUIVALENT_NS, SLOT_WIDTH_NS = _slot_bounds_ns()


class Histogram:
    """Counts of latencies from 1 us to 1 h with 3 significant digits (slots up to 0.1 % wide).

    Values are integer ns. ``counts`` is the HDR counts array (``int64[COUNTS_LENGTH]``).
    Nothing is dropped: a negative value counts as 0, and one over `HIGHEST_TRACKABLE_NS` is
    counted in ``overflow`` as well as in that bound's slot. ``min_ns``, ``max_ns`` (None
    while empty) and ``sum_ns`` are those of the values themselves, not of their slots.
    """

    __slots__ = ("count", "counts", "max_ns", "min_ns", "overflow", "sum_ns")

    def __init__(self) -> None:
        self.counts: Int64s = np.zeros(COUNTS_LENGTH, dtype=np.int64)
        self.count = 0
        self.overflow = 0
        self.min_ns: int | None = None
        self.max_ns: int | None = None
        self.sum_ns = 0

    def record(self, values_ns: Int64s) -> None:
        """Add each value of an ``int64`` array. `TypeError` for another dtype: floats would be cut silently."""
        if values_ns.dtype != np.int64:
            raise TypeError(f"latencies are int64 nanoseconds, not {values_ns.dtype}")
        if values_ns.size == 0:
            return
        values_ns = np.maximum(values_ns, 0)
        in_range = np.minimum(values_ns, HIGHEST_TRACKABLE_NS)
        self.counts += np.bincount(count_index(in_range), minlength=COUNTS_LENGTH)
        self.count += values_ns.size
        self.overflow += int(np.count_nonzero(values_ns > HIGHEST_TRACKABLE_NS))
        self._widen(int(values_ns.min()), int(values_ns.max()))
        # Two halves, because a plain int64 sum of hours wraps after a few million values.
        self.sum_ns += (int((values_ns >> 32).sum()) << 32) + int((values_ns & 0xFFFF_FFFF).sum())

    def merge(self, other: Histogram) -> None:
        """Add another histogram's values; exactly as if they had been recorded here."""
        if other.min_ns is None or other.max_ns is None:
            return
        self.counts += other.counts
        self.count += other.count
        self.overflow += other.overflow
        self._widen(other.min_ns, other.max_ns)
        self.sum_ns += other.sum_ns

    @property
    def mean_ns(self) -> float | None:
        """Arithmetic mean of the values themselves; None while empty."""
        return self.sum_ns / self.count if self.count else None

    def percentile(self, percentile: float) -> int | None:
        """The highest value equivalent to the nearest-rank percentile (0-100), in ns; None while empty.

        As HdrHistogram's Java original: the rank is rounded up, after the percentile is
        lowered by one ulp, so that ``0.55 * 100`` (55.00000000000001) of 100 values is the
        55th and not the 56th.
        """
        if not 0 <= percentile <= 100:
            raise ValueError(f"percentile {percentile} is not between 0 and 100")
        if not self.count:
            return None
        rank = max(1, math.ceil(math.nextafter(percentile, -math.inf) * self.count / 100))
        index = int(np.searchsorted(np.cumsum(self.counts), rank))
        if percentile == 0:
            return int(LOWEST_EQUIVALENT_NS[index])
        return int(LOWEST_EQUIVALENT_NS[index] + SLOT_WIDTH_NS[index] - 1)

    def to_hdrh(self) -> HdrHistogram:
        """The same counts as the ``hdrhistogram`` library's object."""
        hdrh = HdrHistogram(LOWEST_DISCERNIBLE_NS, HIGHEST_TRACKABLE_NS, SIGNIFICANT_DIGITS)
        np.frombuffer(hdrh.counts, dtype=np.uint64)[:] = self.counts.astype(np.uint64)
        hdrh.total_count = self.count
        if self.min_ns is not None and self.max_ns is not None:
            hdrh.min_value = min(self.min_ns, HIGHEST_TRACKABLE_NS)
            hdrh.max_value = min(self.max_ns, HIGHEST_TRACKABLE_NS)
        return hdrh

    @classmethod
    def from_hdrh(cls, hdrh: HdrHistogram) -> Histogram:
        """A histogram from the library's; `ValueError` for another range or precision.

        An encoded histogram knows its slots only, so min and max are the bounds of the
        outermost ones, the sum is of their middles, and overflow is lost.
        """
        settings = (hdrh.lowest_trackable_value, hdrh.highest_trackable_value, hdrh.significant_figures, hdrh.word_size)
        if settings != (LOWEST_DISCERNIBLE_NS, HIGHEST_TRACKABLE_NS, SIGNIFICANT_DIGITS, 8):
            raise ValueError("the histogram's range or precision differs from 1 us to 1 h with 3 digits, 64-bit counts")
        histogram = cls()
        histogram.counts[:] = np.frombuffer(hdrh.counts, dtype=np.uint64)
        histogram.count = int(histogram.counts.sum())
        used = np.flatnonzero(histogram.counts)
        if used.size:
            middles = LOWEST_EQUIVALENT_NS[used] + SLOT_WIDTH_NS[used] // 2
            histogram.min_ns = int(LOWEST_EQUIVALENT_NS[used[0]])
            histogram.max_ns = int(LOWEST_EQUIVALENT_NS[used[-1]] + SLOT_WIDTH_NS[used[-1]] - 1)
            histogram.sum_ns = sum(
                int(count) * int(middle) for count, middle in zip(histogram.counts[used], middles, strict=True)
            )
        return histogram

    def encode(self) -> bytes:
        """HdrHistogram's V2 compressed form in base64 (``HISTFAAAA...``), which its other languages read."""
        blob: bytes = self.to_hdrh().encode()
        return blob

    def _widen(self, low_ns: int, high_ns: int) -> None:
        self.min_ns = low_ns if self.min_ns is None else min(self.min_ns, low_ns)
        self.max_ns = high_ns if self.max_ns is None else max(self.max_ns, high_ns)
