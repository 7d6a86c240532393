"""Judges the measurement itself: VALID, DEGRADED or INVALID, with reasons that name the resource and the remedy.

A verdict on the server is worth no more than the client that measured it. Each rule below is
one function over the run's `Evidence` and answers with at most a few reasons; the worst
severity is the verdict. A rule whose facts are missing (a killed run leaves no statistics)
stays silent, and the rule about the run's state speaks instead. Rules about sending on time
are in `servebench.judge.lateness`.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import numpy as np

from servebench.judge.evidence import Evidence, Reason, Severity
from servebench.judge.lateness import LATE_FLOOR_NS, MORE_CLIENT, lateness_reasons, longest_stalls
from servebench.judge.wording import say_queries, say_share, say_time
from servebench.record.histogram import HIGHEST_TRACKABLE_NS
from servebench.record.outcome import Outcome
from servebench.record.rundata import Array, Run

Trust = Literal["VALID", "DEGRADED", "INVALID"]

#: Wall clock against monotonic clock over the run, as a share of it: LoadGen's warning and error.
DEGRADED_CLOCK_SHARE, INVALID_CLOCK_SHARE = 0.001, 0.01
#: Less than this is the time between reading the two clocks.
CLOCK_FLOOR_NS = 10_000_000
#: Boot time that passed without monotonic time: the host slept. No suspend is shorter.
SUSPEND_FLOOR_NS = 50_000_000
#: CPU time of a worker, as a share of one core, from which on it has no time left to be punctual.
FULL_CORE_SHARE = 0.9
#: Time that others had a worker's CPU, as a share: when 1 % of the queries are late, it explains them.
LOST_CPU_SHARE = 0.01
#: CPU time of the whole host that the hypervisor gave to others, as a share: it slows the server, too.
STEAL_SHARE = 0.05

_RERUN = "run again"
_QUIETER = "measure on a quieter or a dedicated machine"
_OWN_FAULT = "the run directory is damaged or was written by a faulty version; run again"


def judge_trust(evidence: Evidence) -> dict[str, Any]:
    """The ``trust`` of ``run.json``: verdict, reasons (worst first), and the longest event-loop stalls."""
    reasons = [reason for rule in _RULES for reason in rule(evidence)]
    late = any(reason.code in ("lateness", "loop_stall", "achieved_rate") for reason in reasons)
    reasons += _full_core(evidence, late)
    if late:
        reasons += _cpu_wait(evidence)
        reasons = _with_steal_named(evidence, reasons)
    reasons.sort(key=lambda reason: reason.severity != "INVALID")
    verdict: Trust = reasons[0].severity if reasons else "VALID"
    return {
        "verdict": verdict,
        "reasons": [reason.as_dict() for reason in reasons],
        "stall_count": evidence.worker_total("stall_count"),
        "stalls": longest_stalls(evidence.run),
    }


def run_state(facts: dict[str, Any]) -> str:
    """``complete``, ``interrupted`` or ``failed``: a run still ``running`` when it is judged lost its process."""
    state = facts.get("state")
    return state if state in ("complete", "interrupted") else "failed"


def _state(evidence: Evidence) -> list[Reason]:
    facts = evidence.run.facts
    state, why = run_state(facts), facts.get("stop_reason")
    if state == "complete":
        return []
    if facts.get("state") == "running":
        why = "it ended before it closed its books: killed, or its disk was full"
    if state == "interrupted":
        return [Reason(state, "INVALID", "the run was interrupted before its end", _RERUN)]
    return [Reason(state, "INVALID", f"the run failed before its end{f': {why}' if why else ''}", _RERUN)]


def _workers(evidence: Evidence) -> list[Reason]:
    run = evidence.run
    if run.facts.get("state") == "running":
        return []  # nobody was left to say how the workers ended
    workers, wanted = run.workers, evidence.client("workers")
    interrupted = run_state(run.facts) == "interrupted"
    lost = [
        worker for worker in workers if worker.get("state") == "lost" or (worker.get("state") != "done" and not interrupted)
    ]
    reasons = [
        Reason(
            "worker_lost",
            "INVALID",
            f"worker process {worker['worker']} ended before its books were closed{_exit_status(worker)}",
            "look for an out-of-memory kill or a crash, and run again",
        )
        for worker in lost
    ]
    if workers and wanted is not None and len(workers) != wanted:
        text = f"{len(workers)} worker processes of {wanted} left a record"
        reasons.append(Reason("worker_lost", "INVALID", text, _RERUN, len(workers), wanted))
    return reasons


def _exit_status(worker: dict[str, Any]) -> str:
    status = worker.get("exit")
    return "" if status is None else f" (exit status {status})"


def _books(evidence: Evidence) -> list[Reason]:
    run = evidence.run
    problems = []
    planned = run.section("schedule").get("planned")
    if planned is not None and planned != run.planned:
        problems.append(f"{say_queries(planned)} planned, but there are records of {run.planned:,}")
    shares = sum(worker.get("rows") or 0 for worker in run.workers)
    if run.workers and shares != run.planned:
        problems.append(f"the workers' shares add up to {shares:,} of {say_queries(run.planned)}")
    tallies = {int(worker["worker"]): np.zeros(256, dtype=np.int64) for worker in run.workers}
    open_ended = contradictions = 0
    for numbers, *rows in run.chunks("worker", "outcome", "scheduled_ns", "issued_ns", "first_byte_ns", "completed_ns"):
        for number in tallies:
            tallies[number] += np.bincount(rows[0][numbers == number], minlength=256)
        open_ended += int(np.count_nonzero(rows[0] <= Outcome.OUTSTANDING))
        contradictions += int(np.count_nonzero(_contradictory(*rows)))
    problems += _miscounted(run, tallies) + _mistold(run, sum(tallies.values(), start=np.zeros(256, dtype=np.int64)))
    if open_ended and run_state(run.facts) != "failed" and _all_done(run):
        problems.append(f"{say_queries(open_ended)} without an end, although the run has one")
    if contradictions:
        problems.append(f"{say_queries(contradictions)} with times that contradict their outcome or each other")
    return [Reason("books", "INVALID", f"the books do not balance: {problem}", _OWN_FAULT) for problem in problems]


def _miscounted(run: Run, tallies: dict[int, Array]) -> list[str]:
    """Where what a worker counted as it went differs from the rows that it left."""
    problems = []
    for worker in run.workers:
        counted, tally = (worker.get("stats") or {}).get("counted"), tallies[int(worker["worker"])]
        if counted is None:
            continue
        begun = int(tally.sum() - tally[Outcome.NOT_ISSUED])
        recorded = {
            "begun": begun,  # issued or shed
            "ended": begun - int(tally[Outcome.OUTSTANDING]),
            "ok": int(tally[Outcome.OK] + tally[Outcome.OUTPUT]),  # wrong outputs are found after the run
        }
        problems += [
            f"worker {worker['worker']} counted {say_queries(counted[name])} {name}, and has records of {recorded[name]:,}"
            for name in recorded
            if counted[name] != recorded[name]
        ]
    return problems


def _mistold(run: Run, tally: Array) -> list[str]:
    """Where the failures that the workers told of are not those in their rows; a worker that was lost told of none."""
    if run.facts.get("errors") is None or not run.workers:
        return []
    told = Counter[str]()
    for error in run.facts["errors"]:
        told[error["kind"]] += error["count"]
    recorded = {outcome.kind: int(tally[outcome]) for outcome in Outcome if outcome > Outcome.OUTSTANDING}
    del recorded[Outcome.OK.kind]
    return [
        f"{say_queries(told[kind])} told of as {kind}, but there are records of {recorded.get(kind, 0):,}"
        for kind in sorted({*told, *recorded})
        if told[kind] > recorded.get(kind, 0) or (told[kind] != recorded.get(kind, 0) and _all_done(run))
    ]


def _all_done(run: Run) -> bool:
    return all(worker.get("state") == "done" for worker in run.workers)


def _contradictory(outcome: Array, scheduled_ns: Array, issued_ns: Array, first_byte_ns: Array, completed_ns: Array) -> Array:
    ok, sent = outcome == Outcome.OK, issued_ns >= 0
    disordered = (first_byte_ns < issued_ns) | (completed_ns < first_byte_ns)
    early = sent & (issued_ns < scheduled_ns - LATE_FLOOR_NS)
    never_sent = (outcome == Outcome.SHED) | (outcome == Outcome.NOT_ISSUED)
    # Where no connection could be opened, there was nothing to send on.
    unconnected = (outcome == Outcome.CONNECT) | (outcome == Outcome.CLIENT)
    unheard_of = outcome > max(Outcome)
    contradictory: Array = (ok & disordered) | early | (sent & never_sent) | ~(sent | never_sent | unconnected) | unheard_of
    return contradictory


def _schedule_hash(evidence: Evidence) -> list[Reason]:
    claimed = evidence.run.section("schedule").get("sha256")
    if claimed is None:
        return []
    digest = hashlib.sha256()
    for (scheduled_ns,) in evidence.run.chunks("scheduled_ns"):
        digest.update(np.ascontiguousarray(scheduled_ns, dtype="<i8").data)
    found = digest.hexdigest()
    if found == claimed:
        return []
    text = f"the schedule's hash is {found[:12]}..., not {claimed[:12]}... as planned"
    return [Reason("schedule_hash", "INVALID", text, _OWN_FAULT)]


def _arrival_process(evidence: Evidence) -> list[Reason]:
    checks, name = evidence.arrivals, evidence.run.section("schedule").get("arrivals")
    reasons = [
        Reason("arrivals", "INVALID", f"the planned arrivals are not {name!r}: {problem}", _OWN_FAULT)
        for problem in checks.problems
    ]
    opening_waits = evidence.worker_total("connection_waits") - sum(
        evidence.worker_total(name) for name in ("cap_waits", "stream_waits")
    )
    displaced = (checks.issued_ks_distance or 0) * evidence.summary.delay.known_count
    if displaced > opening_waits:  # fewer can be put down to a server that was slow to accept; see `lateness`
        reasons += [
            Reason(
                "arrivals",
                "INVALID",
                problem,
                "give the client more cores or client.workers, or lower the rate",
                checks.issued_ks_distance,
            )
            for problem in checks.issue_problems
        ]
    return reasons


def _shed(evidence: Evidence) -> list[Reason]:
    counts, cap = evidence.summary.counts, evidence.client("max_outstanding")
    if not counts.shed or run_state(evidence.run.facts) != "complete":
        return []
    share = counts.shed / counts.planned
    errors = [error for error in evidence.run.facts.get("errors") or [] if error.get("kind") == Outcome.SHED.kind]
    why = ", ".join(f"{error['count']:,} x {error['detail']}" for error in errors) or "no reason was recorded"
    if cap is not None:
        why += f" (client.max_outstanding = {cap} a worker)"
    never = f"{counts.shed:,} of {say_queries(counts.planned)} ({say_share(share)}) were never sent"
    text = f"{never}: {why}; they count as over every bound"
    remedy = "raise client.max_outstanding, leave it out, or lower the rate" if cap is not None else "lower the rate"
    return [Reason("shed", "DEGRADED", text, remedy, share, 0)]


def _own_host(evidence: Evidence) -> list[Reason]:
    count = sum(int(np.count_nonzero(outcome == Outcome.CLIENT)) for (outcome,) in evidence.run.chunks("outcome"))
    if not count:
        return []
    errors = evidence.run.facts.get("errors") or []
    detail = next((f" ({error['detail']})" for error in errors if error.get("kind") == Outcome.CLIENT.kind), "")
    text = f"{say_queries(count)} failed because this host ran out of file descriptors, ports or memory{detail}"
    return [
        Reason(
            "own_host", "INVALID", text, "raise ulimit -n or widen net.ipv4.ip_local_port_range, or lower the rate", count, 0
        )
    ]


def _histogram_overflow(evidence: Evidence) -> list[Reason]:
    response = evidence.summary.response
    count = response.over(HIGHEST_TRACKABLE_NS) - response.infinite_count
    if not count:
        return []
    text = f"{count:,} response times are over {say_time(HIGHEST_TRACKABLE_NS)}, where latency.hgrm and latency.hlog end"
    return [Reason("histogram_overflow", "DEGRADED", text, "read percentiles from run.json, which has them exactly", count, 0)]


def _clocks(evidence: Evidence) -> list[Reason]:
    clocks = evidence.run.section("clocks")
    start, end = clocks.get("start"), clocks.get("end")
    if not start or not end:
        return []
    elapsed = {
        name: end[name] - start[name]
        for name in ("monotonic_ns", "realtime_ns", "boottime_ns")
        if name in start and name in end
    }
    monotonic_ns = elapsed["monotonic_ns"]
    reasons = []
    slept_ns = elapsed.get("boottime_ns", monotonic_ns) - monotonic_ns
    if slept_ns > SUSPEND_FLOOR_NS:
        text = f"the host was suspended for {say_time(slept_ns)} during the run"
        reasons.append(Reason("suspend", "INVALID", text, "keep the host awake, and run again", slept_ns, SUSPEND_FLOOR_NS))
    step_ns = abs(elapsed.get("realtime_ns", monotonic_ns) - monotonic_ns - slept_ns)
    share = step_ns / max(monotonic_ns, 1)
    if step_ns > CLOCK_FLOOR_NS and share > DEGRADED_CLOCK_SHARE:
        severity: Severity = "INVALID" if share > INVALID_CLOCK_SHARE else "DEGRADED"
        bound = INVALID_CLOCK_SHARE if severity == "INVALID" else DEGRADED_CLOCK_SHARE
        text = (
            f"the wall clock and the monotonic clock drifted apart by {say_time(step_ns)} ({say_share(share)}) during the run"
        )
        reasons.append(
            Reason("clock_step", severity, text, "let the host's time settle (ntp, a restored machine)", share, bound)
        )
    return reasons


def _output_check(evidence: Evidence) -> list[Reason]:
    run = evidence.run
    check, asked = run.section("output_check"), (run.section("profile").get("output_check") or {}).get("replies") or 0
    wrong, checked = check.get("wrong") or 0, check.get("checked") or 0
    if wrong:
        first = check.get("first_wrong") or {}
        example = f"; query {first.get('query')}: {first.get('detail')}" if first else ""
        text = f"{wrong:,} of {checked:,} checked replies are wrong{example}"
        remedy = "mend the model or the server before measuring its speed"
        return [Reason("output_check", "INVALID", text, remedy, wrong, 0)]
    if asked and not checked and evidence.summary.counts.ok:
        text = f"no reply was checked, although {evidence.summary.counts.ok:,} were received"
        return [
            Reason(
                "output_check",
                "DEGRADED",
                text,
                "make room on the disk if it was full, and run again; fast replies may be empty ones",
                0,
                min(asked, evidence.summary.counts.ok),
            )
        ]
    return []


def _host_cpu(evidence: Evidence) -> list[Reason]:
    host = evidence.run.section("host_cpu")
    reasons = []
    steal, throttled = host.get("steal_share") or 0.0, host.get("throttled") or 0
    if steal > STEAL_SHARE:
        text = f"the hypervisor gave {say_share(steal)} of this machine's CPU time to others"
        reasons.append(Reason("cpu_steal", "DEGRADED", text, _QUIETER, steal, STEAL_SHARE))
    if throttled:
        text = f"this container was throttled {throttled:,} times for using up its CPU quota"
        reasons.append(Reason("cpu_throttled", "DEGRADED", text, "raise the container's CPU limit", throttled, 0))
    return reasons


def _full_core(evidence: Evidence, late: bool) -> list[Reason]:
    """A worker that used up its core; ``precise`` pacing spins by design, so there only lateness tells."""
    reasons = []
    for worker in evidence.run.workers:
        stats = worker.get("stats") or {}
        share = (stats.get("cpu_s") or 0) / (stats.get("wall_s") or 1)
        if share > FULL_CORE_SHARE and (late or stats.get("pacing") == "eco"):
            text = f"worker {worker['worker']} used {say_share(share)} of a core, so it had no time left to be punctual"
            reasons.append(
                Reason("worker_cpu", "DEGRADED", text, "use more client.workers or a lower rate", share, FULL_CORE_SHARE)
            )
    return reasons


def _cpu_wait(evidence: Evidence) -> list[Reason]:
    """Why a worker was late: other processes ran on its CPU."""
    reasons = []
    for worker in evidence.run.workers:
        stats = worker.get("stats") or {}
        share = (stats.get("cpu_wait_s") or 0) / (stats.get("wall_s") or 1)
        if share > LOST_CPU_SHARE:
            text = f"worker {worker['worker']} was ready to run for {say_share(share)} of the time while others had its CPU"
            remedy = "keep the server and all else off the client's CPUs (client.apart, client.cpus)"
            reasons.append(Reason("cpu_wait", "DEGRADED", text, remedy, share, LOST_CPU_SHARE))
    return reasons


def _with_steal_named(evidence: Evidence, reasons: list[Reason]) -> list[Reason]:
    """``reasons`` of a late client, where the hypervisor had its CPUs: more of them would be stolen as well."""
    share = evidence.run.section("host_cpu").get("client_steal_share") or 0.0
    if share <= LOST_CPU_SHARE:
        return reasons
    if not any(reason.code in ("worker_cpu", "cpu_wait") for reason in reasons):
        reasons = [replace(reason, remedy=_QUIETER) if reason.remedy == MORE_CLIENT else reason for reason in reasons]
    text = f"the hypervisor gave {say_share(share)} of the client's CPU time to others"
    steal = Reason("cpu_steal", "DEGRADED", text, _QUIETER, share, LOST_CPU_SHARE)
    return [*(reason for reason in reasons if reason.code != steal.code), steal]


_RULES: tuple[Callable[[Evidence], list[Reason]], ...] = (
    _state,
    _workers,
    _books,
    _schedule_hash,
    _arrival_process,
    lateness_reasons,
    _shed,
    _own_host,
    _histogram_overflow,
    _clocks,
    _output_check,
    _host_cpu,
)
