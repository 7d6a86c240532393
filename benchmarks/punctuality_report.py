"""What the punctuality benchmark found: values, tables, a picture, and the targets."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from benchmarks.arrivals_seen import Seen
from benchmarks.plots import Chart, Series
from benchmarks.report import Spread
from benchmarks.turns import text_table
from servebench.report.console import format_duration

TARGET_QPS = 1_000
#: By pacing: the most that the medians over the rounds may be.
TARGETS: dict[str, dict[str, float]] = {
    "precise": {"p50_ns": 20_000, "p99_ns": 200_000},
    "eco": {"p99_ns": 500_000, "cpu_share": 0.15},
}
_WORDS: dict[str, Callable[[float], str]] = {
    "p50_ns": lambda value: f"p50 {format_duration(value)}",
    "p99_ns": lambda value: f"p99 {format_duration(value)}",
    "cpu_share": lambda value: f"{value:.1%} of a core",
}


@dataclass(frozen=True, slots=True)
class Delay:
    """Issue delays (issued - scheduled) of one run."""

    protocol: str
    pacing: str
    rate_qps: float
    queries: int
    not_ok: int
    p50_ns: int
    p99_ns: int
    max_ns: int
    cpu_share: float


@dataclass(frozen=True, slots=True)
class Witnessed:
    """One turn of one contestant before the stub. Distances are those of the stub's stamps, ns; only servebench has them."""

    contestant: str
    asked_qps: float
    seen: Seen
    not_ok: int
    cpu_share: float
    from_schedule_p50_ns: int | None  #: arrival - scheduled
    from_schedule_p99_ns: int | None
    from_issue_p50_ns: int | None  #: arrival - issued: the resolution of the stamps
    from_issue_p99_ns: int | None


def grouped(delays: Sequence[Delay]) -> dict[tuple[str, str, float], list[Delay]]:
    """The rounds of each (protocol, pacing, rate), HTTP and ``precise`` first, rates rising."""
    groups: dict[tuple[str, str, float], list[Delay]] = {}
    for delay in sorted(delays, key=lambda delay: (delay.protocol != "http", delay.pacing != "precise", delay.rate_qps)):
        groups.setdefault((delay.protocol, delay.pacing, delay.rate_qps), []).append(delay)
    return groups


def delay_table(delays: Sequence[Delay]) -> str:
    """A line for each protocol, pacing and rate: medians over the rounds, the range of the p99, the largest delay."""
    lines = [["protocol", "pacing", "rate/s", "queries", "delay p50", "p99", "max", "CPU of a core", "not ok"]]
    for (protocol, pacing, rate_qps), group in grouped(delays).items():
        lines.append(
            [
                protocol,
                pacing,
                f"{rate_qps:,.0f}",
                f"{sum(delay.queries for delay in group):,}",
                format_duration(statistics.median(delay.p50_ns for delay in group)),
                _ranged([delay.p99_ns for delay in group]),
                format_duration(max(delay.max_ns for delay in group)),
                f"{statistics.median(delay.cpu_share for delay in group):.1%}",
                f"{sum(delay.not_ok for delay in group):,}",
            ]
        )
    return text_table(lines)


def _ranged(values_ns: Sequence[int]) -> str:
    median = format_duration(statistics.median(values_ns))
    return f"{median} ({format_duration(min(values_ns))} - {format_duration(max(values_ns))})" if len(values_ns) > 1 else median


def targets(delays: Sequence[Delay], *, slack: float = 1) -> tuple[bool, list[str]]:
    """Whether the medians at `TARGET_QPS` are within ``slack`` times the targets; a sentence for each protocol and pacing."""
    all_met, sentences = True, []
    for (protocol, pacing, rate_qps), group in grouped(delays).items():
        if rate_qps != TARGET_QPS:
            continue
        found = {name: statistics.median(getattr(delay, name) for delay in group) for name in TARGETS[pacing]}
        met = all(value <= TARGETS[pacing][name] for name, value in found.items())
        all_met &= all(value <= slack * TARGETS[pacing][name] for name, value in found.items())
        words = ", ".join(
            f"{_WORDS[name](value)} (at most {_WORDS[name](TARGETS[pacing][name])})" for name, value in found.items()
        )
        sentences.append(f"Target {'met' if met else 'NOT met'}: {protocol}, {pacing}, {rate_qps:,.0f}/s: {words}.")
    return all_met and bool(sentences), sentences


