"""The client's own ceiling over HTTP, beside its peers', on one core.

Run it with ``python -m benchmarks.ceiling``: four minutes, or ``--quick``, one, without open loops of
peers. nginx has the first CPU and answers with constants (see `benchmarks.nginx`), whoever asks has the last. What is
compared, and how, is told in `benchmarks.contest`. AIPerf and GuideLLM speak OpenAI's API alone: with the
server's core given to a stub of it, they run their closed loops, without ``--quick``.

Exit codes: 0 the floors are met, 1 they are not or a run failed, 2 the machine lacks nginx or a
second CPU. Floors: `FLOOR_QPS`, and ratios to the peers that ran (`FLOORS`).
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from servebench_servers.stub import StubOptions
from servebench_servers.stub_queue import Service

from benchmarks.contest import CONNECTIONS, Contest, Goal, Settings, hold
from benchmarks.entry import enter, need_cpus, need_nginx, say
from benchmarks.nginx import NullServer
from benchmarks.openai_stub import OpenAIStub
from benchmarks.peers import ready_peers
from benchmarks.peers.base import Load, PeerProtocol
from benchmarks.peers.query import http_target
from benchmarks.report import write_result
from benchmarks.steps import header_line
from benchmarks.verdicts import announce, draw_contest, result_document
from servebench.errors import RunError

FLOOR_QPS = 25_000
#: Less than half of what is usual. Saturated rates, because a neighbour's burst makes any rate unclean.
FLOORS = (Goal("saturated", "aiohttp", 3.0), Goal("saturated", "locust", 3.0), Goal("saturated", "wrk", 0.25))
#: Wanted, and decides nothing.
TARGETS = (
    Goal("clean", "aiohttp", 6.0),
    Goal("clean", "locust", 6.0),
    Goal("clean", "hey", 1.0),
    Goal("clean", "perf_analyzer", 1.0),
    Goal("saturated", "wrk", 0.5),
)
_LADDER_QPS = (
    *(10_000, FLOOR_QPS, 35_000, 45_000, 60_000, 70_000, 80_000, 90_000),
    *(100_000, 110_000, 120_000, 140_000, 160_000, 200_000),
)
FULL = Settings(rounds=3, tries=3, step_s=2.0, peer_s=2.0, shares=(0.9, 0.6, 0.3), ladder_qps=_LADDER_QPS, first_rung=3)
QUICK = Settings(rounds=1, tries=3, step_s=1.5, peer_s=2.0, shares=(), ladder_qps=_LADDER_QPS, first_rung=3)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return enter(measure, "ceiling", __doc__, argv, quick_help="one round of shorter runs, without open loops of peers")


def measure(*, quick: bool) -> int:
    """Hold the contest and report it."""
    nginx, cpus, settings = need_nginx(), need_cpus(), QUICK if quick else FULL
    peers = ready_peers("kserve-http", say)
    with NullServer(nginx, cpus[:1]) as server:
        say(f"One core for each client in turn, another for {server.version}.\n{header_line('nginx')}")
        contest = hold(server, http_target(server.url), peers, cpus[-1:], settings, say=say)
    others = {} if quick else _language_model_peers(cpus, settings)
    document = result_document(contest, server.version, quick=quick, floor_qps=FLOOR_QPS, floors=FLOORS)
    path = write_result("ceiling", document | {"openai_saturated_qps": others}, version=2)
    announce(contest, targets=TARGETS, floors=FLOORS, floor_qps=FLOOR_QPS)
    for name, rate_qps in others.items():
        say(f"{name}, closed loop over OpenAI's API: {rate_qps:,.0f}/s")
    draw_contest(contest, "HTTP queries a second on one core", server.version, path.with_suffix(".png"), say)
    say(f"Written to {path}")
    return exit_code(contest)


def exit_code(contest: Contest) -> int:
    """0 when the floors are met, else 1; a peer that was not measured is no floor."""
    clean = contest.clean_qps
    return 0 if clean is not None and clean.median >= FLOOR_QPS and contest.meets(FLOORS, required=False) else 1


def _language_model_peers(cpus: Sequence[int], settings: Settings) -> dict[str, float]:
    """Saturated rates of the peers that speak nothing else, once each, against a stub that takes no time."""
    protocol: PeerProtocol = "openai"
    rates: dict[str, float] = {}
    load = Load("closed", None, CONNECTIONS, settings.peer_s, cpus[-1:])
    peers = [peer for peer in ready_peers(protocol, say) if peer.protocols == {protocol}]
    with OpenAIStub(cpus[:1], StubOptions(service=Service(kind="constant", mean_ms=0.0), precise=False)) as stub:
        for peer in peers:
            try:
                result = peer.run(stub.target, load)
            except RunError as error:
                say(f"  {peer.name}: {error}")
                continue
            rates[peer.name] = result.rate_qps
    return rates


if __name__ == "__main__":
    sys.exit(main())
