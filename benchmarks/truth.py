"""Truth: how far the latencies that load generators report are from what their queries went through.

``python -m benchmarks.truth`` takes seven minutes, ``--quick`` one. The stub is a single server of constant
service time, so what a query must wait can be computed (see `benchmarks.truths`). servebench and its peers take
turns at the same loads on the same core until the time is spent; the tables give the median error of each percentile,
and the smallest and largest beside it. A turn was disturbed if the stub's own stamps show that it was late, or if the bare
socket was, by which the truth is told. Where only some turns were, a second line counts the others alone, and the target
is held against that line.

Exit codes: 0 the target is met, 1 it is not or a run of servebench's failed, 2 the machine lacks a second CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial

import numpy as np

from benchmarks.arrivals_seen import Stub, fetch_stamps, forget_stamps, path_added_ns, queue_stubs
from benchmarks.contestants import Contestant, Outcome, Own, contestants
from benchmarks.entry import enter, need_cpus, say
from benchmarks.freezer import AFTER_S, Freezer
from benchmarks.peers.base import PeerProtocol
from benchmarks.plots import draw
from benchmarks.queue_theory import Freeze, Int64s, relative_to
from benchmarks.report import QUICK_SLACK, write_result
from benchmarks.truth_report import asked_line, chart, summarize, table, target, turn_line
from benchmarks.truths import (
    PERCENTILES,
    Condition,
    Found,
    Percentiles,
    asked_truth,
    relative_errors,
    schedule_truth,
    seen_truth,
    stub_lateness_ns,
)
from benchmarks.turns import Turn, take_turns
from servebench.errors import RunError
from servebench.report.console import format_duration

SERVICE_MS = 2.0
TARGET_LOAD = 0.7
LOADS = (TARGET_LOAD, 0.5, 0.9)
LOAD_S = 6.0
FROZEN_LOAD = TARGET_LOAD
FREEZE_S = 1.0
#: A second's backlog at 70 % load takes 2.3 s to be worked off, and fewer than half of the queries must feel it: else
#: the median lies where latencies fall from a second to nothing, and says nothing.
FROZEN_S = 8.0
QUICK_LOAD_S = 4.0
ROUNDS = 3
#: No turn begins that would end later than this after the start.
TIME_S = 420.0
QUICK_TIME_S = 45.0


def conditions(*, quick: bool) -> list[Condition]:
    """The conditions, the most telling ones first. When a freeze begins depends on the contestant: see `measure`."""
    service_ns = round(SERVICE_MS * 1e6)
    load_s = QUICK_LOAD_S if quick else LOAD_S
    begin_ns = round(AFTER_S * 1e9)
    freeze = Freeze(begin_ns, begin_ns + round(FREEZE_S * 1e9))
    frozen = Condition(f"{FREEZE_S:g} s freeze at {FROZEN_LOAD:.0%} load", FROZEN_LOAD, service_ns, FROZEN_S, freeze)
    loaded = [Condition(f"{load:.0%} load", load, service_ns, load_s) for load in LOADS]
    return [loaded[0], frozen, *([] if quick else loaded[1:])]


def plan(found: Sequence[Contestant], of: Sequence[Condition], rounds: int) -> Iterator[tuple[int, Condition, Contestant]]:
    """The turns, the most telling ones first, contestants interleaved.

    Only Poisson arrivals make a load whose waits theory knows; a freeze is for everybody, once. Those who speak OpenAI's API
    alone take several turns' time to start: they have one turn at each load, as every peer has at the last ones.
    """
    first, frozen, *others = of
    poisson = [contestant for contestant in found if contestant.arrivals == "poisson"]
    swift = [contestant for contestant in poisson if contestant.protocol != "openai"]
    for number in range(rounds):
        yield from ((number, first, contestant) for contestant in (swift if number else poisson))
    yield from ((0, frozen, contestant) for contestant in found)
    for number in range(rounds):
        for condition in others:
            yield from ((number, condition, contestant) for contestant in poisson if not number or isinstance(contestant, Own))


def measure(
    contestant: Contestant, condition: Condition, *, added_ns: Int64s, stub: Stub, cpus: Sequence[int], seed: int
) -> Found:
    """Let one contestant run, and work out what it should have reported. `ServebenchError` when it fails."""
    forget_stamps(stub)

    def send() -> Outcome:
        return contestant.send(stub, rate_qps=condition.rate_qps, duration_s=condition.duration_s, cpus=cpus, seed=seed)

    frozen: Freeze | None = None
    if condition.freeze is None:
        outcome = send()
        stamps = fetch_stamps(stub)
    else:
        with Freezer(stub, FREEZE_S) as freezer:
            outcome = send()
        frozen, stamps = freezer.freeze, fetch_stamps(stub)
        if frozen is None:
            raise RunError(f"{contestant.name} ended before the freeze was over")
        condition = replace(condition, freeze=relative_to(frozen, int(stamps["arrival_ns"][0])))
    asked = asked_truth(condition, added_ns)
    true_ns: dict[str, Percentiles | None] = {
        "schedule": _own_truth(outcome, condition, added_ns, frozen),
        "seen": None if frozen else seen_truth(stamps, outcome.completed, added_ns),
        "asked": asked.true_ns,
    }
    late_p99_ns, late_max_ns = stub_lateness_ns(stamps, frozen)
    known = {name: truth for name, truth in true_ns.items() if truth is not None}
    reported_ns = {of: float(value) for of, value in (outcome.percentiles or {}).items() if of in PERCENTILES}
    return Found(
        contestant=contestant.name,
        condition=condition.name,
        completed=outcome.completed,
        not_ok=outcome.not_ok,
        cpu_share=outcome.cpu_share,
        stub_late_p99_ns=late_p99_ns,
        stub_late_max_ns=late_max_ns,
        added_scatter_ns=round(np.subtract(*np.percentile(added_ns, (99, 50)))),
        reported_ns=reported_ns,
        true_ns=known,
        errors={name: relative_errors(reported_ns, truth) for name, truth in known.items()},
        honest={} if frozen else {of: asked.low_ns[of] <= value <= asked.high_ns[of] for of, value in reported_ns.items()},
    )


def _own_truth(outcome: Outcome, condition: Condition, added_ns: Int64s, freeze: Freeze | None) -> Percentiles | None:
    if outcome.own is None:
        return None
    data = outcome.own.data
    frozen = None if freeze is None else relative_to(freeze, int(data.facts["start_ns"]))
    return schedule_truth(data.scheduled_ns, condition.service_ns, added_ns, frozen)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return enter(measure_all, "truth", __doc__, argv, quick_help="one round of shorter runs at one load")


def measure_all(*, quick: bool) -> int:
    """Take the turns and report them."""
    cpus = need_cpus()
    turns, added_ns = _measure(contestants(say, quick=quick), cpus, quick=quick)
    measured = [of for of in conditions(quick=quick) if of.name in added_ns]
    rows = {of.name: summarize([turn for turn in turns if turn.condition == of.name]) for of in measured}
    asked = {of.name: asked_truth(of, np.concatenate(added_ns[of.name])) for of in measured}
    for condition in measured:
        if of := rows[condition.name]:
            print(f"\n{condition.name}, {condition.rate_qps:g}/s, {condition.duration_s:g} s a turn:\n{table(of)}")
            print(asked_line(condition, asked[condition.name]))
    met, sentence = target(rows[f"{TARGET_LOAD:.0%} load"], slack=QUICK_SLACK if quick else 1)
    path = write_result(
        "truth",
        {
            "quick": quick,
            "service_ms": SERVICE_MS,
            "added_ns": {
                name: [dict(zip(("p50", "p99"), np.percentile(of, (50, 99)).tolist(), strict=True)) for of in rounds]
                for name, rounds in added_ns.items()
            },
            "asked": {name: asdict(of) for name, of in asked.items()},
            "summary": {name: [asdict(row) for row in of] for name, of in rows.items()},
            "turns": [asdict(turn) for turn in turns],
        },
        version=2,
    )
    draw([chart(rows)], path.with_suffix(".png"), say)
    print(f"\n{sentence}\nWritten to {path}")
    return 0 if met else 1


def _measure(found: Sequence[Contestant], cpus: Sequence[int], *, quick: bool) -> tuple[list[Found], dict[str, list[Int64s]]]:
    """All turns that there is time for, and what a bare socket added before each round of each condition.

    `ServebenchError` when one of ours fails.
    """
    added_ns: dict[str, list[Int64s]] = {}

    def in_rounds(stubs: dict[PeerProtocol, Stub]) -> Iterator[Turn[Found]]:
        for number, condition, contestant in plan(found, conditions(quick=quick), 1 if quick else ROUNDS):
            measured = added_ns.setdefault(condition.name, [])
            if len(measured) <= number:
                measured.append(path_added_ns(stubs["kserve-http"], cpus[-1:], condition.rate_qps))
                p50, p99 = (format_duration(value) for value in np.percentile(measured[-1], (50, 99)))
                say(f"{condition.name}, round {number + 1}: a bare socket adds {p50} (p50), {p99} (p99) to the stub's time.")
            stub = stubs[contestant.protocol]
            take = partial(measure, contestant, condition, added_ns=measured[-1], stub=stub, cpus=cpus[-1:], seed=number)
            yield Turn(condition.name, contestant, take)

    with queue_stubs(SERVICE_MS, cpus[:1]) as stubs:
        time_s = QUICK_TIME_S if quick else TIME_S
        return take_turns(in_rounds(stubs), time_s=time_s, guess_s=FROZEN_S + 2, tell=turn_line), added_ns


if __name__ == "__main__":
    sys.exit(main())
