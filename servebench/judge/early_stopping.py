"""MLPerf's early-stopping test: were there enough queries to claim a percentile with confidence?

A latency bound is to hold for a share ``quantile`` of all queries. Of n queries measured, t
were over the bound and h = n - t were not. If the true share over it were just too large
(1 - quantile), then seeing as few as t would have had the probability

    odds(h, t) = P[Binomial(h + t, 1 - quantile) <= t] = I_quantile(h, t + 1)

with I the regularised incomplete beta function. The claim is accepted when odds < 1 - 0.99,
strictly. This is LoadGen's rule (mlcommons/inference, loadgen/early_stopping.cc, whose
tolerance d is 0 in every scenario); it was written for independent queries, so a run near
saturation, whose latencies are correlated, is less certain than the number says.

``odds`` falls as h grows at fixed t, and as t falls at fixed n, so both searches below are
exact bisections over integers.
"""

from __future__ import annotations

import math

from scipy.special import betainc

CONFIDENCE = 0.99
_RISK = 0.01  # 1 - CONFIDENCE, as the double nearest to it


def odds(under_latency: int, over_latency: int, quantile: float) -> float:
    """P[Binomial(h + t, 1 - quantile) <= t] for h queries within the bound and t over it."""
    if under_latency == 0:
        return 1.0
    return float(betainc(under_latency, over_latency + 1, quantile))


def is_enough(queries: int, over_latency: int, quantile: float) -> bool:
    """Whether ``queries``, ``over_latency`` of them over the bound, show that ``quantile`` of all are within it."""
    return odds(queries - over_latency, over_latency, quantile) < _RISK


def min_under_latency(over_latency: int, quantile: float) -> int:
    """LoadGen's h_min(t): the smallest h with odds(h, t) < 0.01. ``quantile`` is within 0-1, both exclusive."""
    if not 0 < quantile < 1:
        raise ValueError(f"quantile {quantile} is not between 0 and 1 (exclusive)")
    low, high = 0, math.ceil((over_latency + 1) * quantile / (1 - quantile)) + 1
    while odds(high, over_latency, quantile) >= _RISK:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        if odds(middle, over_latency, quantile) < _RISK:
            high = middle
        else:
            low = middle
    return high


def min_queries(over_latency: int, quantile: float) -> int:
    """n_min(t) = h_min(t) + t: how many queries it takes when t of them are over the bound (459 for none at 0.99)."""
    return min_under_latency(over_latency, quantile) + over_latency


def max_over_latency(queries: int, quantile: float) -> int | None:
    """The largest t that ``queries`` can bear, None when they are too few for even t = 0."""
    if not is_enough(queries, 0, quantile):
        return None
    low, high = 0, queries
    while high - low > 1:
        middle = (low + high) // 2
        if is_enough(queries, middle, quantile):
            low = middle
        else:
            high = middle
    return low


def estimate_index(queries: int, quantile: float) -> int | None:
    """Where LoadGen's early-stopping *estimate* of the percentile is among ascending latencies.

    It is ``sorted[n - t]`` with the largest t >= 1 that n can bear: a value that the true
    percentile does not exceed with 99 % confidence. None below the floor n_min(1) (64
    queries at 0.90, 662 at 0.99).
    """
    over_latency = max_over_latency(queries, quantile)
    return queries - over_latency if over_latency else None
