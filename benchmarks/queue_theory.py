"""What a single first-come-first-served server of constant service time makes its queries wait: theory, recursion, arithmetic.

`md1_response_ns` is exact for a Poisson stream that has gone on forever. `response_ns` is Lindley's
recursion on given arrivals, with or without a second in which the server was frozen. `Scatter` says how
far the percentiles of one run of finite length lie from theory by luck alone. No clock, no sockets.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import brentq
from scipy.stats import poisson

Int64s = npt.NDArray[np.int64]

_SIMULATED_RUNS = 200
#: What is added to responses is so many quantiles in place of all values: the middles of equal shares.
_ADDED_SHARES = (np.arange(20) + 0.5) / 20


@functools.cache
def md1_queue_lengths(load: float, count: int) -> tuple[float, ...]:
    """P(n queries in the system), n < ``count``, of an M/D/1 queue of ``load`` (0-1, exclusive).

    From the balance of crossings of a level between service starts, p[n+1] P(A = 0) = p[0] P(A > n) +
    sum over i = 1..n of p[i] P(A > n + 1 - i), where A, the arrivals in a service time, is Poisson(load):
    only positive terms, so nothing cancels (H. C. Tijms, A First Course in Stochastic Models, 2003, section 9.2).
    """
    if not 0 < load < 1:
        raise ValueError(f"load must be between 0 and 1, both excluded, not {load}")
    tail = poisson.sf(np.arange(count + 1), load)
    none_arrives = math.exp(-load)
    lengths = [1 - load]
    while len(lengths) < count:
        n = len(lengths) - 1
        crossings = lengths[0] * tail[n] + sum(lengths[i] * tail[n + 1 - i] for i in range(1, n + 1))
        lengths.append(float(crossings) / none_arrives)
    return tuple(lengths[:count])


def md1_wait_cdf(load: float, wait: float) -> float:
    """P(W <= ``wait``) in an M/D/1 queue; ``wait`` in service times, without the service itself.

    G. J. Franx, A simple solution for the M/D/c waiting time distribution, Operations Research Letters 29
    (2001) 221-229, for one server: with (k - 1) <= wait < k and u = load (k - wait), it is the sum over
    j < k of P(at most k - 1 - j queries wait) times the Poisson probability of j arrivals in u.
    """
    if wait < 0:
        return 0.0
    k = math.floor(wait) + 1
    in_system = md1_queue_lengths(load, k + 1)
    at_most_waiting = list(itertools.accumulate(in_system))[1:]  # at most m wait when at most m + 1 are in the system
    arrivals = poisson.pmf(np.arange(k), load * (k - wait))
    return float(sum(at_most_waiting[k - 1 - j] * arrivals[j] for j in range(k)))


def md1_response_ns(percentile: float, *, load: float, service_ns: int, added_ns: Int64s | Sequence[int] = (0,)) -> float:
    """The percentile (0-100) of response time in an M/D/1 queue: waiting, service, and a random one of ``added_ns``."""
    added = np.quantile(np.asarray(added_ns), _ADDED_SHARES)

    def excess(response_ns: float) -> float:
        return float(np.mean([md1_wait_cdf(load, (response_ns - of) / service_ns - 1) for of in added])) - percentile / 100

    high_ns = 2.0 * service_ns + added[-1]
    while excess(high_ns) < 0:
        high_ns *= 2
    return float(brentq(excess, added[0], high_ns, xtol=1.0))


@dataclass(frozen=True, slots=True)
class Freeze:
    """When the server was stopped, ns on the clock of the arrivals."""

    begin_ns: int
    end_ns: int


def relative_to(freeze: Freeze, start_ns: int) -> Freeze:
    """The same freeze on a clock that reads 0 at ``start_ns``."""
    return Freeze(freeze.begin_ns - start_ns, freeze.end_ns - start_ns)


def response_ns(arrivals_ns: Int64s, service_ns: int, freeze: Freeze | None = None) -> Int64s:
    """Response time of each arrival (ascending along the last axis) at a server that starts empty.

    Lindley: W[n] = max(0, W[n-1] + S - gap[n]), written as a running minimum of the same sums. A frozen
    server reads nothing: what arrives meanwhile queues up at the thaw. The stub's queue runs on ideal time, so a
    query that it held already departs at the thaw at the latest.
    """
    reach_ns = arrivals_ns
    if freeze is not None:
        frozen = (arrivals_ns > freeze.begin_ns) & (arrivals_ns < freeze.end_ns)
        reach_ns = np.where(frozen, freeze.end_ns, arrivals_ns)
    drift_ns = np.cumsum(service_ns - np.diff(reach_ns, prepend=reach_ns[..., :1] - service_ns), axis=-1)
    wait_ns = drift_ns - np.minimum.accumulate(drift_ns, axis=-1)
    departure_ns = reach_ns + wait_ns + service_ns
    if freeze is not None:
        held = (departure_ns > freeze.begin_ns) & (departure_ns < freeze.end_ns)
        departure_ns = np.where(held, freeze.end_ns, departure_ns)
    result: Int64s = departure_ns - arrivals_ns
    return result


def percentiles_ns(responses_ns: Int64s, percentiles: Sequence[float]) -> npt.NDArray[np.float64]:
    """LoadGen's percentiles (``sorted[int(n p)]``) along the last axis; the first axis of the result is ``percentiles``."""
    ordered = np.sort(responses_ns, axis=-1)
    count = ordered.shape[-1]
    ranks = [min(int(count * percentile / 100), count - 1) for percentile in percentiles]
    return np.moveaxis(ordered[..., ranks], -1, 0).astype(np.float64)


@dataclass(frozen=True, slots=True)
class Scatter:
    """A percentile over many simulated runs of Poisson arrivals: what one run may honestly report."""

    median_ns: float
    low_ns: float  #: 95 % of the runs are between this
    high_ns: float  #: and this


def simulate_runs(
    percentiles: Sequence[float],
    *,
    rate_qps: float,
    service_ns: int,
    duration_s: float,
    freeze: Freeze | None = None,
    added_ns: Int64s | Sequence[int] = (0,),
    seed: int = 0,
) -> list[Scatter]:
    """What runs of ``duration_s`` from an empty start see, for each percentile, from `_SIMULATED_RUNS` of them.

    ``freeze`` is relative to the run's start. To each response comes a random one of ``added_ns``. Every run has the
    expected number of queries.
    """
    count = max(1, round(rate_qps * duration_s))
    rng = np.random.default_rng(seed)
    gaps_ns = rng.exponential(1e9 / rate_qps, (_SIMULATED_RUNS, count))
    arrivals_ns = np.cumsum(gaps_ns, axis=-1).astype(np.int64)
    responses_ns = response_ns(arrivals_ns, service_ns, freeze) + rng.choice(np.asarray(added_ns), arrivals_ns.shape)
    found_ns = percentiles_ns(responses_ns, percentiles)
    low_ns, median_ns, high_ns = np.quantile(found_ns, (0.025, 0.5, 0.975), axis=-1)
    return [Scatter(*map(float, of)) for of in zip(median_ns, low_ns, high_ns, strict=True)]
