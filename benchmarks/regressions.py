"""Regressions: whether the client has become grossly worse, as ratios within one run. Needs nothing that pip does not bring.

``python -m benchmarks.regressions`` takes less than a minute, ``--quick`` a third of it; continuous integration runs it. A null
server of our own (`benchmarks.null_http`) has the first CPU, whoever asks it the last. A round asks for servebench's saturated
rate with its own client (``client.transport: wire``) and with aiohttp's, and for its service time at 1,000/s beside a blocking
socket's ping-pong. The best round of three counts: a neighbour's burst must not look like a regression. The bounds are far from
what is usual (some five times aiohttp's rate, about the ping-pong's time): a client beyond them has lost more than half.

There is nothing here on gRPC: pip brings no gRPC server that is fast enough not to be what is measured.
`benchmarks.ceiling_grpc` holds that client against nghttpd.

Exit codes: 0 the bounds are kept, 1 they are not or a run failed, 2 the machine lacks a second CPU.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from benchmarks.entry import enter, need_cpus, say
from benchmarks.floor import take_turn
from benchmarks.null_http import NullHttpServer
from benchmarks.report import write_result
from benchmarks.steps import measure_saturated_qps

MIN_RATE_RATIO = 2.0
MAX_SERVICE_RATIO = 3.0
ROUNDS, QUICK_ROUNDS = 3, 1
SATURATED_S = 0.5


@dataclass(frozen=True, slots=True)
class Round:
    """What one round measured."""

    wire_qps: float
    aiohttp_qps: float
    service_p50_ns: int  #: at `benchmarks.floor.RATE_QPS`
    ping_pong_p50_ns: int

    @property
    def rate_ratio(self) -> float:
        """Our saturated rate over aiohttp's, which may have had no answer in time."""
        return self.wire_qps / max(self.aiohttp_qps, 1.0)

    @property
    def service_ratio(self) -> float:
        """Our service time over the ping-pong, medians of each."""
        return self.service_p50_ns / self.ping_pong_p50_ns


@dataclass(frozen=True, slots=True)
class Verdict:
    """A ratio's best round, held against its bound."""

    what: str
    best: float
    wanted: Literal[">=", "<="]
    bound: float

    @property
    def kept(self) -> bool:
        """Whether the bound is kept; at the bound it is."""
        return self.best >= self.bound if self.wanted == ">=" else self.best <= self.bound

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.best:.2f} times, {self.wanted} {self.bound:g} wanted: {'kept' if self.kept else 'REGRESSION'}"
        )


def take_round(server: NullHttpServer, cpus: Sequence[int]) -> Round:
    """Measure everything once. `ServebenchError` when a run fails."""
    turn = take_turn(server, cpus, "precise")
    wire_qps, aiohttp_qps = (
        measure_saturated_qps(server, cpus, duration_s=SATURATED_S, transport=transport) for transport in ("wire", "aiohttp")
    )
    return Round(wire_qps, aiohttp_qps, turn.service_p50_ns, turn.ping_pong_p50_ns)


def judge(rounds: Sequence[Round]) -> list[Verdict]:
    """The verdict on each ratio."""
    rate, service = max(one.rate_ratio for one in rounds), min(one.service_ratio for one in rounds)
    return [
        Verdict("saturated rate over that of client.transport aiohttp", rate, ">=", MIN_RATE_RATIO),
        Verdict("service time p50 at 1,000/s over a blocking ping-pong's", service, "<=", MAX_SERVICE_RATIO),
    ]


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return enter(measure, "regressions", __doc__, argv, quick_help="one round")


def measure(*, quick: bool) -> int:
    """Measure the rounds and judge them."""
    cpus, rounds = need_cpus(), []
    with NullHttpServer(cpus[:1]) as server:
        for number in range(1, (QUICK_ROUNDS if quick else ROUNDS) + 1):
            rounds.append(one := take_round(server, cpus[-1:]))
            rates = f"saturated {one.wire_qps:,.0f}/s, aiohttp {one.aiohttp_qps:,.0f}/s"
            times = f"service p50 {one.service_p50_ns / 1e3:.0f} us, ping-pong {one.ping_pong_p50_ns / 1e3:.0f} us"
            say(f"round {number}: {rates} ({one.rate_ratio:.2f} times); {times} ({one.service_ratio:.2f} times)")
    verdicts = judge(rounds)
    path = write_result(
        "regressions",
        {
            "quick": quick,
            "rounds": [asdict(one) for one in rounds],
            "verdicts": [asdict(one) | {"kept": one.kept} for one in verdicts],
        },
    )
    print(*verdicts, f"Written to {path}", sep="\n")
    return 0 if all(one.kept for one in verdicts) else 1


if __name__ == "__main__":
    sys.exit(main())
