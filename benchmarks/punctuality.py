"""Punctuality: how late queries leave, at what CPU cost, and which arrival process reaches the server.

``python -m benchmarks.punctuality`` takes three minutes, ``--quick`` one. Two parts:

The issue delay of servebench against null servers (nginx over HTTP, nghttpd over gRPC) at rising rates, with
``precise`` and ``eco`` pacing, by its own records, and the share of a core that its worker took.

The arrivals as the server sees them: the stub stamps each query when its event loop reads it. servebench and every
peer that claims to send Poisson arrivals take turns; what arrived is compared with the Poisson process of the asked rate.
For servebench, which tells its schedule, also with the moments the queries were due. How exact the stub's
stamps are themselves is told by the same runs: arrival minus the moment the query was handed to the socket.

Exit codes: 0 the targets are met, 1 they are not or a run of servebench's failed, 2 the machine lacks a null server or
a second CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from functools import partial
from typing import Any

import numpy as np

from benchmarks.arrivals_seen import Stub, fetch_stamps, forget_stamps, queue_stubs, see
from benchmarks.contestants import Contestant, Own, contestants
from benchmarks.entry import enter, need_cpus, need_nghttpd, need_nginx, say
from benchmarks.nghttpd import NullGrpcServer
from benchmarks.nginx import NullServer
from benchmarks.own_client import OwnRun, run_own
from benchmarks.peers.base import PeerProtocol
from benchmarks.plots import draw
from benchmarks.punctuality_report import (
    Delay,
    Witnessed,
    arrived_line,
    chart,
    delay_table,
    resolution_line,
    seen_table,
    targets,
)
from benchmarks.report import QUICK_SLACK, write_result
from benchmarks.turns import Turn, take_turns
from servebench.errors import RunError
from servebench.report.console import format_duration

PACINGS = ("precise", "eco")
#: How long a run lasts at each rate (1/s). The slowest rate's percentiles rest on the fewest queries.
DURATION_S = {10: 2.0, 100: 1.5, 1_000: 1.0, 10_000: 1.0}
QUICK_DURATION_S = {100: 1.0, 1_000: 1.0, 10_000: 1.0}
#: From this rate on also over gRPC: when a slow query leaves is the timer's doing, not the protocol's.
GRPC_FROM_QPS = 1_000
ROUNDS = 3
QUICK_ROUNDS = 1
WARMUP_S = 0.3

SEEN_RATES_QPS = (1_000, 200)
#: Those who speak OpenAI's API alone cannot send more.
OPENAI_MOST_QPS = 200
SEEN_S = 3.0
#: The stub's service time: short, so that its queue is empty almost always and does not matter.
SEEN_SERVICE_MS = 0.05
#: No turn begins that would end later than this after the start of the second part.
SEEN_TIME_S = 85.0
QUICK_SEEN_TIME_S = 20.0


def delay_of(protocol: str, pacing: str, rate_qps: float, run: OwnRun) -> Delay:
    """The delays that a run reports. `RunError` where more than 1 % of its queries were never sent."""
    delay = run.document["issue_delay"]
    if delay["percentiles"]["99"] is None:
        raise RunError(f"{protocol}, {pacing}, {rate_qps:,.0f}/s: more than 1 % of the queries were never sent")
    return Delay(
        protocol,
        pacing,
        rate_qps,
        queries=run.document["counts"]["planned"],
        not_ok=run.not_ok,
        p50_ns=delay["percentiles"]["50"],
        p99_ns=delay["percentiles"]["99"],
        max_ns=delay["max_ns"],
        cpu_share=run.cpu_share,
    )


def witness(
    contestant: Contestant, stub: Stub, rate_qps: float, *, duration_s: float, cpus: Sequence[int], seed: int
) -> Witnessed:
    """Let a contestant send, and describe what arrived. `ServebenchError` if it fails, `ValueError` if too little arrived."""
    forget_stamps(stub)
    outcome = contestant.send(stub, rate_qps=rate_qps, duration_s=duration_s, cpus=cpus, seed=seed)
    arrival_ns = fetch_stamps(stub)["arrival_ns"]
    distances: tuple[int | None, ...] = (None,) * 4
    if outcome.own is not None:
        data = outcome.own.data
        arrival_ns = arrival_ns[arrival_ns >= data.facts["start_ns"]] - data.facts["start_ns"]
        if len(arrival_ns) == len(data.scheduled_ns):
            distances = (
                *_middle_and_tail(arrival_ns - data.scheduled_ns),
                *_middle_and_tail(arrival_ns - np.sort(data.issued_ns)),
            )
    return Witnessed(contestant.name, rate_qps, see(arrival_ns, rate_qps), outcome.not_ok, outcome.cpu_share, *distances)


def _middle_and_tail(values_ns: Any) -> tuple[int, int]:
    p50_ns, p99_ns = np.percentile(values_ns, (50, 99))
    return round(p50_ns), round(p99_ns)


def delay_turns(rates_qps: Iterable[int], rounds: int) -> Iterator[tuple[int, str, str]]:
    """(rate, protocol, pacing) of every run, interleaved so that a machine's slow minutes hit all alike."""
    for _ in range(rounds):
        for rate_qps in rates_qps:
            for protocol in ("http", "grpc") if rate_qps >= GRPC_FROM_QPS else ("http",):
                for pacing in PACINGS:
                    yield rate_qps, protocol, pacing


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return enter(measure, "punctuality", __doc__, argv, quick_help="one round of shorter runs")


