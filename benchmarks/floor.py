"""Floor: the least service time that servebench can measure, beside a bare blocking socket in the same minute.

``python -m benchmarks.floor`` takes 40 seconds, ``--quick`` fifteen. nginx answers with constants on the first
CPU; the last CPU asks it 1,000 times a second at Poisson moments, one query out at a time: in turns a blocking socket that
spins before each (the least that Python can measure), and a servebench worker with ``precise`` and with ``eco`` pacing.
How fast a machine wakes up drifts within seconds, so each servebench run is compared with the sockets before and after it.

Exit codes: 0 the target is met, 1 it is not or a run failed, 2 the machine lacks nginx or a second CPU.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass

from benchmarks.entry import enter, need_cpus, need_nginx, say
from benchmarks.nginx import NullServer
from benchmarks.own_client import run_own
from benchmarks.peers.pingpong import ping_pong_ns
from benchmarks.report import write_result
from benchmarks.steps import Server
from benchmarks.turns import text_table
from servebench.errors import RunError
from servebench.report.console import format_duration

RATE_QPS = 1_000
PACINGS = ("precise", "eco")
#: Service time p50 over the ping-pong's, with `PACINGS[0]`, the default.
MAX_RATIO = 2.0
ROUNDS, QUICK_ROUNDS = 5, 2
RUN_S, SOCKET_S = 1.5, 0.5


@dataclass(frozen=True, slots=True)
class Turn:
    """One run between two ping-pongs. Service time is completed - issued, issue delay issued - scheduled."""

    pacing: str
    service_p50_ns: int
    service_p99_ns: int
    delay_p50_ns: int
    ping_pong_p50_ns: int
    ping_pong_p99_ns: int

    @property
    def ratio(self) -> float:
        """Service time over ping-pong, medians of each."""
        return self.service_p50_ns / self.ping_pong_p50_ns


def take_turn(server: Server, cpus: Sequence[int], pacing: str) -> Turn:
    """A ping-pong, a run and a ping-pong. `ServebenchError` when the run fails, or any of its queries."""
    times_ns = ping_pong_ns(server.url, cpus, rate_qps=RATE_QPS, duration_s=SOCKET_S)
    run = run_own(server.url, server.endpoint, rate_qps=RATE_QPS, duration_s=RUN_S, cpus=cpus, pacing=pacing, warmup_s=0.3)
    times_ns += ping_pong_ns(server.url, cpus, rate_qps=RATE_QPS, duration_s=SOCKET_S)
    if run.not_ok:
        raise RunError(f"{run.not_ok} of {run.data.planned} queries failed")
    times_ns.sort()
    service = run.document["service_time"]["percentiles"]
    return Turn(
        pacing,
        service["50"],
        service["99"],
        run.document["issue_delay"]["percentiles"]["50"],
        times_ns[len(times_ns) // 2],
        times_ns[len(times_ns) * 99 // 100],
    )


def median_ratio(turns: Sequence[Turn], pacing: str) -> float:
    """The median of a pacing's ratios."""
    return statistics.median(turn.ratio for turn in turns if turn.pacing == pacing)


def table(turns: Sequence[Turn]) -> str:
    """A line a pacing: medians of its turns, and the spread of the ratio."""
    head = ("pacing", "service p50", "p99", "issue delay p50", "ping-pong p50", "p99", "ratio of p50s", "least", "most")
    lines: list[tuple[str, ...]] = [head]
    for pacing in PACINGS:
        mine = [turn for turn in turns if turn.pacing == pacing]
        values_ns = zip(
            *((t.service_p50_ns, t.service_p99_ns, t.delay_p50_ns, t.ping_pong_p50_ns, t.ping_pong_p99_ns) for t in mine),
            strict=True,
        )
        ratios = sorted(turn.ratio for turn in mine)
        durations = [format_duration(round(statistics.median(values))) for values in values_ns]
        numbers = [f"{ratio:.2f}" for ratio in (median_ratio(turns, pacing), ratios[0], ratios[-1])]
        lines.append((pacing, *durations, *numbers))
    return text_table(lines)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return enter(measure, "floor", __doc__, argv, quick_help="fewer rounds")


def measure(*, quick: bool) -> int:
    """Take the turns and report them."""
    nginx, cpus, rounds = need_nginx(), need_cpus(), QUICK_ROUNDS if quick else ROUNDS
    turns = []
    with NullServer(nginx, cpus[:1]) as server:
        for number in range(1, rounds + 1):
            say(f"round {number} of {rounds}")
            turns += [take_turn(server, cpus[-1:], pacing) for pacing in PACINGS]
    ratio = median_ratio(turns, PACINGS[0])
    met = ratio <= MAX_RATIO
    print(f"\n{table(turns)}\n")
    words = "met" if met else "NOT met"
    print(f"Service time is {ratio:.2f} times the ping-pong with {PACINGS[0]} pacing; target <= {MAX_RATIO:g}: {words}.")
    path = write_result(
        "floor",
        {
            "quick": quick,
            "rate_qps": RATE_QPS,
            "max_ratio": MAX_RATIO,
            "ratios": {pacing: median_ratio(turns, pacing) for pacing in PACINGS},
            "met": met,
            "turns": [asdict(turn) | {"ratio": turn.ratio} for turn in turns],
            "server": server.version,
        },
    )
    print(f"Written to {path}")
    return 0 if met else 1


if __name__ == "__main__":
    sys.exit(main())
