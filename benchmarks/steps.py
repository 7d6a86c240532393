"""One run of servebench's own against a null server, judged: was it clean? And ladders of such runs.

Clean: p99 issue delay of at most 1 ms, no query failed, at least 99.5 % of the plan issued within the schedule, and
the run is not INVALID. Each step is an ordinary run of an ordinary profile, judged like any other.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from benchmarks.own_client import OwnRun, run_settings
from servebench.record.outcome import Outcome
from servebench.record.progress import Snapshot
from servebench.report.console import format_duration

MAX_DELAY_P99_NS = 1_000_000
MIN_ON_TIME_SHARE = 0.995
#: From the ladder's first rate on the worker spins between queries: below this share of its core, somebody else had the rest.
SHARED_CORE_SHARE = 0.9
WARMUP_S = 0.5
#: More than one core sends with a transport; not much more of aiohttp's, because shedding the rest takes the same core's time.
SATURATING_QPS = {"wire": 250_000, "aiohttp": 20_000}


@dataclass(frozen=True, slots=True)
class Step:
    """One run at one rate. CPU is in shares of a core while measuring; ``precise`` pacing spins, so the worker's is near 1."""

    target_qps: float
    planned: int
    not_ok: int  #: queries that failed in any way, or were never sent
    issued_qps: float
    on_time_share: float  #: part of the plan that was issued within the schedule, give or take `MAX_DELAY_P99_NS` at its end
    delay_p50_ns: int | None  #: None where queries that were never sent reach into the percentile
    delay_p99_ns: int | None
    delay_max_ns: int | None
    response_p50_ns: int | None  #: None where failed queries reach into the percentile
    response_p99_ns: int | None
    service_p50_ns: int | None
    worker_cpu_share: float
    server_cpu_share: float
    connections: int
    trust: str

    @property
    def problems(self) -> list[str]:
        """Why the step does not count as clean; empty when it does."""
        found = []
        if self.delay_p99_ns is None or self.delay_p99_ns > MAX_DELAY_P99_NS:
            found.append(f"p99 issue delay {_duration(self.delay_p99_ns)}")
        if self.not_ok:
            found.append(f"{self.not_ok:,} of {self.planned:,} queries not ok")
        if self.on_time_share < MIN_ON_TIME_SHARE:
            found.append(f"{self.on_time_share:.2%} issued within the schedule")
        if self.trust == "INVALID":
            found.append("INVALID")
        return found


def step_of(document: dict[str, Any], *, on_time_share: float, server_cpu_share: float) -> Step:
    """The step that a run document (``run.json``) tells of."""
    counts, stats = document["counts"], document["workers"][0]["stats"]
    delay, response = document["issue_delay"], document["response_time"]
    return Step(
        target_qps=document["rates"]["target_qps"],
        planned=counts["planned"],
        not_ok=counts["planned"] - counts["ok"],
        issued_qps=document["rates"]["issued_qps"],
        on_time_share=on_time_share,
        delay_p50_ns=delay["percentiles"]["50"],
        delay_p99_ns=delay["percentiles"]["99"],
        delay_max_ns=delay["max_ns"],
        response_p50_ns=response["percentiles"]["50"],
        response_p99_ns=response["percentiles"]["99"],
        service_p50_ns=document["service_time"]["percentiles"]["50"],
        worker_cpu_share=stats["cpu_s"] / stats["wall_s"],
        server_cpu_share=server_cpu_share,
        connections=stats["connections_peak"],
        trust=document["trust"]["verdict"],
    )


def climb(
    measure: Callable[[float], Step], rates_qps: Sequence[float], seen: Callable[[Step], None], *, tries: int, start: int = 0
) -> Step | None:
    """The last clean step of a rising ladder, climbed from the rung ``start``; None when no rung is clean.

    It ends with the first rate that is not clean in any of ``tries``: machines are shared, and a neighbour's burst must not
    count as our ceiling. When that is the first one
    already, the rungs below are tried, going down.
    """

    def clean(rate_qps: float) -> Step | None:
        for _ in range(tries):
            step = measure(rate_qps)
            seen(step)
            if not step.problems:
                return step
        return None

    best = None
    for rate_qps in rates_qps[start:]:
        step = clean(rate_qps)
        if step is None:
            break
        best = step
    if best is None:
        best = next((step for rate_qps in reversed(rates_qps[:start]) if (step := clean(rate_qps))), None)
    return best


