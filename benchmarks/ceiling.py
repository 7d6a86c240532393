"""The client's own ceiling: how many Poisson queries a second one worker on one core issues on time.

Run it with ``make bench`` (``python -m benchmarks.ceiling``); it takes one to two minutes. nginx has
the first CPU and answers with constants (see `benchmarks.nginx`), the worker has the last. Each
step is an ordinary run of an ordinary profile, judged like any other, at a higher rate than the
one before, until a step is not clean. Beside it, in the same minutes on the same cores: what wrk
gets out of the same nginx in a closed loop, and what a bare blocking socket measures on an idle one.

Exit codes: 0 the floor is met, 1 it is not or a run failed, 2 the machine lacks nginx or a second CPU.
"""

from __future__ import annotations

import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

from benchmarks.nginx import NullServer, find_nginx
from benchmarks.peers import WRK_CONNECTIONS, ping_pong_ns, wrk_qps
from servebench.engine.run import run_profile
from servebench.errors import RunError, ServebenchError
from servebench.profile import parse_profile
from servebench.record.environment import collect_environment
from servebench.record.files import write_json
from servebench.record.progress import Snapshot
from servebench.record.rundir import read_run
from servebench.report.console import format_duration
from servebench.report.rewrite import rewrite_reports

RESULT = Path(__file__).parent / "results" / "ceiling.json"

FLOOR_QPS = 25_000
LADDER_QPS = (10_000, FLOOR_QPS, 40_000, 60_000, 80_000, 100_000, 120_000, 140_000, 160_000, 200_000, 250_000)
STEP_S = 4.0
MAX_DELAY_P99_NS = 1_000_000
MIN_ON_TIME_SHARE = 0.995
#: Machines are shared: a neighbour's burst must not count as our ceiling.
MAX_TRIES = 3
#: From the ladder's first rate on the worker spins between queries: below this share of its core, somebody else had the rest.
SHARED_CORE_SHARE = 0.9

IDLE_QPS = 1_000
WRK_S = 4


@dataclass(frozen=True, slots=True)
class Step:
    """One run at one rate. CPU is in shares of a core while measuring; ``precise`` pacing spins, so the worker's is near 1."""

    target_qps: float
    planned: int
    not_ok: int  #: queries that failed in any way, or were never sent
    issued_qps: float
    on_time_share: float  #: part of the plan that was issued within the schedule, give or take `MAX_DELAY_P99_NS` at its end
    delay_p50_ns: int
    delay_p99_ns: int
    delay_max_ns: int
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
        if self.delay_p99_ns > MAX_DELAY_P99_NS:
            found.append(f"p99 issue delay {format_duration(self.delay_p99_ns)}")
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


def climb(measure: Callable[[float], Step], rates_qps: Sequence[float], seen: Callable[[Step], None]) -> Step | None:
    """The last clean step of a rising ladder, which ends with the first rate that is not clean in `MAX_TRIES` tries."""
    best = None
    for rate_qps in rates_qps:
        for _ in range(MAX_TRIES):
            step = measure(rate_qps)
            seen(step)
            if not step.problems:
                break
        else:
            return best
        best = step
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

    def cpu_s(self) -> float:
        """CPU time that it has used so far, in seconds."""


def measure_step(
    server: Server, cpus: Sequence[int], target_qps: float, *, duration_s: float = STEP_S, transport: str = "wire"
) -> Step:
    """Run one worker on ``cpus`` against the server and judge the run. `ServebenchError` when it cannot be done."""
    profile = parse_profile(
        {
            "name": "ceiling",
            "server": {"url": server.url},
            "endpoint": server.endpoint,
            "samples": {"source": "zero"},
            "load": {
                "target_qps": target_qps,
                "arrivals": "mlperf",
                "min_duration_s": duration_s,
                "warmup_s": 1,
                "drain_timeout_s": 2,
            },
            "client": {"cpus": list(cpus), "transport": transport},
            "constraints": ["p99 <= 50ms"],
        },
        source="benchmarks.ceiling",
    )
    phases = _Phases(server)
    with tempfile.TemporaryDirectory(prefix="ceiling-") as scratch:
        directory = Path(scratch) / "run"
        if run_profile(profile, directory, command=["benchmarks.ceiling"], observer=phases) != "complete":
            raise KeyboardInterrupt
        document, run = rewrite_reports(directory), read_run(directory)
    on_time = (run.issued_ns >= 0) & (run.issued_ns <= run.scheduled_ns.max() + MAX_DELAY_P99_NS)
    return step_of(document, on_time_share=float(on_time.mean()), server_cpu_share=phases.server_cpu_share())


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
        format_duration(step.delay_p50_ns),
        format_duration(step.delay_p99_ns),
        format_duration(step.delay_max_ns),
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