def chart(delays: Sequence[Delay]) -> Chart:
    """The p99 issue delay over the rate, a line for each protocol and pacing."""
    rates_qps = sorted({delay.rate_qps for delay in delays})
    series = []
    for protocol, pacing in dict.fromkeys((protocol, pacing) for protocol, pacing, _ in grouped(delays)):
        spreads = [
            Spread.of([delay.p99_ns / 1e3 for delay in grouped(delays).get((protocol, pacing, rate_qps), [])])
            for rate_qps in rates_qps
        ]
        series.append(
            Series(
                f"{protocol}, {pacing}",
                [spread.median if spread else None for spread in spreads],
                [spread.lowest if spread else None for spread in spreads],
                [spread.highest if spread else None for spread in spreads],
            )
        )
    return Chart(
        "Issue delay of servebench", "p99 issue delay, us", (), series, xs=rates_qps, x_label="queries/s", logarithmic=True
    )


def seen_table(turns: Sequence[Witnessed]) -> str:
    """A line for each rate and contestant, medians over its turns."""
    lines = [
        [
            "rate/s",
            "contestant",
            "turns",
            "arrived/s",
            "CV2",
            "dispersion",
            "KS distance",
            "p50, p99 off schedule",
            "CPU (peers: with start)",
        ]
    ]
    for rate_qps in sorted({turn.asked_qps for turn in turns}):
        for contestant in dict.fromkeys(turn.contestant for turn in turns):
            mine = [turn for turn in turns if (turn.asked_qps, turn.contestant) == (rate_qps, contestant)]
            if not mine:
                continue

            def median(of: Callable[[Seen], float], mine: list[Witnessed] = mine) -> float:
                return statistics.median(of(turn.seen) for turn in mine)

            off = [(turn.from_schedule_p50_ns, turn.from_schedule_p99_ns) for turn in mine]
            known = [(p50_ns, p99_ns) for p50_ns, p99_ns in off if p50_ns is not None and p99_ns is not None]
            lines.append(
                [
                    f"{rate_qps:,.0f}",
                    contestant,
                    str(len(mine)),
                    f"{median(lambda seen: seen.rate_qps):,.1f}",
                    f"{median(lambda seen: seen.cv2):.2f}",
                    f"{median(lambda seen: seen.dispersion):.2f} ± {median(lambda seen: seen.dispersion_error):.2f}",
                    f"{median(lambda seen: seen.ks_distance):.3f} (limit {median(lambda seen: seen.ks_critical):.3f})",
                    ", ".join(format_duration(statistics.median(column)) for column in zip(*known, strict=True)) or "not told",
                    f"{statistics.median(turn.cpu_share for turn in mine):.0%}",
                ]
            )
    return text_table(lines)


def resolution_line(turns: Sequence[Witnessed]) -> str:
    """How exact the stub's stamps are, in a sentence; empty when no run tells."""
    told = [
        (turn.from_issue_p50_ns, turn.from_issue_p99_ns)
        for turn in turns
        if turn.from_issue_p50_ns is not None and turn.from_issue_p99_ns is not None
    ]
    if not told:
        return ""
    p50_ns, p99_ns = (statistics.median(column) for column in zip(*told, strict=True))
    return (
        f"The stub stamped an arrival {format_duration(p50_ns)} (p50), {format_duration(p99_ns)} (p99) after servebench's "
        "write: loopback, wake-up and the stub's own loop are in every distance."
    )


def arrived_line(turn: Witnessed) -> str:
    """What a turn found, for those who watch."""
    seen = turn.seen
    return f"{seen.rate_qps:,.1f}/s arrived, CV2 {seen.cv2:.2f}, dispersion {seen.dispersion:.2f}, KS {seen.ks_distance:.3f}"
