"""Rules about sending on time: an open loop that sends late, or less than planned, measures itself.

Every query's issue delay is in its response time, so a late client makes a server look worse
than it is. Whether that matters is judged against each promise: one that 1 % of the queries
may be over 50 ms is judged wrongly when the client uses up that 1 % itself. Arrivals fall
into a stalled loop's pauses as often as replies do, so the share of late queries also stands
for the replies that were stamped late.

Three parties hold queries back, and each is named: the event loop (no CPU, a pause), the
cap ``client.max_connections`` (over gRPC the server's limit of streams), and connections
being opened on demand, which is in part the server's time and therefore never invalidates a
run. Queries carry no such mark; a worker counts its waits, so of its late queries at most
that many are put down to them.
"""

from __future__ import annotations

from dataclasses import astuple, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from servebench.judge.evidence import Evidence, LatencyPromise, Reason, Severity
from servebench.judge.wording import say_queries, say_rate, say_share, say_time
from servebench.record.outcome import Outcome
from servebench.record.rundata import Run

#: A query is late when issued this part of the bound after it was due ...
LATE_PART_OF_BOUND = 0.1
#: ... but not before this: less is what timers and schedulers do on any machine.
LATE_FLOOR_NS = 1_000_000
#: Late queries as a part of a promise's budget. Lateness adds to response times, so it can make a server fail but not pass;
#: beyond the whole budget, though, the arrivals are not those that were planned.
LATE_PARTS_OF_BUDGET: dict[Severity, float] = {"INVALID": 1.0, "DEGRADED": 0.25}
#: Queries that only the client's lateness put over the bound: these decide a verdict, so a quarter of the budget is too much.
DECISIVE_PART_OF_BUDGET = 0.25
#: This many late queries are an accident, whatever the share.
ACCIDENTS = 1
#: More late queries than this share is DEGRADED whatever was promised, when late against their own service time ...
DEGRADED_LATE_SHARE = 0.01
#: ... that is, by this part of the median service time.
LATE_PART_OF_SERVICE = 0.1
#: A pause or delay of a whole bound invalidates a run with a promise about the tail: a budget no larger than this.
TAIL_BUDGET = 0.1
#: Queries that waited under the connection cap, as a share, beyond which the loop is not open any more.
INVALID_CAP_SHARE = 0.01
#: Issued within the schedule, as a share of what was due.
INVALID_ACHIEVED = 0.98
DEGRADED_ACHIEVED = 0.995
#: Issued this long after the last query was due still counts as within the schedule: short runs end on a late query.
ACHIEVED_GRACE_NS = 10_000_000

#: What helps a client whose event loop was late, if it could have had its CPUs.
MORE_CLIENT = "give the client cores of its own (client.cpus), use more client.workers or a lower rate"
_MORE_CONNECTIONS = "raise client.max_connections, or leave it out"
_MORE_CHANNELS = "raise client.channels, or the server's limit of concurrent streams"
_WARMER = "open more connections ahead with client.warm_connections"


@dataclass(frozen=True, slots=True)
class Blame:
    """Queries held back, by whom."""

    loop: int
    cap: int
    opening: int