def floor_line(best: Step | None, floor_qps: int = FLOOR_QPS) -> str:
    """Whether the floor is met, in a sentence."""
    wanted = f"{floor_qps:,} Poisson queries/s on one core with p99 issue delay <= {format_duration(MAX_DELAY_P99_NS)}"
    if best is None:
        return f"Floor NOT met: no rate was clean; required are {wanted}."
    found = f"{best.target_qps:,.0f}/s with {format_duration(best.delay_p99_ns)}"
    if best.target_qps < floor_qps:
        return f"Floor NOT met: highest clean rate {found}; required are {wanted}."
    return f"Floor met: highest clean rate {found}; required are {wanted}."


def main() -> int:
    """Entry point; returns the exit code."""
    nginx, cpus = find_nginx(), sorted(os.sched_getaffinity(0))
    if nginx is None:
        print("nginx was not found, and the null server is one: apt install nginx-light", file=sys.stderr)
        return 2
    if len(cpus) < 2:
        print("one CPU is not enough: nginx and the worker need one each", file=sys.stderr)
        return 2
    try:
        with NullServer(nginx, cpus[:1]) as server:
            best = _measure_all(server, cpus[-1:])
    except ServebenchError as error:
        print(f"the measurement failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return exit_code(best)


def exit_code(best: Step | None) -> int:
    """0 when the last clean step reaches the floor, else 1."""
    return 0 if best is not None and best.target_qps >= FLOOR_QPS else 1


def _measure_all(server: NullServer, cpus: Sequence[int]) -> Step | None:
    environment = collect_environment()
    print(f"One worker on CPU {cpus[0]} of {environment['cpus']} ({environment['cpu_model']}), {server.version} on another.")
    print(f"Each rate: 1 s of warm-up, {STEP_S:g} s measured, at most {MAX_TRIES} tries because machines are shared.")
    print(
        f"Clean: p99 issue delay <= {format_duration(MAX_DELAY_P99_NS)}, no query failed, "
        f">= {MIN_ON_TIME_SHARE:.1%} issued within the schedule, and the run is not INVALID.\n"
    )
    print(header_line("nginx"), flush=True)
    steps: list[Step] = []

    def seen(step: Step) -> None:
        steps.append(step)
        print(step_line(step), flush=True)

    best = climb(lambda rate_qps: measure_step(server, cpus, rate_qps), LADDER_QPS, seen)
    print(f"\n{floor_line(best)}", flush=True)

    wrk_rate_qps = _compare_with_wrk(server, cpus, best)
    # Half before and half after: how fast a shared machine wakes up drifts within seconds.
    times_ns = ping_pong_ns(server.url, cpus, rate_qps=IDLE_QPS, duration_s=STEP_S / 2)
    idle = measure_step(server, cpus, IDLE_QPS)
    times_ns += ping_pong_ns(server.url, cpus, rate_qps=IDLE_QPS, duration_s=STEP_S / 2)
    ping_pong_p50_ns = statistics.median_low(times_ns)
    print(
        f"At {IDLE_QPS:,}/s: service time p50 {_duration(idle.service_p50_ns)}, a blocking socket's ping-pong "
        f"{format_duration(ping_pong_p50_ns)}: ratio {(idle.service_p50_ns or 0) / ping_pong_p50_ns:.2f}."
    )
    RESULT.parent.mkdir(exist_ok=True)
    write_json(
        RESULT,
        {
            "schema": "servebench.ceiling/1",
            "floor_qps": FLOOR_QPS,
            "highest_clean_qps": best.target_qps if best else None,
            "steps": [asdict(step) | {"problems": step.problems} for step in steps],
            "wrk": {"threads": 1, "connections": WRK_CONNECTIONS, "qps": wrk_rate_qps},
            "idle": {"target_qps": IDLE_QPS, "service_p50_ns": idle.service_p50_ns, "ping_pong_p50_ns": ping_pong_p50_ns},
            "server": server.version,
            "environment": environment,
        },
    )
    print(f"Written to {RESULT}")
    return best


def _compare_with_wrk(server: NullServer, cpus: Sequence[int], best: Step | None) -> float | None:
    """wrk's rate, printed as well; None without wrk. Its absence or failure takes nothing from what we measured."""
    wrk = shutil.which("wrk")
    if wrk is None:
        print("wrk is not on the PATH: no comparison with its closed loop.")
        return None
    try:
        rate_qps = wrk_qps(wrk, server.url, cpus, duration_s=WRK_S)
    except RunError as error:
        print(error)
        return None
    ratio = f"; the highest clean rate is {best.target_qps / rate_qps:.0%} of it" if best else ""
    print(f"wrk, closed loop, 1 thread, {WRK_CONNECTIONS} connections: {rate_qps:,.0f}/s{ratio}.", flush=True)
    return rate_qps


def _line(cells: Sequence[str], last: str) -> str:
    return "".join(f"{cell:>{width}}" for cell, width in zip(cells, _WIDTHS, strict=True)) + f"   {last}"


def _duration(value_ns: int | None) -> str:
    return "-" if value_ns is None else format_duration(value_ns)


if __name__ == "__main__":
    sys.exit(main())
