"""What the turns of the truth benchmark come to: rows with medians and ranges, a table, a picture, and the target."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from benchmarks.contestants import Own
from benchmarks.plots import Chart, Series
from benchmarks.report import Spread
from benchmarks.truths import PERCENTILES, TRUTHS, Asked, Condition, Found, Percentiles
from benchmarks.turns import text_table
from servebench.report.console import format_duration

#: Largest median error of servebench's p99, either way.
MAX_P99_ERROR = 0.03


@dataclass(frozen=True, slots=True)
class Row:
    """The turns of a contestant under one condition against one truth, percentile by percentile."""

    contestant: str
    truth: str
    turns: int
    disturbed: int  #: how many of them were: see `benchmarks.truths.Found.calm`
    calm_only: bool  #: whether disturbed ones are left out, of which another row has all
    error: dict[float, Spread]
    reported_ns: Percentiles  #: median
    honest: dict[float, int]  #: in how many turns a run of honest Poisson arrivals could have reported this

    @property
    def turns_text(self) -> str:
        """How many turns of which kind."""
        return f"{self.turns}, {self.disturbed} disturbed" if self.disturbed else f"{self.turns} undisturbed"


def summarize(turns: Sequence[Found]) -> list[Row]:
    """A row for each contestant and truth, in the order of first appearance; a second one of the undisturbed turns where some
    but not all were disturbed.

    ``turns`` are of one condition.
    """
    rows = []
    for contestant in dict.fromkeys(turn.contestant for turn in turns):
        for truth in TRUTHS:
            mine = [turn for turn in turns if turn.contestant == contestant and turn.errors.get(truth)]
            calm = [turn for turn in mine if turn.calm]
            kinds = [(mine, False), (calm, True)] if 0 < len(calm) < len(mine) else [(mine, False)]
            rows += [row for of, calm_only in kinds if (row := _row(contestant, truth, of, calm_only)) is not None]
    return rows


def _row(contestant: str, truth: str, turns: Sequence[Found], calm_only: bool) -> Row | None:
    common = [of for of in PERCENTILES if turns and all(of in turn.errors[truth] for turn in turns)]
    if not common:
        return None
    errors = {of: Spread.of([turn.errors[truth][of] for turn in turns]) for of in common}
    return Row(
        contestant,
        truth,
        len(turns),
        disturbed=sum(not turn.calm for turn in turns),
        calm_only=calm_only,
        error={of: spread for of, spread in errors.items() if spread is not None},
        reported_ns={of: statistics.median(turn.reported_ns[of] for turn in turns) for of in common},
        honest={of: sum(turn.honest[of] for turn in turns) for of in common if of in turns[0].honest},
    )


def table(rows: Sequence[Row]) -> str:
    """Rows as text: the reported percentile and its error, median (smallest to largest)."""
    heads = ["contestant", "truth", "turns", *(f"p{of:g}: reported, error" for of in PERCENTILES), "honest p99"]
    lines = [heads]
    for row in rows:
        cells = [_error(row, of) if of in row.error else "-" for of in PERCENTILES]
        honest = f"{row.honest[99.0]} of {row.turns}" if 99.0 in row.honest else "-"
        lines.append([row.contestant, row.truth, row.turns_text, *cells, honest])
    return text_table(lines)


def asked_line(condition: Condition, asked: Asked) -> str:
    """What the asked rate leads to and how far single runs scatter, in a sentence below a table."""
    source = "M/D/1" if condition.freeze is None else "Simulated"
    cells = []
    for of in PERCENTILES:
        true, low, high = (format_duration(values[of]) for values in (asked.true_ns, asked.low_ns, asked.high_ns))
        cells.append(f"p{of:g} {true} ({low} - {high})")
    return f"{source}, and 95 % of Poisson runs as short as these (a p99 in there is honest): {', '.join(cells)}."


def _error(row: Row, percentile: float) -> str:
    error = row.error[percentile]
    spread = f" ({error.lowest:+.1%} to {error.highest:+.1%})" if row.turns > 1 else ""
    return f"{format_duration(row.reported_ns[percentile])} {error.median:+.1%}{spread}"


def sharpest(rows: Sequence[Row]) -> dict[str, Row]:
    """For each contestant the row against the sharpest truth that is known of it, of the undisturbed turns if there is one."""
    found: dict[str, Row] = {}
    for row in rows:  # each contestant's rows are in the order of `TRUTHS`, the sharpest first
        best = found.setdefault(row.contestant, row)
        if row.calm_only and row.truth == best.truth:
            found[row.contestant] = row
    return found


def target(rows: Sequence[Row], *, slack: float = 1) -> tuple[bool, str]:
    """Whether servebench's p99 is true within ``slack`` times the target; a sentence on that and the peers' errors.

    Each is held against its sharpest truth, in its undisturbed turns if it had any.
    """
    told = {name: row for name, row in sharpest(rows).items() if 99.0 in row.error}
    ours = told.pop(Own().name, None)
    if ours is None:
        return False, "Target NOT met: servebench had no turn."
    error = abs(ours.error[99.0].median)
    met = error <= MAX_P99_ERROR
    better = [name for name, row in told.items() if abs(row.error[99.0].median) < error]
    every_peer = f"below that of all {len(told)} peers" if told else "no peers"
    place = f"nearer to the truth: {', '.join(better)}" if better else every_peer
    which = f" in {ours.turns_text} turns" if ours.calm_only or ours.disturbed else ""
    if ours.calm_only:
        every = next(row for row in rows if (row.contestant, row.truth) == (ours.contestant, ours.truth) and not row.calm_only)
        which += f" ({every.error[99.0].median:+.1%} in {every.turns_text})"
    return (
        error <= slack * MAX_P99_ERROR,
        f"Target {'met' if met else 'NOT met'}: p99 off by {error:.1%}{which}, required are {MAX_P99_ERROR:.0%}; {place}.",
    )


def chart(rows: Mapping[str, Sequence[Row]]) -> Chart:
    """Reported over true p99, one group of bars a contestant, one colour a condition; 1 is the truth."""
    by_condition = {name: sharpest(of) for name, of in rows.items() if of}
    names = list(dict.fromkeys(name for of in by_condition.values() for name in of))

    def ratios(of: Mapping[str, Row], end: str) -> list[float | None]:
        return [1 + getattr(of[name].error[99.0], end) if name in of and 99.0 in of[name].error else None for name in names]

    series = [
        Series(name, ratios(of, "median"), ratios(of, "lowest"), ratios(of, "highest")) for name, of in by_condition.items()
    ]
    note = "against the sharpest truth known of each contestant, in its undisturbed turns if it had any; 1 is true"
    return Chart("The p99 that is reported, over the true one", "reported / true p99", names, series, note, logarithmic=True)


def turn_line(turn: Found) -> str:
    """What a turn found, for those who watch."""
    if not turn.reported_ns:
        return "reports no percentiles"
    true_ns = next(turn.true_ns[name] for name in TRUTHS if name in turn.true_ns)
    cells = [
        f"p{of:g} {format_duration(value)} (true {format_duration(true_ns[of])})" for of, value in turn.reported_ns.items()
    ]
    p99, most, added = map(format_duration, (turn.stub_late_p99_ns, turn.stub_late_max_ns, turn.added_scatter_ns))
    late = "" if turn.calm else f"; disturbed: stub late by {p99} (p99), {most} (max), socket before by {added} (p99)"
    return f"{', '.join(cells)}; {turn.completed:,} ok, {turn.not_ok:,} not{late}"
