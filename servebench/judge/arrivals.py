"""Tests whether the arrivals are what they claim to be: the planned ones by themselves, the issued ones against the plan.

A load generator whose "Poisson" traffic is not Poisson measures another queue. Known ways to
get there: worker processes that share one seed (gaps repeat), gaps scaled to fill each
second (no bursts survive), sleeps that drift. So for a Poisson plan, at the target rate:

- Kolmogorov-Smirnov distance of the gaps to the exponential distribution: the shape and the
  rate of the gaps;
- serial correlation of the gaps, taken of exp(-gap / mean), which is uniform and so has a
  well-behaved sum: the independence of neighbours;
- index of dispersion of counts (variance / mean over equal windows, 1 for Poisson), at
  scales of about 10 arrivals, of one second and of a thirtieth of the run: the independence
  at a distance. (windows - 1) * index is chi-squared with windows - 1 degrees of freedom.

Each p-value must fall below `P_VALUE` to count, so that a true Poisson plan practically
never does. The squared coefficient of variation of the gaps (CV2, 1 for Poisson, 0 for
constant) is reported, not tested: its distribution is too skewed for such p-values.

A constant plan is tested for equal gaps. What was issued is compared with what was planned
by the two-sample Kolmogorov-Smirnov distance, both scaled to their own length: a client that
is slow throughout is the achieved rate's matter, one that bunches its queries is this one's.

A run of ten million queries has columns of 80 MB, so nothing here makes more than one of that
size beside its arguments: what can be is done a chunk at a time, what is over is overwritten.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
from scipy.special import chdtr, chdtrc, kolmogorov, ndtr

Int64s = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Found = tuple[dict[str, Any], list[str]]  # some fields of `ArrivalChecks`, and the problems among them

P_VALUE = 1e-6  #: a test fails below this
MIN_GAPS = 100  #: fewer gaps are not tested: the tests' limit distributions do not hold yet
MIN_WINDOWS = 10
MIN_ARRIVALS_PER_WINDOW = 10.0
#: A constant plan's offsets are rounded to whole ns, so two gaps may differ by this much.
CONSTANT_TOLERANCE_NS = 2
#: Gaps tested against the exponential; more are thinned evenly, which leaves their distribution alone.
_MAX_KS_GAPS = 1_000_000
_CHUNK = 1 << 18


@dataclass(frozen=True, slots=True)
class Dispersion:
    """Index of dispersion of the counts in ``windows`` windows of ``window_s`` seconds."""

    window_s: float
    windows: int
    index: float
    p_value: float


@dataclass(frozen=True, slots=True)
class ArrivalChecks:
    """What the tests found. None where a test does not apply or had too little to go by."""

    result: Literal["ok", "wrong", "too_few"]  #: ``too_few``: nothing was wrong, but there were too few gaps to tell
    gaps: int
    cv2: float | None = None
    ks_distance: float | None = None
    ks_p_value: float | None = None
    serial_correlation: float | None = None
    serial_p_value: float | None = None
    dispersion: tuple[Dispersion, ...] = ()
    issued_cv2: float | None = None
    issued_ks_distance: float | None = None
    issued_ks_p_value: float | None = None
    problems: tuple[str, ...] = ()  #: what is wrong with the plan, one sentence each
    issue_problems: tuple[str, ...] = ()  #: what is wrong with how it was issued

    def as_dict(self) -> dict[str, Any]:
        """The ``schedule.checks`` of ``run.json``, JSON-able."""
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def check_arrivals(scheduled_ns: Int64s, issued_ns: Int64s, *, arrivals: str, target_qps: float | None) -> ArrivalChecks:
    """`check_plan`, then `check_issue` of copies: both arrays stay as they are."""
    checks = check_plan(scheduled_ns, arrivals=arrivals, target_qps=target_qps)
    return check_issue(checks, scheduled_ns, issued_ns.copy())


def check_plan(scheduled_ns: Int64s, *, arrivals: str, target_qps: float | None) -> ArrivalChecks:
    """Test a plan that claims to be ``mlperf``, ``poisson`` or ``constant``.

    ``scheduled_ns`` is in query order, ns from t=0. ``target_qps`` of None tests against the
    plan's own mean rate.
    """
    gaps_ns = np.diff(scheduled_ns)
    if len(gaps_ns) and int(gaps_ns.min()) < 0:
        return ArrivalChecks("wrong", len(gaps_ns), problems=("the planned arrivals are not in time order",))
    if len(gaps_ns) < MIN_GAPS or not scheduled_ns[-1] > scheduled_ns[0]:
        return ArrivalChecks("too_few", len(gaps_ns))
    mean_gap_ns = 1e9 / target_qps if target_qps else float(gaps_ns.mean())
    if arrivals == "constant":
        planned, problems = _constant_checks(gaps_ns, mean_gap_ns)
    else:
        planned, problems = _poisson_checks(scheduled_ns, gaps_ns, mean_gap_ns)
    del gaps_ns  # which the tests may have overwritten
    result: Literal["ok", "wrong"] = "wrong" if problems else "ok"
    return ArrivalChecks(result, len(scheduled_ns) - 1, cv2=_cv2(np.diff(scheduled_ns)), **planned, problems=tuple(problems))


def check_issue(checks: ArrivalChecks, scheduled_ns: Int64s, issued_ns: Int64s) -> ArrivalChecks:
    """The checks of a plan, with those of how it was issued; unchanged where the plan itself could not be tested.

    ``issued_ns`` is -1 for what was not issued. It is taken over: sorted in place.
    """
    if checks.cv2 is None:
        return checks
    sent = issued_ns >= 0
    if not sent.all():
        scheduled_ns, issued_ns = scheduled_ns[sent], issued_ns[sent]
    issued_ns.sort()
    if len(issued_ns) <= MIN_GAPS or scheduled_ns[-1] == scheduled_ns[0] or issued_ns[-1] == issued_ns[0]:
        return checks
    distance = shape_distance(scheduled_ns, issued_ns)
    del scheduled_ns
    p_value = float(kolmogorov(math.sqrt(len(issued_ns) / 2) * distance))
    problems: tuple[str, ...] = ()
    if p_value < P_VALUE:
        problems = (f"queries were not issued as planned (KS distance {distance:.3g} of their times, p = {p_value:.1g})",)
    return replace(
        checks,
        result="wrong" if problems else checks.result,
        issued_cv2=_cv2(np.diff(issued_ns)),
        issued_ks_distance=distance,
        issued_ks_p_value=p_value,
        issue_problems=problems,
    )


def _constant_checks(gaps_ns: Int64s, mean_gap_ns: float) -> Found:
    off_ns = max(float(np.abs(gaps_ns[stretch] - mean_gap_ns).max()) for stretch in _chunks(len(gaps_ns)))
    return {}, [f"gaps that should be equal are up to {off_ns:.0f} ns off"] if off_ns > CONSTANT_TOLERANCE_NS else []


def _poisson_checks(scheduled_ns: Int64s, gaps_ns: Int64s, mean_gap_ns: float) -> Found:
    problems = []
    ks_distance, ks_p = exponential_ks(gaps_ns, mean_gap_ns)
    if ks_p < P_VALUE:
        problems.append(f"the gaps are not exponential at the target rate (KS distance {ks_distance:.3g}, p = {ks_p:.1g})")
    correlation, serial_p = serial_correlation(gaps_ns)
    if serial_p is not None and serial_p < P_VALUE:
        problems.append(f"neighbouring gaps are correlated ({correlation:.3g}, p = {serial_p:.1g})")
    dispersion = tuple(index_of_dispersion(scheduled_ns, window_ns) for window_ns in _window_scales_ns(scheduled_ns))
    problems += [
        f"counts in windows of {scale.window_s:.3g} s vary {'more' if scale.index > 1 else 'less'} than Poisson's "
        f"(index of dispersion {scale.index:.3g}, p = {scale.p_value:.1g})"
        for scale in dispersion
        if scale.p_value < P_VALUE
    ]
    return {
        "ks_distance": ks_distance,
        "ks_p_value": ks_p,
        "serial_correlation": correlation,
        "serial_p_value": serial_p,
        "dispersion": dispersion,
    }, problems


def exponential_ks(gaps_ns: Int64s, mean_gap_ns: float) -> tuple[float, float]:
    """Kolmogorov-Smirnov distance of gaps to the exponential distribution of that mean, and its p-value.

    Gaps are whole ns, which moves the distribution function by up to 1 ns / mean: that much
    of the distance is forgiven. The limit distribution overstates the p-value of small
    samples in the far tail, which is the safe side.
    """
    sample = np.sort(gaps_ns[:: -(-len(gaps_ns) // _MAX_KS_GAPS)])
    count = len(sample)
    expected: Floats = -np.expm1(sample / -mean_gap_ns)
    ranks = np.arange(count + 1) / count
    distance = float(max((ranks[1:] - expected).max(), (expected - ranks[:-1]).max()))
    unexplained = max(distance - 1 / mean_gap_ns, 0.0)
    return distance, float(kolmogorov(math.sqrt(count) * unexplained))


def serial_correlation(gaps_ns: Int64s) -> tuple[float | None, float | None]:
    """Correlation of each gap's exp(-gap / mean) with the next one's, and its two-sided p-value; None when all are equal.

    The gaps are overwritten.
    """
    mean_ns = gaps_ns.mean()
    level = _overwrite(gaps_ns, lambda stretch_ns: np.exp(stretch_ns / -mean_ns))
    level -= level.mean()
    square = float(level @ level)
    if square == 0:
        return None, None
    correlation = float(level[:-1] @ level[1:]) / square
    return correlation, float(2 * ndtr(-abs(correlation) * math.sqrt(len(level))))


def index_of_dispersion(scheduled_ns: Int64s, window_ns: int) -> Dispersion:
    """Variance / mean of the counts in the whole windows of an ascending plan, and its two-sided p-value under Poisson."""
    windows = int(scheduled_ns[-1]) // window_ns
    counts = np.diff(np.searchsorted(scheduled_ns, np.arange(windows + 1) * window_ns))
    index = float(counts.var(ddof=1) / counts.mean())
    freedom = windows - 1
    p_value = min(1.0, 2 * float(min(chdtr(freedom, freedom * index), chdtrc(freedom, freedom * index))))
    return Dispersion(window_ns / 1e9, windows, index, p_value)


def shape_distance(planned_ns: Int64s, issued_ns: Int64s) -> float:
    """Two-sample Kolmogorov-Smirnov distance of equally many ascending times, both scaled from 0 to 1 of their own length."""
    count, furthest = len(planned_ns), 0
    for stretch in _chunks(count):
        issued = _from_0_to_1(issued_ns, stretch)
        # The part of the plan that these can lie in, found by the same arithmetic.
        first = bisect_left(range(count), issued[0], key=lambda row: _from_0_to_1(planned_ns, row))
        end = bisect_right(range(count), issued[-1], key=lambda row: _from_0_to_1(planned_ns, row))
        planned = _from_0_to_1(planned_ns, slice(first, end))
        before = np.arange(stretch.start, stretch.start + len(issued))
        behind = first + np.searchsorted(planned, issued, side="left") - before  # just before each is issued
        ahead = before + 1 - first - np.searchsorted(planned, issued, side="right")  # just after
        furthest = max(furthest, int(behind.max()), int(ahead.max()))
    return furthest / count


def _from_0_to_1(times_ns: Int64s, rows: Any) -> Any:
    """Some of ascending times, scaled to the length of all."""
    return (times_ns[rows] - times_ns[0]) / (times_ns[-1] - times_ns[0])


def _window_scales_ns(scheduled_ns: Int64s) -> list[int]:
    """About 10 arrivals, one second, and a thirtieth of the run: those of them with enough windows and arrivals."""
    duration_ns = int(scheduled_ns[-1])
    shortest_ns = math.ceil(MIN_ARRIVALS_PER_WINDOW * duration_ns / len(scheduled_ns))
    scales_ns = {shortest_ns, 1_000_000_000, duration_ns // 30}
    return sorted(scale_ns for scale_ns in scales_ns if shortest_ns <= scale_ns <= duration_ns / MIN_WINDOWS)


def _cv2(gaps_ns: Int64s) -> float | None:
    """Variance / mean^2, None for a mean of 0. The gaps are overwritten."""
    mean_ns = float(gaps_ns.mean())
    if not mean_ns:
        return None
    return float(_overwrite(gaps_ns, lambda stretch_ns: np.square(stretch_ns - mean_ns)).mean()) / mean_ns**2


def _overwrite(values: Int64s, change: Callable[[Int64s], Floats]) -> Floats:
    """What ``change`` makes of whole numbers, a stretch at a time, in the memory where they were."""
    changed: Floats = values.view(np.float64)
    for stretch in _chunks(len(values)):
        changed[stretch] = change(values[stretch])
    return changed


def _chunks(count: int) -> Iterator[slice]:
    return (slice(start, start + _CHUNK) for start in range(0, count, _CHUNK))
