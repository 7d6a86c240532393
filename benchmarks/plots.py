"""PNG plots of results, by matplotlib in an environment of its own: nothing that is measured needs it.

A `Chart` is data; `draw` hands some to this very file, run as a script in that environment. Without
matplotlib a benchmark loses its picture and nothing else.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_TIMEOUT_S = 120.0


@dataclass(frozen=True, slots=True)
class Series:
    """Values of one kind, one for each category or x; None leaves a gap. ``lows`` and ``highs`` end their whiskers."""

    label: str
    values: Sequence[float | None]
    lows: Sequence[float | None]
    highs: Sequence[float | None]


@dataclass(frozen=True, slots=True)
class Chart:
    """Horizontal bars, grouped by category; or lines over ``xs``, when there are any."""

    title: str
    value_label: str
    categories: Sequence[str]
    series: Sequence[Series]
    note: str = ""  #: small, below: the machine, the command
    xs: Sequence[float] | None = None
    x_label: str = ""
    logarithmic: bool = False


def draw(charts: Sequence[Chart], path: Path, progress: Callable[[str], None]) -> bool:
    """Write the charts, one below the other, as a PNG; False, and a line to ``progress``, when that cannot be done here."""
    from benchmarks.peers.base import run_bounded
    from benchmarks.peers.environment import environment_python, make_environment
    from servebench.errors import RunError

    try:
        make_environment("matplotlib", ("matplotlib==3.11.2",), progress)
        # Isolated from the working directory: in there, this file's neighbours would be its modules.
        argv = [str(environment_python("matplotlib")), "-P", str(Path(__file__)), str(path)]
        data = json.dumps([asdict(chart) for chart in charts]).encode()
        run_bounded("matplotlib", argv, timeout_s=_TIMEOUT_S, stdin=data)
    except (RunError, OSError) as error:
        progress(f"no plot {path.name}: {error}")
        return False
    return True


def _render(charts: list[dict[str, Any]], path: Path) -> None:
    """The script's part."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    heights = [
        4.5 if chart["xs"] is not None else 1.2 + 0.32 * len(chart["categories"]) * len(chart["series"]) for chart in charts
    ]
    figure, panels = pyplot.subplots(
        len(charts), figsize=(8.5, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    for chart, axes in zip(charts, panels.flat, strict=True):
        (_draw_bars if chart["xs"] is None else _draw_lines)(chart, axes)
        axes.set_title(chart["title"], fontsize=11)
        if len(chart["series"]) > 1:
            axes.legend(fontsize=8)
    if notes := "\n".join(chart["note"] for chart in charts if chart["note"]):
        figure.supxlabel(notes, fontsize=7, color="gray")
    figure.savefig(path, dpi=120)


def _draw_lines(chart: dict[str, Any], axes: Any) -> None:
    xs = chart["xs"]
    for one in chart["series"]:
        kept, values = _known(one)
        axes.errorbar(
            [xs[place] for place in kept], values, yerr=_whiskers(one, kept, values), marker="o", capsize=3, label=one["label"]
        )
    axes.set(
        xlabel=chart["x_label"],
        ylabel=chart["value_label"],
        xscale="log",
        yscale="log" if chart["logarithmic"] else "linear",
    )
    if not chart["logarithmic"]:
        axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)


def _draw_bars(chart: dict[str, Any], axes: Any) -> None:
    series = chart["series"]
    width = 0.8 / len(series)
    for number, one in enumerate(series):
        kept, values = _known(one)
        places = [place + (number - (len(series) - 1) / 2) * width for place in kept]
        bars = axes.barh(places, values, width, xerr=_whiskers(one, kept, values), capsize=2, label=one["label"])
        axes.bar_label(bars, [f"{value:,.0f}" if value >= 100 else f"{value:.3g}" for value in values], padding=4, fontsize=8)
    axes.set(xlabel=chart["value_label"], xscale="log" if chart["logarithmic"] else "linear")
    axes.set_yticks(range(len(chart["categories"])), chart["categories"])
    axes.invert_yaxis()
    axes.margins(x=0.15)


def _known(one: dict[str, Any]) -> tuple[list[int], list[float]]:
    """The places that have a value, and those values."""
    kept = [place for place, value in enumerate(one["values"]) if value is not None]
    return kept, [one["values"][place] for place in kept]


def _whiskers(one: dict[str, Any], kept: list[int], values: list[float]) -> list[list[float]]:
    lows, highs = ([one[end][place] for place in kept] for end in ("lows", "highs"))
    return [
        [value - low for value, low in zip(values, lows, strict=True)],
        [high - value for value, high in zip(values, highs, strict=True)],
    ]


if __name__ == "__main__":
    _render(json.load(sys.stdin), Path(sys.argv[1]))
