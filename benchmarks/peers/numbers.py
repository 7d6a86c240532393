"""Percentiles of what peers leave behind when they do not compute them: single times, or counts of times."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

PERCENTILES = (50.0, 99.0, 99.9)


def of_times(times_ns: npt.ArrayLike) -> dict[float, int] | None:
    """Percentile -> ns of single times, nearest rank (the smallest time that at least so many are not above); None for none."""
    values, counts = np.unique(np.asarray(times_ns, dtype=np.int64), return_counts=True)
    return of_counts(dict(zip(values.tolist(), counts.tolist(), strict=True)))


def of_counts(counts: Mapping[int, int]) -> dict[float, int] | None:
    """Percentile -> ns of a histogram that maps times in ns to how often they occurred, nearest rank; None for an empty one."""
    if not counts:
        return None
    times = sorted(counts)
    cumulated = np.cumsum([counts[time_ns] for time_ns in times])
    # The rounding keeps 99.9 % of 1000 at rank 999: the product is a hair above (numpy's own percentile takes rank 1000).
    ranks = {p: int(np.ceil(round(p / 100 * int(cumulated[-1]), 6))) for p in PERCENTILES}
    return {p: times[int(np.searchsorted(cumulated, rank))] for p, rank in ranks.items()}
