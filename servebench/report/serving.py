"""The status line of a server that is kept up; a plain line now and then where there is no terminal."""

from __future__ import annotations

from types import TracebackType
from typing import Protocol

from rich.console import Console
from rich.live import Live
from rich.table import Table
from rich.text import Text

from servebench.report.console import format_duration, format_rate

#: Without a terminal a line is written when something changes, else this often.
_PLAIN_INTERVAL_S = 60.0


class Status(Protocol):
    """One look at a server; `servebench.engine.serving.ServingStatus` says what each means."""

    @property
    def uptime_s(self) -> float: ...
    @property
    def ready(self) -> bool: ...
    @property
    def requests(self) -> int | None: ...
    @property
    def requests_qps(self) -> float | None: ...
    @property
    def failed(self) -> int | None: ...
    @property
    def pending(self) -> int | None: ...
    @property
    def queue_ns(self) -> float | None: ...
    @property
    def batch_size(self) -> float | None: ...
    @property
    def workers(self) -> tuple[str, ...] | None: ...
    @property
    def error(self) -> str | None: ...
    @property
    def error_age_s(self) -> float | None: ...


class ServingView:
    """Shows the status of ``model`` on stderr; use it as a context manager around the watch."""

    def __init__(self, model: str, *, console: Console | None = None) -> None:
        self._model = model
        self._console = console or Console(stderr=True, highlight=False)
        self._live: Live | None = None
        self._said: tuple[bool, str | None] | None = None
        self._said_at_s = 0.0

    def __enter__(self) -> ServingView:
        if self._console.is_terminal:
            self._live = Live(console=self._console, transient=True, auto_refresh=False)
            self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._live is not None:
            self._live.stop()

    def show(self, status: Status) -> None:
        """A new look."""
        if self._live is not None:
            self._live.update(_table(self._model, status), refresh=True)
            return
        new = (status.ready, status.error)
        if new != self._said or status.uptime_s - self._said_at_s >= _PLAIN_INTERVAL_S:
            error = f"; last error: {status.error}" if status.error and new != self._said else ""
            self._said, self._said_at_s = new, status.uptime_s
            self._console.print(Text(f"servebench: {self._model} {', '.join(status_parts(status))}{error}"), soft_wrap=True)


def status_parts(status: Status) -> list[str]:
    """What is known of a server, most important first: ``["ready", "1,234 requests", "250/s", ...]``."""
    parts = ["ready" if status.ready else "not ready"]
    if status.workers is not None and not status.ready:
        parts.append(f"workers {', '.join(status.workers) or 'none'}")
    if status.requests is not None:
        parts.append(f"{status.requests:,} requests")
    if status.requests_qps is not None:
        parts.append(format_rate(status.requests_qps))
    if status.failed:
        parts.append(f"{status.failed:,} failed")
    if status.pending is not None:
        parts.append(f"{status.pending:,} pending")
    if status.queue_ns is not None:
        parts.append(f"queue {format_duration(status.queue_ns)}")
    if status.batch_size is not None:
        parts.append(f"batch {status.batch_size:.1f}")
    return [*parts, f"up {format_uptime(status.uptime_s)}"]


def format_uptime(seconds: float) -> str:
    """``3725.0`` -> ``"1:02:05"``."""
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest:02}"


def _table(model: str, status: Status) -> Table:
    state, *rest = status_parts(status)
    line = Text.assemble(
        (f"● {state}", "bold green" if status.ready else "bold red"), f"  {model}  ", "  ".join(rest), no_wrap=True
    )
    line.overflow = "ellipsis"
    table = Table.grid()
    table.add_row(line)
    if status.error is not None:
        age = format_uptime(status.error_age_s or 0)
        table.add_row(Text(f"last error ({age} ago): {status.error}", style="red", no_wrap=True, overflow="ellipsis"))
    return table
