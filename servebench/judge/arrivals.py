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
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
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
    """Test a plan that claims to be ``mlperf``, ``poisson`` or ``constant``, and how it was issued.

    Both arrays are in query order, ns from t=0; ``issued_ns`` is -1 for what was not issued.
    ``target_qps`` of None tests against the plan's own mean rate.
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
    issued, issue_problems = _issued_checks(scheduled_ns, issued_ns)
    return ArrivalChecks(
        "wrong" if problems or issue_problems else "ok",
        len(gaps_ns),
        cv2=_cv2(gaps_ns),
        **planned,
        **issued,
        problems=tuple(problems),
        issue_problems=tuple(issue_problems),
    )


def _constant_checks(gaps_ns: Int64s, mean_gap_ns: float) -> Found:
    off_ns = float(np.abs(gaps_ns - mean_gap_ns).max())
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


def _issued_checks(scheduled_ns: Int64s, issued_ns: Int64s) -> Found:
    sent = issued_ns >= 0
    planned_ns, sent_ns = scheduled_ns[sent], np.sort(issued_ns[sent])
    if len(sent_ns) <= MIN_GAPS or planned_ns[-1] == planned_ns[0] or sent_ns[-1] == sent_ns[0]:
        return {}, []
    distance = shape_distance(planned_ns, sent_ns)
    p_value = float(kolmogorov(math.sqrt(len(sent_ns) / 2) * distance))
    problems = []
    if p_value < P_VALUE:
        problems = [f"queries were not issued as planned (KS distance {distance:.3g} of their times, p = {p_value:.1g})"]
    return {
        "issued_cv2": _cv2(np.diff(sent_ns)),
        "issued_ks_distance": distance,
        "issued_ks_p_value": p_value,
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
    """Correlation of each gap's exp(-gap / mean) with the next one's, and its two-sided p-value; None when all are equal."""
    level: Floats = np.exp(gaps_ns / -gaps_ns.mean())
    level -= level.mean()
    square = float(level @ level)
    if square == 0:
        return None, None
    correlation = float(level[:-1] @ level[1:]) / square
    return correlation, float(2 * ndtr(-abs(correlation) * math.sqrt(len(level))))


def index_of_dispersion(scheduled_ns: Int64s, window_ns: int) -> Dispersion:
    """Variance / mean of the counts in the whole windows of the plan, and its two-sided p-value under Poisson."""
    windows = int(scheduled_ns[-1]) // window_ns
    counts = np.bincount(scheduled_ns[: np.searchsorted(scheduled_ns, windows * window_ns)] // window_ns, minlength=windows)
    index = float(counts.var(ddof=1) / counts.mean())
    freedom = windows - 1
    p_value = min(1.0, 2 * float(min(chdtr(freedom, freedom * index), chdtrc(freedom, freedom * index))))
    return Dispersion(window_ns / 1e9, windows, index, p_value)


def shape_distance(planned_ns: Int64s, issued_ns: Int64s) -> float:
    """Two-sample Kolmogorov-Smirnov distance of equally many ascending times, both scaled from 0 to 1 of their own length."""
    count = len(planned_ns)
    planned: Floats = (planned_ns - planned_ns[0]) / (planned_ns[-1] - planned_ns[0])
    issued: Floats = (issued_ns - issued_ns[0]) / (issued_ns[-1] - issued_ns[0])
    behind = np.searchsorted(planned, issued, side="left") - np.arange(count)  # just before each is issued
    ahead = np.arange(1, count + 1) - np.searchsorted(planned, issued, side="right")  # just after
    return float(max(behind.max(), ahead.max(), 0)) / count


def _window_scales_ns(scheduled_ns: Int64s) -> list[int]:
    """About 10 arrivals, one second, and a thirtieth of the run: those of them with enough windows and arrivals."""
    duration_ns = int(scheduled_ns[-1])
    shortest_ns = math.ceil(MIN_ARRIVALS_PER_WINDOW * duration_ns / len(scheduled_ns))
    scales_ns = {shortest_ns, 1_000_000_000, duration_ns // 30}
    return sorted(scale_ns for scale_ns in scales_ns if shortest_ns <= scale_ns <= duration_ns / MIN_WINDOWS)


def _cv2(gaps_ns: Int64s) -> float | None:
    mean = float(gaps_ns.mean())
    return float(gaps_ns.var()) / mean**2 if mean else None
