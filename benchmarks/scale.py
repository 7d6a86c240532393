"""Scale: memory of all processes, disk a query, and the time from the last reply to the verdict, as runs grow.

``python -m benchmarks.scale`` takes four minutes, ``--quick`` 40 seconds. Each line is one ``servebench run`` in processes
of its own against a null server (nginx on the first CPU, the workers on the others), watched from outside: 1 and 2 workers,
queries of 1 KB, 150 KB (an image tensor) and 2 MB, 1 to 4,096 connections, and run lengths from ten thousand to ten million
queries (half a million with ``--quick``).

Memory is the largest sum of the proportional set sizes of the run's processes, while it ran and while it was judged.
Pages of the mapped records count in it for as long as a process maps them; "anonymous" leaves them out,
and everything else that is a file's. Pages that no process maps are the system's cache and not counted.

Exit codes: 0 the targets of the longest run are met, 1 they are not or a run failed, 2 the machine lacks nginx or a second CPU.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from benchmarks.entry import enter, need_cpus, need_nginx, say
from benchmarks.nginx import INPUT, PayloadServer
from benchmarks.plots import Chart, Series, draw
from benchmarks.process_tree import Look, Watch, disk_bytes
from benchmarks.report import write_result
from benchmarks.turns import text_table
from servebench.errors import RunError
from servebench.record.columns import ROW_BYTES
from servebench.record.rundir import open_run

#: The targets, for a run of ten million queries.
MAX_RESIDENT_BYTES = 400_000_000
MAX_DISK_BYTES_A_QUERY = 64
MAX_VERDICT_S = 20.0

KB, IMAGE, TWO_MB = 1_024, 3 * 224 * 224, 2 * 1_024 * 1_024
LENGTH_QPS = 60_000
#: Many times what the rate needs. A cap, because machines are shared: a neighbour's burst must not open thousands.
LENGTH_CONNECTIONS = 256
#: How long the runs are whose length is not the question.
POINT_S = 2.0
QUICK_POINT_S = 0.5
_FP32_BYTES = 4
_SAMPLES = 8
_LOOKS_A_RUN = 400
_SHORTEST_PERIOD_S, _LONGEST_PERIOD_S = 0.02, 0.1
_VERDICT_CODES = (0, 3, 4, 5)


@dataclass(frozen=True, slots=True)
class Point:
    """One run to make."""

    rate_qps: float
    queries: int
    workers: int = 1
    payload_bytes: int = 16
    connections: int | None = None  #: as many a run, opened ahead and no more; None: servebench's own default

    @property
    def name(self) -> str:
        """What the table calls it."""
        connections = "" if self.connections is None else f", {self.connections:,} connections"
        return f"{self.queries:,} queries of {_say_bytes(self.payload_bytes)}, {self.workers} workers{connections}"


@dataclass(frozen=True, slots=True)
class Measured:
    """What one run took. Disk is in bytes a query; ``verdict_s`` counts from the last reply to the end of the command."""

    point: Point
    ok: int
    issued_qps: float
    delay_p99_ns: int | None  #: None where more than 1 % of the queries were never sent
    connections: int  #: most at once, of all workers
    running_bytes: int
    running_anonymous_bytes: int
    judging_bytes: int
    judging_anonymous_bytes: int
    running_disk: float
    judging_disk: float
    kept_disk: float
    verdict_s: float
    trust: str

    @property
    def resident_bytes(self) -> int:
        """Most memory at any time."""
        return max(self.running_bytes, self.judging_bytes)

    @property
    def problems(self) -> list[str]:
        """Which targets it misses."""
        found = []
        if self.resident_bytes > MAX_RESIDENT_BYTES:
            found.append(f"{_say_bytes(self.resident_bytes)} resident, {_say_bytes(MAX_RESIDENT_BYTES)} allowed")
        if self.running_disk > MAX_DISK_BYTES_A_QUERY:
            found.append(f"{self.running_disk:.1f} bytes a query on disk while running, {MAX_DISK_BYTES_A_QUERY} allowed")
        if self.verdict_s > MAX_VERDICT_S:
            found.append(f"verdict {self.verdict_s:.1f} s after the last reply, {MAX_VERDICT_S:g} s allowed")
        return found


def points(*, quick: bool) -> list[Point]:
    """The runs to make, the longest last."""
    seconds = QUICK_POINT_S if quick else POINT_S
    payloads = {KB: 4_000, IMAGE: 400, TWO_MB: 40}
    connections = (1, 4_096) if quick else (1, 64, 4_096)
    lengths = (10_000, 100_000, 500_000) if quick else (10_000, 100_000, 1_000_000, 10_000_000)
    return [
        *(
            Point(rate_qps, round(rate_qps * seconds), workers, payload_bytes=payload)
            for payload, rate_qps in payloads.items()
            for workers in (1, 2)
        ),
        *(Point(2_000, round(2_000 * seconds), connections=count) for count in connections),
        *(Point(LENGTH_QPS, count, connections=LENGTH_CONNECTIONS) for count in lengths),
    ]


def settings_of(point: Point, url: str, endpoint: dict[str, Any], cpus: Sequence[int]) -> dict[str, Any]:
    """The profile of a run: exactly ``point.queries`` queries, no warm-up, all workers on ``cpus``."""
    client: dict[str, Any] = {"workers": point.workers, "cpus": list(cpus)}
    if point.connections is not None:
        client |= {"max_connections": point.connections, "warm_connections": point.connections}
    return {
        "name": "scale",
        "server": {"url": url},
        "endpoint": endpoint,
        "samples": {"source": "zero", "count": _SAMPLES, "shapes": {INPUT.name: [point.payload_bytes // _FP32_BYTES]}},
        "load": {
            "target_qps": point.rate_qps,
            "min_duration_s": 0,
            "min_query_count": point.queries,
            "warmup_s": 0,
            "drain_timeout_s": 5,
        },
        "client": client,
        "constraints": ["p99 <= 50ms", "service.p99 <= 50ms"],
    }


def measure(point: Point, server: PayloadServer, cpus: Sequence[int]) -> Measured:
    """Make one run and watch it. `RunError` with the command's own words when it fails."""
    with tempfile.TemporaryDirectory(prefix="scale-") as scratch:
        directory, profile = Path(scratch) / "run", Path(scratch) / "scale.yaml"
        settings = settings_of(point, server.url, server.endpoint, cpus)
        profile.write_text(yaml.safe_dump(settings), encoding="utf-8")
        command = [str(Path(sys.executable).with_name("servebench")), "run", str(profile), "--out", str(directory)]
        period_s = point.queries / point.rate_qps / _LOOKS_A_RUN
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            try:
                with Watch(process.pid, directory, min(max(period_s, _SHORTEST_PERIOD_S), _LONGEST_PERIOD_S)) as watch:
                    words = process.communicate()[1]
                    ended_ns = time.monotonic_ns()
            except BaseException:
                process.terminate()
                raise
        if process.returncode not in _VERDICT_CODES:
            raise RunError(f"{point.name}: {' '.join(words.split()[-40:]) or f'exit code {process.returncode}'}")
        return measured_of(point, directory, watch.looks, ended_ns)


