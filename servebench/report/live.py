"""The progress line while a run goes on; plain phase lines where there is no terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console, Group
from rich.live import Live
from rich.text import Text

from servebench.judge.wording import say_time
from servebench.record.progress import Snapshot
from servebench.report.console import format_duration, format_rate

_BAR_CHARACTERS = 16


class LiveView:
    """Shows phases and snapshots on stderr; use it as a context manager around the run."""

    def __init__(self, *, console: Console | None = None) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self._live: Live | None = None
        self._phase = ""
        self._duration_s: float | None = None

    def __enter__(self) -> LiveView:
        if self._console.is_terminal:
            self._live = Live(console=self._console, transient=True, refresh_per_second=4)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def phase(self, name: str, *, duration_s: float | None = None) -> None:
        """A phase begins."""
        self._phase, self._duration_s = name, duration_s
        if self._live is not None:
            self._live.update(Text(f"{name} ..."))
        else:
            planned = f" ({say_time(duration_s * 1e9)})" if duration_s else ""
            self._console.print(Text(f"servebench: {name}{planned}"), soft_wrap=True)

    def progress(self, snapshot: Snapshot) -> None:
        """How the phase is going."""
        if self._live is not None:
            self._live.update(_progress_lines(self._phase, self._duration_s, snapshot))


def _progress_lines(phase: str, duration_s: float | None, snapshot: Snapshot) -> Group:
    """Where the phase is, how much goes through, how long it takes: a line each, so that each fits into 80 columns."""
    queries = f"{snapshot.issued:,} of {snapshot.planned:,} queries"
    first = [Text(phase, style="bold")]
    if duration_s:
        filled = round(min(1.0, snapshot.elapsed_s / duration_s) * _BAR_CHARACTERS)
        bar = Text.assemble(("━" * filled, "cyan"), ("━" * (_BAR_CHARACTERS - filled), "dim"))
        first += [bar, Text(f"{snapshot.elapsed_s:,.0f} s of {say_time(duration_s * 1e9)}"), Text(queries)]
    failed = Text(f"failed {snapshot.failed:,}", style="red" if snapshot.failed else "dim")
    rates = f"offered {format_rate(snapshot.offered_qps)}", f"completed {format_rate(snapshot.completed_qps)}"
    times = (("p50", snapshot.p50_ns), ("p99", snapshot.p99_ns), ("issued late p99", snapshot.delay_p99_ns))
    return Group(
        _line(first),
        _line([*map(Text, rates), Text(f"in flight {snapshot.in_flight:,}"), failed]),
        _line([Text(f"{name} {_duration(value_ns)}") for name, value_ns in times]),
    )


def _line(cells: list[Text]) -> Text:
    line = Text("  ").join(cells)
    line.no_wrap, line.overflow = True, "ellipsis"
    return line


def _duration(value_ns: int | None) -> str:
    return "-" if value_ns is None else format_duration(value_ns)