def measure(*, quick: bool) -> int:
    """Measure both parts and report them."""
    nginx, nghttpd, cpus = need_nginx(), need_nghttpd(), need_cpus()
    delays = _measure_delays(nginx, nghttpd, cpus, quick=quick)
    say(f"\n{delay_table(delays)}\n")
    turns = _measure_seen(cpus, quick=quick)
    met, sentences = targets(delays, slack=QUICK_SLACK if quick else 1)
    path = write_result(
        "punctuality",
        {"quick": quick, "delays": [asdict(delay) for delay in delays], "seen": [asdict(turn) for turn in turns]},
    )
    draw([chart(delays)], path.with_suffix(".png"), say)
    print("\n".join(["", seen_table(turns), resolution_line(turns), *sentences, f"Written to {path}"]))
    return 0 if met else 1


def _measure_delays(nginx: str, nghttpd: str, cpus: Sequence[int], *, quick: bool) -> list[Delay]:
    durations_s = QUICK_DURATION_S if quick else DURATION_S
    turns = list(delay_turns(durations_s, QUICK_ROUNDS if quick else ROUNDS))
    delays = []
    with ExitStack() as stack:
        servers: dict[str, NullServer | NullGrpcServer] = {
            "http": stack.enter_context(NullServer(nginx, cpus[:1])),
            "grpc": stack.enter_context(NullGrpcServer(nghttpd, cpus[:1])),
        }
        for number, (rate_qps, protocol, pacing) in enumerate(turns, start=1):
            server = servers[protocol]
            run = run_own(
                server.url,
                server.endpoint,
                rate_qps=rate_qps,
                duration_s=durations_s[rate_qps],
                cpus=cpus[-1:],
                pacing=pacing,
                schedule_seed=number,
                warmup_s=WARMUP_S,
            )
            delay = delay_of(protocol, pacing, rate_qps, run)
            delays.append(delay)
            say(
                f"[{number}/{len(turns)}] {rate_qps:,}/s, {protocol}, {pacing}: delay p50 {format_duration(delay.p50_ns)}, "
                f"p99 {format_duration(delay.p99_ns)}, {delay.cpu_share:.1%} of a core"
            )
    return delays


def _measure_seen(cpus: Sequence[int], *, quick: bool) -> list[Witnessed]:
    poisson = [one for one in contestants(say, quick=quick) if one.arrivals == "poisson"]
    found: list[Contestant] = [poisson[0], Own(pacing="eco"), *poisson[1:]]

    def plan(stubs: dict[PeerProtocol, Stub]) -> Iterator[Turn[Witnessed]]:
        for number in range(QUICK_ROUNDS if quick else ROUNDS):
            for rate_qps in SEEN_RATES_QPS:
                for one in (one for one in found if one.protocol != "openai" or rate_qps <= OPENAI_MOST_QPS):
                    stub = stubs[one.protocol]
                    take = partial(witness, one, stub, rate_qps, duration_s=SEEN_S, cpus=cpus[-1:], seed=number)
                    yield Turn(f"{rate_qps:,}/s", one, take)

    with queue_stubs(SEEN_SERVICE_MS, cpus[:1]) as stubs:
        time_s = QUICK_SEEN_TIME_S if quick else SEEN_TIME_S
        return take_turns(plan(stubs), time_s=time_s, guess_s=SEEN_S + 2, tell=arrived_line)


if __name__ == "__main__":
    sys.exit(main())