def measured_of(point: Point, directory: Path, looks: Sequence[Look], ended_ns: int) -> Measured:
    """What a finished run directory and the looks at it say."""
    document = json.loads((directory / "run.json").read_text(encoding="utf-8"))
    run = open_run(directory)
    last_reply_ns = run.facts["start_ns"] + max(int(completed_ns.max()) for (completed_ns,) in run.chunks("completed_ns"))
    running = [one for one in looks if one.at_ns <= last_reply_ns]
    judging = [one for one in looks if one.at_ns > last_reply_ns]
    return Measured(
        point=point,
        ok=document["counts"]["ok"],
        issued_qps=document["rates"]["issued_qps"],
        delay_p99_ns=document["issue_delay"]["percentiles"]["99"],
        connections=sum(worker["stats"]["connections_peak"] for worker in document["workers"]),
        running_bytes=max((one.resident_bytes for one in running), default=0),
        running_anonymous_bytes=max((one.anonymous_bytes for one in running), default=0),
        judging_bytes=max((one.resident_bytes for one in judging), default=0),
        judging_anonymous_bytes=max((one.anonymous_bytes for one in judging), default=0),
        running_disk=max((one.disk_bytes for one in running), default=0) / point.queries,
        judging_disk=max((one.disk_bytes for one in judging), default=0) / point.queries,
        kept_disk=disk_bytes(directory) / point.queries,
        verdict_s=(ended_ns - last_reply_ns) / 1e9,
        trust=document["trust"]["verdict"],
    )


