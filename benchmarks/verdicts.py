"""What a contest comes to: sentences on floors and targets, the JSON document, the picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.contest import OURS, Contest, Goal, table
from benchmarks.plots import Chart, Series, draw
from benchmarks.report import Spread, rate_text, ratio_text
from benchmarks.steps import MAX_DELAY_P99_NS
from servebench.report.console import format_duration


def floor_line(contest: Contest, floor_qps: int) -> str:
    """Whether a clean rate is reached, in a sentence."""
    wanted = f"{floor_qps:,} Poisson queries/s on one core with p99 issue delay <= {format_duration(MAX_DELAY_P99_NS)}"
    clean = contest.clean_qps
    if clean is None or clean.median == 0:
        return f"Floor NOT met: no rate was clean; required are {wanted}."
    met = "met" if clean.median >= floor_qps else "NOT met"
    return f"Floor {met}: highest clean rate {rate_text(clean)}/s; required are {wanted}."


def goal_lines(contest: Contest, goals: Sequence[Goal], what: str) -> list[str]:
    """Whether goals are reached, a sentence each; ``what`` is Floor or Target."""
    lines = []
    for goal in goals:
        ratio = contest.ratio(goal.ours, goal.peer)
        wanted = f"wanted are {goal.least:g} times"
        if ratio is None:
            lines.append(f"{what} not measured: {goal.peer} did not run; {wanted}.")
        else:
            met = "met" if ratio.median >= goal.least else "NOT met"
            lines.append(
                f"{what} {met}: our {goal.ours} rate is {ratio_text(ratio)} times {goal.peer}'s saturated one; {wanted}."
            )
    return lines


def announce(contest: Contest, *, targets: Sequence[Goal], floors: Sequence[Goal], floor_qps: int) -> None:
    """Print the table and a sentence on each target and floor."""
    sentences = [*goal_lines(contest, targets, "Target"), *goal_lines(contest, floors, "Floor")]
    print("\n".join(["", table(contest), "", *sentences, floor_line(contest, floor_qps)]))


def result_document(contest: Contest, server: str, *, quick: bool, floor_qps: int, floors: Sequence[Goal]) -> dict[str, Any]:
    """The contest as JSON. ``highest_clean_qps`` is the median over the rounds."""
    clean = contest.clean_qps
    return {
        "quick": quick,
        "server": server,
        "floor_qps": floor_qps,
        "floors": [asdict(goal) for goal in floors],
        "highest_clean_qps": clean.median if clean else None,
        "contestants": {
            name: {
                "saturated_qps": _spread(list(figures.saturated_qps.values())),
                "open_qps": _spread(list(figures.open_qps.values())),
                "our_clean_ratio": _ratio(contest.ratio("clean", name)),
                "our_saturated_ratio": _ratio(contest.ratio("saturated", name)),
                "errors": figures.errors,
                "commands": sorted(set(figures.commands)),
            }
            for name, figures in contest.figures.items()
        },
        "steps": [asdict(step) | {"problems": step.problems} for step in contest.steps],
    }


def draw_contest(contest: Contest, title: str, server: str, path: Path, say: Callable[[str], None]) -> None:
    """A picture of the contest: two bars a contestant."""
    names = list(contest.figures)
    spreads = {
        "saturated": [Spread.of(list(contest.figures[name].saturated_qps.values())) for name in names],
        f"open loop ({OURS}: clean)": [Spread.of(list(contest.figures[name].open_qps.values())) for name in names],
    }
    series = [
        Series(
            label,
            [None if spread is None else spread.median for spread in row],
            [None if spread is None else spread.lowest for spread in row],
            [None if spread is None else spread.highest for spread in row],
        )
        for label, row in spreads.items()
    ]
    draw([Chart(title, "queries/s", names, series, note=f"server: {server} on another core")], path, say)


def _spread(values: list[float]) -> dict[str, Any] | None:
    spread = Spread.of(values)
    return asdict(spread) | {"rounds": values} if spread else None


def _ratio(spread: Spread | None) -> dict[str, float] | None:
    return asdict(spread) if spread else None
