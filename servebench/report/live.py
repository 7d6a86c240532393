"""The progress line while a run goes on; plain phase lines where there is no terminal."""

from __future__ import annotations

from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from servebench.record.progress import Snapshot
from servebench.report.console import format_duration, format_rate

_BAR_CHARACTERS = 24


class LiveView:
    """Shows phases and snapshots on stderr; use it as a context manager around the run."""

    def __init__(self) -> None:
        self._console = Console(stderr=True, highlight=False)
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
            planned = f" ({duration_s:.0f} s)" if duration_s else ""
            self._console.print(Text(f"servebench: {name}{planned}"))

    def progress(self, snapshot: Snapshot) -> None:
        """How the phase is going."""
        if self._live is not None:
            self._live.update(_progress_table(self._phase, self._duration_s, snapshot))


def _progress_table(phase: str, duration_s: float | None, snapshot: Snapshot) -> Table:
    table = Table.grid(padding=(0, 2))
    share = min(1.0, snapshot.elapsed_s / duration_s) if duration_s else 0.0
    filled = round(share * _BAR_CHARACTERS)
    table.add_row(
        Text(phase, style="bold"),
        Text("━" * filled, style="cyan") + Text("━" * (_BAR_CHARACTERS - filled), style="dim"),
        f"{snapshot.elapsed_s:.0f} of {duration_s or 0:.0f} s",
        f"{snapshot.issued:,} of {snapshot.planned:,} queries",
    )
    second = Table.grid(padding=(0, 2))
    second.add_row(
        f"offered {format_rate(snapshot.offered_qps)}",
        f"completed {format_rate(snapshot.completed_qps)}",
        f"in flight {snapshot.in_flight:,}",
        f"p50 {_duration(snapshot.p50_ns)}",
        f"p99 {_duration(snapshot.p99_ns)}",
        f"late p99 {_duration(snapshot.delay_p99_ns)}",
        Text(f"failed {snapshot.failed:,}", style="red" if snapshot.failed else "dim"),
    )
    outer = Table.grid()
    outer.add_row(table)
    outer.add_row(second)
    return outer


def _duration(value_ns: int | None) -> str:
    return "-" if value_ns is None else format_duration(value_ns)
