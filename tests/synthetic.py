"""Made-up runs for tests of everything below the waist: a clean one, and ways to spoil it.

`synthetic_run` is a run as a flawless client would have recorded it; the other functions
return changed copies. Times are ns.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from servebench.profile import parse_profile
from servebench.record.outcome import INTERRUPTED, Outcome
from servebench.record.rundata import RunData

MS = 1_000_000
S = 1_000_000_000


def synthetic_run(
    *,
    queries: int = 4_000,
    target_qps: float = 200.0,
    constraints: Sequence[str] = ("p99 <= 50ms",),
    response_ns: npt.ArrayLike | None = None,
    scheduled_ns: npt.NDArray[np.int64] | None = None,
    arrivals: str = "poisson",
    workers: int = 1,
    seed: int = 1,
    load: Mapping[str, Any] | None = None,
    client: Mapping[str, Any] | None = None,
) -> RunData:
    """A complete, clean run. ``response_ns`` is one latency or one a query (default: about 5 ms), all OK, issued on time."""
    random = np.random.default_rng(seed)
    if scheduled_ns is None:
        gaps = (
            random.exponential(S / target_qps, queries - 1) if arrivals != "constant" else np.full(queries - 1, S / target_qps)
        )
        scheduled_ns = np.concatenate(([0], np.rint(np.cumsum(gaps)))).astype(np.int64)
    queries = len(scheduled_ns)
    if response_ns is None:
        response_ns = 4 * MS + random.exponential(MS, queries)
    response = np.broadcast_to(np.asarray(response_ns, dtype=np.int64), queries)
    delay_ns = np.minimum(random.integers(20_000, 80_000, queries), response // 2)
    profile = parse_profile(
        {
            "name": "synthetic",
            "server": {"url": "http://127.0.0.1:8000"},
            "endpoint": {"model": "echo"},
            "load": {"target_qps": target_qps, "arrivals": arrivals, "min_duration_s": 0, "min_query_count": 1, **(load or {})},
            "client": {"workers": workers, **(client or {})},
            "constraints": list(constraints),
        },
        source="synthetic",
    )
    completed_ns = scheduled_ns + response
    end_ns = int(completed_ns.max(initial=0))
    facts = {
        "schema": "servebench.facts/1",
        "version": "0.1.0",
        "command": ["servebench", "run", "synthetic"],
        "started_at": "2026-01-01T00:00:00+00:00",
        "state": "complete",
        "stop_reason": None,
        "profile": profile.public_dict(),
        "schedule": {
            "arrivals": arrivals,
            "target_qps": target_qps,
            "seed": seed,
            "planned": queries,
            "sha256": schedule_sha256(scheduled_ns),
            "generated_duration_ns": int(scheduled_ns[-1]) + 1,
        },
        "start_ns": 1_000 * S,
        "workers": [
            {
                "worker": worker,
                "rows": len(range(worker, queries, workers)),
                "state": "done",
                "exit": 0,
                "stats": _stats(end_ns),
            }
            for worker in range(workers)
        ],
        "errors": [],
        "output_check": {"kept": 256, "checked": 256, "wrong": 0, "first_wrong": None, "golden": False},
        "clocks": {"start": _clocks(0), "end": _clocks(end_ns)},
        "server": {"url": "http://127.0.0.1:8000"},
        "host_cpu": {"steal_share": 0.0, "client_steal_share": 0.0, "throttled": 0},
    }
    run = RunData(
        facts=facts,
        environment={"python": "3.11"},
        scheduled_ns=scheduled_ns,
        issued_ns=scheduled_ns + delay_ns,
        first_byte_ns=completed_ns,
        completed_ns=completed_ns,
        outcome=np.full(queries, Outcome.OK, dtype=np.uint8),
        sample=np.zeros(queries, dtype=np.int32),
        status=np.full(queries, 200, dtype=np.uint16),
        response_bytes=np.full(queries, 100, dtype=np.uint32),
        worker=(np.arange(queries) % workers).astype(np.uint16),
        connection=np.zeros(queries, dtype=np.uint32),
    )
    return told(run)


def schedule_sha256(scheduled_ns: npt.NDArray[np.int64]) -> str:
    """Digest of a schedule as the facts carry it."""
    return hashlib.sha256(scheduled_ns.astype("<i8").tobytes()).hexdigest()


def with_facts(run: RunData, changes: Mapping[str, Any]) -> RunData:
    """The run with facts changed; keys are dotted paths, list positions as numbers: ``workers.0.stats.cap_waits``."""
    facts = copy.deepcopy(run.facts)
    for path, value in changes.items():
        node: Any = facts
        *parents, last = [int(part) if part.isdigit() else part for part in path.split(".")]
        for part in parents:
            node = node[part]
        node[last] = value
    return replace(run, facts=facts)


def with_outcome(run: RunData, rows: Sequence[int] | slice, outcome: Outcome) -> RunData:
    """The run with some queries ended otherwise; what was shed, or never issued, loses its times.

    Its workers counted them so, and told of them (see `told`).
    """
    columns = {name: getattr(run, name).copy() for name in ("outcome", "issued_ns", "first_byte_ns", "completed_ns")}
    columns["outcome"][rows] = outcome
    if outcome in (Outcome.SHED, Outcome.NOT_ISSUED):
        for name in ("issued_ns", "first_byte_ns", "completed_ns"):
            columns[name][rows] = -1
    elif outcome == Outcome.OUTSTANDING:
        columns["first_byte_ns"][rows] = columns["completed_ns"][rows] = -1
    return told(replace(run, **columns))


def told(run: RunData) -> RunData:
    """The run with the statistics and errors of workers that counted every query as its record says."""
    facts = copy.deepcopy(run.facts)
    for worker in facts.get("workers") or []:
        if worker["stats"] is not None:
            worker["stats"]["counted"] = _counted(run.outcome[run.worker == worker["worker"]])
    described = {error["kind"]: error for error in facts.get("errors") or []}
    facts["errors"] = [
        {
            "kind": outcome.kind,
            "detail": described.get(outcome.kind, {}).get("detail", "as made up"),
            "count": int((run.outcome == outcome).sum()),
            "example": int(np.argmax(run.outcome == outcome)),
        }
        for outcome in Outcome
        if outcome not in (Outcome.OK, Outcome.NOT_ISSUED, Outcome.OUTSTANDING) and (run.outcome == outcome).any()
    ]
    return replace(run, facts=facts)


def interrupted(run: RunData, at_ns: int) -> RunData:
    """The run as one interrupt left it: what was due later was shed, what was out was awaited."""
    run = with_outcome(run, np.flatnonzero(run.scheduled_ns > at_ns).tolist(), Outcome.SHED)
    changes: dict[str, Any] = {f"workers.{number}.stats.stopped_ns": at_ns for number in range(len(run.workers))}
    errors = [
        {**error, "detail": INTERRUPTED} if error["kind"] == Outcome.SHED.kind else error for error in run.facts["errors"]
    ]
    return with_facts(run, changes | {"state": "interrupted", "errors": errors})


def killed(run: RunData, at_ns: int) -> RunData:
    """The run as a kill of its process left it: what was due later was never touched, what had no reply is still out."""
    run = with_outcome(run, np.flatnonzero(run.completed_ns > at_ns).tolist(), Outcome.OUTSTANDING)
    run = with_outcome(run, np.flatnonzero(run.issued_ns > at_ns).tolist(), Outcome.NOT_ISSUED)
    changes: dict[str, Any] = {f"workers.{number}.stats": None for number in range(len(run.workers))}
    changes |= {f"workers.{number}.state": "lost" for number in range(len(run.workers))}
    return with_facts(run, changes | {"state": "running", "errors": None, "output_check": None, "clocks.end": None})


def with_delay(run: RunData, rows: Sequence[int] | slice, delay_ns: npt.ArrayLike) -> RunData:
    """The run with some queries issued that long after they were due; their service time stays."""
    issued_ns = run.issued_ns.copy()
    issued_ns[rows] = run.scheduled_ns[rows] + np.asarray(delay_ns, dtype=np.int64)
    later_ns = issued_ns - run.issued_ns
    return replace(
        run, issued_ns=issued_ns, first_byte_ns=run.first_byte_ns + later_ns, completed_ns=run.completed_ns + later_ns
    )


def with_stall(run: RunData, at_ns: int, duration_ns: int) -> RunData:
    """The run with the event loop of worker 0 standing still: what was due meanwhile left at its end, and it was noticed."""
    held = np.flatnonzero((run.scheduled_ns >= at_ns) & (run.scheduled_ns < at_ns + duration_ns))
    run = with_delay(run, held, at_ns + duration_ns - run.scheduled_ns[held])
    stall = {"at_ns": at_ns, "duration_ns": duration_ns}
    return with_facts(run, {"workers.0.stats.stalls": [stall], "workers.0.stats.stall_count": 1})


def _counted(outcome: npt.NDArray[np.uint8]) -> dict[str, int]:
    begun = int((outcome != Outcome.NOT_ISSUED).sum())
    ok = int(((outcome == Outcome.OK) | (outcome == Outcome.OUTPUT)).sum())
    return {"begun": begun, "ended": begun - int((outcome == Outcome.OUTSTANDING).sum()), "ok": ok}


def _stats(wall_ns: int) -> dict[str, Any]:
    return {
        "cpu_s": 0.5 * wall_ns / S,
        "wall_s": wall_ns / S,
        "connections_opened": 8,
        "connections_peak": 8,
        "connection_waits": 0,
        "cap_waits": 0,
        "cap_wait_ns": 0,
        "stalls": [],
        "stall_count": 0,
        "gc_collections": 0,
        "pacing": "precise",
        "stopped_ns": None,
        "involuntary_switches": 0,
        "voluntary_switches": 0,
    }


def _clocks(elapsed_ns: int) -> dict[str, int]:
    return {
        "monotonic_ns": 1_000 * S + elapsed_ns,
        "realtime_ns": 1_767_225_600 * S + elapsed_ns,
        "boottime_ns": 2_000 * S + elapsed_ns,
    }