class Lateness:
    """How many queries each worker issued late, by every measure that the rules ask for: one pass over the records."""

    def __init__(self, evidence: Evidence) -> None:
        run = evidence.run
        workers = {int(worker["worker"]): worker.get("stats") or {} for worker in run.workers}
        highest = max((int(numbers.max()) for (numbers,) in run.chunks("worker")), default=0)
        size = max([*workers, highest]) + 1
        self._cap_waits, self._opening_waits = np.zeros(size, dtype=np.int64), np.zeros(size, dtype=np.int64)
        for number, stats in workers.items():
            self._cap_waits[number] = int(stats.get("cap_waits") or 0) + int(stats.get("stream_waits") or 0)
            self._opening_waits[number] = max(int(stats.get("connection_waits") or 0) - self._cap_waits[number], 0)

        promises = evidence.promises
        limits_ns = {_late_ns(promise.bound_ns) for promise in promises}
        limits_ns |= {promise.bound_ns - 1 for promise in promises} | {_late_against_service_ns(evidence)}
        self._later = {limit_ns: np.zeros(size, dtype=np.int64) for limit_ns in limits_ns}
        self._decisive = {promise.bound_ns: np.zeros(size, dtype=np.int64) for promise in promises}
        self._due_too_late = np.zeros(size, dtype=np.int64)
        #: The longest issue delay, 0 when none was late.
        self.worst_ns = 0
        #: The schedule of what was due (see `_achieved_rate`): how long it took, how many queries, how many within that time.
        self.window_ns, self.due, self.achieved = _window_ns(evidence), 0, 0
        shed_is_due = _shed_is_due(evidence)

        columns = ("outcome", "worker", "scheduled_ns", "issued_ns", "completed_ns")
        for outcome, worker, scheduled_ns, issued_ns, completed_ns in run.chunks(*columns):
            issued = issued_ns >= 0
            delay_ns = np.where(issued, issued_ns - scheduled_ns, 0)
            self.worst_ns = max(self.worst_ns, int(delay_ns.max()))
            for limit_ns in limits_ns:
                self._later[limit_ns] += np.bincount(worker[delay_ns > limit_ns], minlength=size)
            ok = issued & (outcome == Outcome.OK)
            response_ns, service_ns = completed_ns - scheduled_ns, completed_ns - issued_ns
            for bound_ns in self._decisive:
                decisive = ok & (response_ns > bound_ns) & (service_ns <= bound_ns)
                self._decisive[bound_ns] += np.bincount(worker[decisive], minlength=size)
            due = issued | (outcome == Outcome.SHED) if shed_is_due else issued
            in_time = issued & (issued_ns <= self.window_ns + ACHIEVED_GRACE_NS)
            self.due += int(np.count_nonzero(due))
            self.achieved += int(np.count_nonzero(in_time))
            self._due_too_late += np.bincount(worker[due & ~in_time], minlength=size)

    def later_than(self, limit_ns: int) -> Blame:
        """Who held back the queries that were issued more than ``limit_ns`` after they were due."""
        return self._blame(self._later[limit_ns])

    def decisive(self, bound_ns: int) -> Blame:
        """Who held back the queries with a reply whose response time is over the bound and whose service time is not."""
        return self._blame(self._decisive[bound_ns])

    def due_too_late(self) -> Blame:
        """Who held back what was due and not issued within the schedule."""
        return self._blame(self._due_too_late)

    def _blame(self, by_worker: npt.NDArray[np.int64]) -> Blame:
        cap = np.minimum(by_worker, self._cap_waits)
        opening = np.minimum(by_worker - cap, self._opening_waits)
        return Blame(int((by_worker - cap - opening).sum()), int(cap.sum()), int(opening.sum()))


def lateness_reasons(evidence: Evidence) -> list[Reason]:
    """All rules of this module, one reason a code."""
    lateness = Lateness(evidence)
    found = [
        *_stalls(evidence),
        *_delays_of_a_bound(evidence, lateness),
        *_late_shares(evidence, lateness),
        *_late_against_service(evidence, lateness),
        *_cap_waits(evidence),
        *_achieved_rate(evidence, lateness),
    ]
    worst: dict[str, Reason] = {}
    for reason in found:
        if reason.code not in worst or (reason.severity == "INVALID" and worst[reason.code].severity == "DEGRADED"):
            worst[reason.code] = reason
    return list(worst.values())


def longest_stalls(run: Run) -> list[dict[str, Any]]:
    """The workers' event-loop stalls during the run, longest first, at most 20: worker, at_ns, duration_ns."""
    stalls = [
        {"worker": worker["worker"], "at_ns": int(stall["at_ns"]), "duration_ns": int(stall["duration_ns"])}
        for worker in run.workers
        for stall in (worker.get("stats") or {}).get("stalls") or []
        if stall["at_ns"] + stall["duration_ns"] > 0  # those before t=0 held nothing back
    ]
    return sorted(stalls, key=lambda stall: -stall["duration_ns"])[:20]