class _Phases:
    """Observes a run for the server's CPU time while measuring."""

    def __init__(self, server: Server) -> None:
        self._server = server
        self._marks: list[tuple[str, float, float]] = []

    def phase(self, name: str, *, duration_s: float | None = None) -> None:
        self._marks.append((name, time.monotonic(), self._server.cpu_s()))

    def progress(self, snapshot: Snapshot) -> None:
        pass

    def server_cpu_share(self) -> float:
        """CPU seconds per second of the measured phase."""
        begin = next(number for number, mark in enumerate(self._marks) if mark[0] == "measuring")
        (_, from_s, cpu_from_s), (_, to_s, cpu_to_s) = self._marks[begin : begin + 2]
        return (cpu_to_s - cpu_from_s) / (to_s - from_s)


class Server(Protocol):
    """A null server that a ladder can be climbed against."""

    @property
    def url(self) -> str:
        """Where it listens."""

    @property
    def endpoint(self) -> dict[str, Any]:
        """The profile's ``endpoint`` that asks it."""

    @property
    def saturating_connections(self) -> int | None:
        """How many connections are few enough that, of too many queries, those that wait do so in the client.

        None where a connection carries many at once.
        """

    def cpu_s(self) -> float:
        """CPU time that it has used so far, in seconds."""


def measure_step(server: Server, cpus: Sequence[int], target_qps: float, *, duration_s: float, transport: str = "wire") -> Step:
    """Run one worker on ``cpus`` against the server and judge the run. `ServebenchError` when it cannot be done."""
    phases = _Phases(server)
    run = _run(server, cpus, target_qps, duration_s, {"transport": transport}, phases)
    data = run.data
    on_time = (data.issued_ns >= 0) & (data.issued_ns <= data.scheduled_ns.max() + MAX_DELAY_P99_NS)
    return step_of(run.document, on_time_share=float(on_time.mean()), server_cpu_share=phases.server_cpu_share())


def measure_saturated_qps(server: Server, cpus: Sequence[int], *, duration_s: float, transport: str = "wire") -> float:
    """What one worker gets answered, a second, when more is due than it can send. `ServebenchError` when it cannot be done."""
    client: dict[str, Any] = {"max_connections": server.saturating_connections, "transport": transport}
    if transport != "wire":  # each query that waited in a library would be a task, and keep it from its work
        client["max_outstanding"] = server.saturating_connections
    data = _run(server, cpus, SATURATING_QPS[transport], duration_s, client, _Phases(server)).data
    first_ns, last_ns = int(data.scheduled_ns.min()), int(data.scheduled_ns.max())
    answered = (data.outcome == Outcome.OK) & (data.completed_ns <= last_ns)
    return float(answered.sum()) / (last_ns - first_ns) * 1e9


def _run(
    server: Server, cpus: Sequence[int], target_qps: float, duration_s: float, client: dict[str, Any], phases: _Phases
) -> OwnRun:
    settings = {
        "name": "ceiling",
        "server": {"url": server.url},
        "endpoint": server.endpoint,
        "samples": {"source": "zero"},
        "load": {
            "target_qps": target_qps,
            "arrivals": "mlperf",
            "min_duration_s": duration_s,
            "warmup_s": WARMUP_S,
            "drain_timeout_s": 2,
        },
        "client": {"cpus": list(cpus), **client},
        "constraints": ["p99 <= 50ms"],
    }
    return run_settings(settings, phases)


_COLUMNS = (
    "rate/s",
    "issued/s",
    "delay p50",
    "p99",
    "max",
    "response p50",
    "p99",
    "worker CPU",
    "server CPU",
    "connections",
)
_WIDTHS = (8, 9, 10, 9, 9, 13, 9, 11, 12, 12)


def header_line(server: str) -> str:
    """The table's head."""
    return _line([column.replace("server", server) for column in _COLUMNS], "clean?")


def step_line(step: Step) -> str:
    """A step as a line of the table."""
    cells = (
        f"{step.target_qps:,.0f}",
        f"{step.issued_qps:,.0f}",
        _duration(step.delay_p50_ns),
        _duration(step.delay_p99_ns),
        _duration(step.delay_max_ns),
        _duration(step.response_p50_ns),
        _duration(step.response_p99_ns),
        f"{step.worker_cpu_share:.0%}",
        f"{step.server_cpu_share:.0%}",
        f"{step.connections:,}",
    )
    if not step.problems:
        return _line(cells, "clean")
    shared = " (others ran on the worker's core)" if step.worker_cpu_share < SHARED_CORE_SHARE else ""
    return _line(cells, f"no: {', '.join(step.problems)}{shared}")


def _line(cells: Sequence[str], last: str) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)) + f"   {last}"


def _duration(value_ns: int | None) -> str:
    return "-" if value_ns is None else format_duration(value_ns)