def table(results: Sequence[Measured]) -> str:
    """All runs as text."""
    head = ("queries", "workers", "payload", "connections", "rate/s", "ok", "p99 issue delay")
    memory = ("memory running (anonymous)", "judging (anonymous)")
    disk = ("disk a query, running", "judging", "kept")
    return text_table([(*head, *memory, *disk, "last reply to verdict"), *map(_cells, results)])


def shared_core_note(results: Sequence[Measured], cpus: Sequence[int]) -> str | None:
    """What to know of runs with more workers than ``cpus``, their CPUs; None when there are none."""
    most = max(one.point.workers for one in results)
    if most <= len(cpus):
        return None
    return (
        f"The server had the first CPU, so up to {most} workers shared {len(cpus)} CPU{'s' * (len(cpus) > 1)}: "
        "rows of more than one worker tell what more processes cost, not what more cores bring."
    )


def charts(results: Sequence[Measured]) -> list[Chart]:
    """Memory, and the time to the verdict, over the number of queries: of the runs whose length is the question."""
    runs = [one for one in results if one.point.connections == LENGTH_CONNECTIONS]
    lengths = [one.point.queries for one in runs]

    def chart(title: str, value_label: str, **lines: Sequence[float]) -> Chart:
        series = [Series(label, values, values, values) for label, values in lines.items()]
        return Chart(title, value_label, (), series, xs=lengths, x_label="queries")

    return [
        chart(
            "Memory of all processes of a run (PSS)",
            "MB",
            running=[one.running_bytes / 1e6 for one in runs],
            judging=[one.judging_bytes / 1e6 for one in runs],
        ),
        chart("From the last reply to the verdict", "s", verdict=[one.verdict_s for one in runs]),
    ]


def _cells(one: Measured) -> tuple[str, ...]:
    point = one.point
    return (
        f"{point.queries:,}",
        str(point.workers),
        _say_bytes(point.payload_bytes),
        f"{one.connections:,}",
        f"{one.issued_qps:,.0f}",
        f"{one.ok / point.queries:.2%}",
        "-" if one.delay_p99_ns is None else f"{one.delay_p99_ns / 1e6:.2f} ms",
        f"{_say_bytes(one.running_bytes)} ({_say_bytes(one.running_anonymous_bytes)})",
        f"{_say_bytes(one.judging_bytes)} ({_say_bytes(one.judging_anonymous_bytes)})",
        f"{one.running_disk:,.1f} B",
        f"{one.judging_disk:,.1f} B",
        f"{one.kept_disk:,.1f} B",
        f"{one.verdict_s:.1f} s",
    )


def _say_bytes(count: float) -> str:
    for unit in ("B", "kB"):
        if count < 1_000:
            return f"{count:.0f} {unit}"
        count /= 1_000
    return f"{count:.0f} MB"


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return enter(measure_all, "scale", __doc__, argv, quick_help="shorter runs, up to half a million queries")


def measure_all(*, quick: bool) -> int:
    """Make all runs and report them."""
    nginx, cpus, wanted = need_nginx(), need_cpus(), points(quick=quick)
    results = []
    with PayloadServer(nginx, cpus[:1]) as server:
        for number, point in enumerate(wanted, 1):
            say(f"{number}/{len(wanted)}: {point.name}, about {point.queries / point.rate_qps:.0f} s and its verdict")
            results.append(measure(point, server, cpus[1:]))
    print(f"\n{table(results)}\n")
    if note := shared_core_note(results, cpus[1:]):
        print(note)
    longest = results[-1]
    answered = f"{longest.ok / longest.point.queries:.2%} of them answered"
    print(f"{longest.point.queries:,} queries, {answered}: {'; '.join(longest.problems) or 'all targets are met'}.")
    path = write_result(
        "scale",
        {
            "quick": quick,
            "targets": {
                "resident_bytes": MAX_RESIDENT_BYTES,
                "disk_bytes_a_query": MAX_DISK_BYTES_A_QUERY,
                "verdict_s": MAX_VERDICT_S,
            },
            "row_bytes": ROW_BYTES,
            "worker_cpus": len(cpus[1:]),
            "runs": [asdict(one) | {"problems": one.problems} for one in results],
        },
    )
    draw(charts(results), path.with_suffix(".png"), say)
    print(f"Written to {path}")
    return 1 if longest.problems else 0


if __name__ == "__main__":
    sys.exit(main())
