"""What is shown while a run goes on: its phase and its progress, on a terminal and without one."""

import io
import re

import pytest
from rich.console import Console

from servebench.record.progress import Snapshot
from servebench.report.live import LiveView

FAST = Snapshot(1_234.0, 1_000_000, 987_654, 900_000, 3, 1_234, 12_345.6, 12_345.6, 4_280_000, 13_500_000, 4_780_000)


def live(phases: list[tuple[str, float | None]], *, width: int, terminal: bool = True) -> list[str]:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=width, color_system=None)
    with LiveView(console=console) as view:
        for name, duration_s in phases:
            view.phase(name, duration_s=duration_s)
        view.progress(FAST)
    return [line.rstrip() for line in re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", out.getvalue()).replace("\r", "\n").splitlines()]


@pytest.mark.parametrize("width", [80, 100, 120])
def test_the_progress_fits_into_its_lines(width: int) -> None:
    bar = "━" * 16
    lines = live([("measuring", 3_600.0)], width=width)
    at = lines.index(f"measuring  {bar}  1,234 s of 3,600 s  987,654 of 1,000,000 queries")
    assert lines[at + 1 : at + 3] == [
        "offered 12,346/s  completed 12,346/s  in flight 1,234  failed 3",
        "p50 4.28 ms  p99 13.5 ms  issued late p99 4.78 ms",
    ]


def test_a_phase_of_unknown_length_has_no_bar() -> None:
    text = "interrupted: waiting for outstanding replies (again to stop at once)"
    lines = live([("measuring", 20.0), (text, None)], width=80)
    assert lines[lines.index("offered 12,346/s  completed 12,346/s  in flight 1,234  failed 3") - 1] == text


def test_without_a_terminal_phases_are_whole_lines() -> None:
    text = "interrupted: leaving the server as it was found (again to stop at once)"
    assert live([("measuring", 0.3), ("measuring", 20.0), (text, None)], width=40, terminal=False) == [
        "servebench: measuring (300 ms)",
        "servebench: measuring (20.0 s)",
        f"servebench: {text}",
    ]