def _tail_promise(evidence: Evidence) -> LatencyPromise | None:
    """The tightest promise about the tail, which a pause of its bound can break; where there is none, the tightest of all."""
    promises = evidence.promises
    return next((promise for promise in promises if promise.budget <= TAIL_BUDGET), promises[0] if promises else None)


def _stalls(evidence: Evidence) -> list[Reason]:
    promise, stalls = _tail_promise(evidence), longest_stalls(evidence.run)
    if promise is None or not stalls or stalls[0]["duration_ns"] < promise.bound_ns:
        return []
    longest = stalls[0]
    text = (
        f"the event loop of worker {longest['worker']} stood still for {say_time(longest['duration_ns'])} "
        f"at {say_time(longest['at_ns'])}, no less than the bound of {promise.text!r}"
    )
    return [Reason("loop_stall", "INVALID", text, MORE_CLIENT, longest["duration_ns"], promise.bound_ns)]


def _delays_of_a_bound(evidence: Evidence, lateness: Lateness) -> list[Reason]:
    promise = _tail_promise(evidence)
    if promise is None:
        return []
    blame = lateness.later_than(promise.bound_ns - 1)
    late, worst_ns = sum(astuple(blame)), lateness.worst_ns
    text = f"{say_queries(late)} issued up to {say_time(worst_ns)} late, no less than the bound of {promise.text!r}"
    return _charge(blame, 0, "INVALID", text, worst_ns, promise.bound_ns)


def _late_shares(evidence: Evidence, lateness: Lateness) -> list[Reason]:
    reasons: list[Reason] = []
    issued = evidence.summary.delay.known_count
    for promise in evidence.promises:
        if not promise.budget:
            continue
        late_ns = _late_ns(promise.bound_ns)
        blame = lateness.later_than(late_ns)
        late = sum(astuple(blame))
        text = (
            f"{late:,} of {say_queries(issued)} ({say_share(late / max(issued, 1))}) were issued over {say_time(late_ns)} "
            f"late, where {promise.text!r} lets {say_share(promise.budget)} of them be over the bound"
        )
        for severity, part in LATE_PARTS_OF_BUDGET.items():
            if late > ACCIDENTS:
                share = part * promise.budget
                reasons += _charge(blame, share * issued, severity, text, late / issued, share)
        decisive = lateness.decisive(promise.bound_ns)
        count = sum(astuple(decisive))
        if count > ACCIDENTS:
            share = DECISIVE_PART_OF_BUDGET * promise.budget
            text = (
                f"{count:,} of {say_queries(issued)} are over the bound of {promise.text!r} only because they were issued late"
            )
            reasons += _charge(decisive, share * issued, "INVALID", text, count / issued, share)
    return reasons


def _late_ns(bound_ns: int) -> int:
    return max(LATE_FLOOR_NS, int(bound_ns * LATE_PART_OF_BOUND))


def _late_against_service_ns(evidence: Evidence) -> int:
    return max(LATE_FLOOR_NS, int((evidence.summary.service.percentile(50) or 0) * LATE_PART_OF_SERVICE))


def _late_against_service(evidence: Evidence, lateness: Lateness) -> list[Reason]:
    median_ns, issued = evidence.summary.service.percentile(50), evidence.summary.delay.known_count
    late_ns = _late_against_service_ns(evidence)
    blame = lateness.later_than(late_ns)
    late = sum(astuple(blame))
    if late <= ACCIDENTS:
        return []
    text = f"{late:,} of {say_queries(issued)} ({say_share(late / issued)}) were issued over {say_time(late_ns)} late"
    if median_ns is not None:
        text += f", where the median service time is {say_time(median_ns)}"
    return _charge(blame, DEGRADED_LATE_SHARE * issued, "DEGRADED", text, late / issued, DEGRADED_LATE_SHARE)


