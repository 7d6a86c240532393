"""The client's own ceiling: how many Poisson queries a second one worker on one core issues on time.

Run it with ``make bench`` (``python -m benchmarks.ceiling``); it takes one to two minutes. nginx has
the first CPU and answers with constants (see `benchmarks.nginx`), the worker has the last. Each
step is an ordinary run of an ordinary profile, judged like any other, at a higher rate than the
one before, until a step is not clean. Beside it, in the same minutes on the same cores: what wrk
gets out of the same nginx in a closed loop, and what a bare blocking socket measures on an idle one.

Exit codes: 0 the floor is met, 1 it is not or a run failed, 2 the machine lacks nginx or a second CPU.
"""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np

from benchmarks.nginx import INFER_PATH, INPUT, MODEL, NullServer, find_nginx
from servebench.clock import now_ns
from servebench.engine.run import run_profile
from servebench.errors import RunError, ServebenchError
from servebench.profile import parse_profile
from servebench.record.environment import collect_environment
from servebench.record.files import write_json
from servebench.record.progress import Snapshot
from servebench.record.rundir import read_run
from servebench.report.console import format_duration
from servebench.report.rewrite import rewrite_reports
from servebench.wire.http1 import encode_request
from servebench.wire.kserve import encode_infer

RESULT = Path(__file__).parent / "results" / "ceiling.json"

FLOOR_QPS = 25_000
LADDER_QPS = (10_000, FLOOR_QPS, 40_000, 60_000, 80_000, 100_000, 120_000, 140_000, 160_000)
STEP_S = 4.0
MAX_DELAY_P99_NS = 1_000_000
MIN_ON_TIME_SHARE = 0.995
#: Machines are shared: a neighbour's burst must not count as our ceiling.
MAX_TRIES = 3

IDLE_QPS = 1_000
WRK_CONNECTIONS = 16
WRK_S = 4


@dataclass(frozen=True, slots=True)
class Step:
    """One run at one rate. CPU is in shares of a core while measuring; ``precise`` pacing spins, so the worker's is near 1."""

    target_qps: float
    planned: int
    not_ok: int  #: queries that failed in any way, or were never sent
    issued_qps: float
    on_time_share: float  #: part of the plan that was issued by the time its last query was due
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
    tries: int = 1

    @property
    def problems(self) -> list[str]:
        """Why the step does not count as clean; empty when it does."""
        found = []
        if self.delay_p99_ns > MAX_DELAY_P99_NS:
            found.append(f"p99 issue delay {format_duration(self.delay_p99_ns)}")
        if self.not_ok:
            found.append(f"{self.not_ok:,} of {self.planned:,} queries not ok")
        if self.on_time_share < MIN_ON_TIME_SHARE:
            found.append(f"{self.on_time_share:.1%} issued within the schedule")
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

    def __init__(self, server: NullServer) -> None:
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


def measure_step(server: NullServer, cpus: Sequence[int], target_qps: float, *, duration_s: float = STEP_S) -> Step:
    """Run one worker on ``cpus`` against the server for that long, and judge the run. `ServebenchError` when it cannot be done."""
    profile = parse_profile(
        {
            "name": "ceiling",
            "server": {"url": server.url},
            "endpoint": {"model": MODEL, "tensor_format": "json"},
            "samples": {"source": "zero"},
            "load": {
                "target_qps": target_qps,
                "arrivals": "mlperf",
                "min_duration_s": duration_s,
                "warmup_s": 1,
                "drain_timeout_s": 2,
            },
            "client": {"cpus": list(cpus)},
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
    on_time = (run.issued_ns >= 0) & (run.issued_ns <= run.scheduled_ns.max())
    return step_of(document, on_time_share=float(on_time.mean()), server_cpu_share=phases.server_cpu_share())


def query(url: str) -> tuple[bytes, list[tuple[str, str]]]:
    """Body and headers of the query that every measurement here sends."""
    return encode_infer([INPUT], {INPUT.name: np.zeros((1, 4), dtype=np.float32)}, tensor_format="json")


def ping_pong_p50_ns(url: str, cpus: Sequence[int], *, rate_qps: float = IDLE_QPS, duration_s: float = STEP_S) -> int:
    """Median service time of a blocking socket that spins for each Poisson arrival: the least that Python can measure."""
    parts = urlsplit(url)
    body, headers = query(url)
    request = encode_request("POST", INFER_PATH, parts.netloc, headers, body)
    gaps, times_ns = random.Random(0), []
    with _pinned(cpus), socket.create_connection((parts.hostname, parts.port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        due_ns = now_ns()
        end_ns = due_ns + round(duration_s * 1e9)
        while due_ns < end_ns:
            while now_ns() < due_ns:
                pass
            sent_ns = now_ns()
            sock.sendall(request)
            sock.recv(65536)  # a reply this small comes in one piece
            times_ns.append(now_ns() - sent_ns)
            due_ns += round(gaps.expovariate(rate_qps) * 1e9)
    return int(np.median(times_ns))


def wrk_script(body: str, headers: Sequence[tuple[str, str]]) -> str:
    """wrk's Lua script: the query, and a last line for `parse_wrk`."""
    return "\n".join(
        [
            'wrk.method = "POST"',
            f"wrk.body = [==[{body}]==]",
            *(f'wrk.headers["{name}"] = "{value}"' for name, value in headers),
            "function done(summary)",
            "  local e = summary.errors",
            "  local failed = e.connect + e.read + e.write + e.timeout + e.status",
            '  io.write(string.format("RESULT %d %d %d\\n", summary.requests, summary.duration, failed))',
            "end",
            "",
        ]
    )


def parse_wrk(output: str) -> float:
    """Replies a second out of wrk's output. `RunError` when it failed, or a request did."""
    for line in output.splitlines():
        match line.split():
            case ["RESULT", requests, duration_us, "0"]:
                return int(requests) / (int(duration_us) / 1e6)
    raise RunError(f"wrk did not measure: {' '.join(output.split()) or 'it wrote nothing'}")


def wrk_qps(wrk: str, url: str, cpus: Sequence[int]) -> float:
    """The closed-loop rate of wrk with one thread on ``cpus``: the next query follows a reply, so it waits for the server."""
    body, headers = query(url)
    with tempfile.TemporaryDirectory(prefix="wrk-") as scratch, _pinned(cpus):
        script = Path(scratch) / "query.lua"
        script.write_text(wrk_script(body.decode(), headers), encoding="utf-8")
        argv = [wrk, "-t1", f"-c{WRK_CONNECTIONS}", f"-d{WRK_S}s", "-s", str(script), url + INFER_PATH]
        return parse_wrk(subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout)


@contextlib.contextmanager
def _pinned(cpus: Sequence[int]) -> Iterator[None]:
    """Keep this thread, and what it starts, on ``cpus``."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