def _charge(blame: Blame, allowed: float, severity: Severity, text: str, measured: float, bound: float) -> list[Reason]:
    """The finding under the name of whoever held back more queries than allowed; opening connections only degrades."""
    if blame.loop + blame.cap > allowed:
        if blame.cap > blame.loop:
            text += f": {blame.cap:,} of them waited under client.max_connections"
            return [Reason("connection_cap", severity, text, _MORE_CONNECTIONS, measured, bound)]
        return [Reason("lateness", severity, f"{text}: the client's event loop was late", MORE_CLIENT, measured, bound)]
    if blame.opening > allowed:
        text += f": {blame.opening:,} of them waited for a connection to open"
        return [Reason("connection_opening", "DEGRADED", text, _WARMER, measured, bound)]
    return []


def _cap_waits(evidence: Evidence) -> list[Reason]:
    """Queries that waited for a place: under our own cap on connections, or under the server's limit of streams."""
    reasons = []
    for prefix, code, place, remedy in (
        (
            "cap",
            "connection_cap",
            f"one of client.max_connections = {evidence.client('max_connections')} connections a worker",
            _MORE_CONNECTIONS,
        ),
        (
            "stream",
            "stream_limit",
            f"a stream, as many as the server allows being open on each of client.channels = {evidence.client('channels')}",
            _MORE_CHANNELS,
        ),
    ):
        waits, issued = evidence.worker_total(f"{prefix}_waits"), max(evidence.summary.counts.issued, 1)
        if not waits:
            continue
        share = waits / issued
        mean_ns = evidence.worker_total(f"{prefix}_wait_ns") / waits
        text = f"{say_queries(waits)} ({say_share(share)}) waited for {place}, for {say_time(mean_ns)} on average"
        if share > INVALID_CAP_SHARE:
            text += ": the loop was not open any more"
            reasons.append(Reason(code, "INVALID", text, remedy, share, INVALID_CAP_SHARE))
        else:
            reasons.append(Reason(code, "DEGRADED", text, remedy, share, 0))
    return reasons


def _achieved_rate(evidence: Evidence, lateness: Lateness) -> list[Reason]:
    """What was issued within the schedule, of all that could have been.

    Not counted as due: what no connection could be opened for (an error, not a delay), what
    ``client.max_outstanding`` shed on purpose, and what an interruption left.
    """
    window_ns, planned, achieved = lateness.window_ns, lateness.due, lateness.achieved
    if not window_ns or achieved >= DEGRADED_ACHIEVED * planned:
        return []
    seconds, share = window_ns / 1e9, achieved / planned
    severity: Severity = "INVALID" if share < INVALID_ACHIEVED else "DEGRADED"
    blame = lateness.due_too_late()
    text = (
        f"the client could issue only {say_rate(achieved / seconds)} of {say_rate(planned / seconds)} "
        f"in the {say_time(window_ns)} of the schedule"
    )
    remedy = "use more client.workers or a lower rate"
    if blame.opening > blame.loop + blame.cap:
        severity, text, remedy = "DEGRADED", f"{text}: connections were too slow to open", _WARMER
    elif blame.cap > blame.loop:
        text, remedy = f"{text} under client.max_connections = {evidence.client('max_connections')}", _MORE_CONNECTIONS
    return [
        Reason("achieved_rate", severity, text, remedy, share, INVALID_ACHIEVED if severity == "INVALID" else DEGRADED_ACHIEVED)
    ]


def _shed_is_due(evidence: Evidence) -> bool:
    return evidence.run.facts.get("state") == "complete" and evidence.client("max_outstanding") is None


def _window_ns(evidence: Evidence) -> int:
    """When the last of what was due was due."""
    summary = evidence.summary
    return max(summary.last_due_ns or 0, (summary.last_shed_ns or 0) if _shed_is_due(evidence) else 0)
