"""The client's own ceiling over HTTP, beside its peers', on one core.

Run it with ``python -m benchmarks.ceiling``: some four minutes, or ``--quick``, one and a half. nginx has
the first CPU and answers with constants (see `benchmarks.nginx`), whoever asks has the last. What is
compared, and how, is told in `benchmarks.contest`. AIPerf and GuideLLM speak OpenAI's API alone: with the
server's core given to a stub of it, they run their closed loops, without ``--quick``.

Exit codes: 0 the floors are met, 1 they are not or a run failed, 2 the machine lacks nginx or a
second CPU. Floors: `FLOOR_QPS`, and with ``--quick`` ratios to peers alone (`QUICK_FLOORS`): how fast a machine is,
is no regression.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from servebench_servers.stub import StubOptions
from servebench_servers.stub_queue import Service

from benchmarks.contest import CONNECTIONS, Contest, Goal, Settings, hold, table
from benchmarks.nginx import NullServer, find_nginx
from benchmarks.openai_stub import OpenAIStub
from benchmarks.peers import ready_peers
from benchmarks.peers.base import PeerProtocol
from benchmarks.peers.query import http_target
from benchmarks.report import write_result
from benchmarks.steps import header_line
from benchmarks.verdicts import draw_contest, floor_line, goal_lines, result_document
from servebench.errors import RunError, ServebenchError

FLOOR_QPS = 25_000
#: For ``--quick``: less than half of what is usual. Saturated rates, because a neighbour's burst makes any rate unclean.
QUICK_FLOORS = (Goal("saturated", "aiohttp", 3.0), Goal("saturated", "locust", 3.0), Goal("saturated", "wrk", 0.25))
#: Wanted, and decides nothing.
TARGETS = (
    Goal("clean", "aiohttp", 6.0),
    Goal("clean", "locust", 6.0),
    Goal("clean", "hey", 1.0),
    Goal("clean", "perf_analyzer", 1.0),
    Goal("saturated", "wrk", 0.5),
)
_LADDER_QPS = (10_000, FLOOR_QPS, 35_000, 45_000, 60_000, 80_000, 100_000, 120_000, 140_000, 160_000, 200_000)
FULL = Settings(rounds=3, step_s=3.0, peer_s=2.0, shares=(0.9, 0.6, 0.3), ladder_qps=_LADDER_QPS, first_rung=1)
QUICK = Settings(rounds=1, step_s=2.0, peer_s=2.0, shares=(0.6,), ladder_qps=_LADDER_QPS, first_rung=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ceiling", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round of shorter runs, judged by ratios alone")
    quick: bool = parser.parse_args(argv).quick
    nginx, cpus = find_nginx(), sorted(os.sched_getaffinity(0))
    if nginx is None:
        print("nginx was not found, and the null server is one: apt install nginx-light", file=sys.stderr)
        return 2
    if len(cpus) < 2:
        print("one CPU is not enough: nginx and the worker need one each", file=sys.stderr)
        return 2
    settings = QUICK if quick else FULL
    try:
        peers = ready_peers("kserve-http", _say)
        with NullServer(nginx, cpus[:1]) as server:
            _say(f"One core for each client in turn, another for {server.version}.\n{header_line('nginx')}")
            contest = hold(server, http_target(server.url), peers, cpus[-1:], settings, say=_say)
        others = {} if quick else _language_model_peers(cpus, settings)
    except ServebenchError as error:
        print(f"the measurement failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    floors = QUICK_FLOORS if quick else ()
    document = result_document(contest, server.version, quick=quick, floor_qps=FLOOR_QPS, floors=floors)
    path = write_result("ceiling", document | {"openai_saturated_qps": others}, version=2)
    print(f"\n{table(contest)}\n")
    for name, rate_qps in others.items():
        print(f"{name}, closed loop over OpenAI's API: {rate_qps:,.0f}/s")
    print(
        "\n".join(
            [
                *goal_lines(contest, TARGETS, "Target"),
                *goal_lines(contest, floors, "Floor"),
                floor_line(contest, FLOOR_QPS, "Target" if quick else "Floor"),
            ]
        )
    )
    draw_contest(contest, "HTTP queries a second on one core", server.version, path.with_suffix(".png"), _say)
    print(f"Written to {path}")
    return exit_code(contest, quick=quick)


def exit_code(contest: Contest, *, quick: bool) -> int:
    """0 when the floors are met, else 1; a peer that was not measured is no floor."""
    if quick:
        return 0 if contest.meets(QUICK_FLOORS, required=False) else 1
    clean = contest.clean_qps
    return 0 if clean is not None and clean.median >= FLOOR_QPS else 1


def _language_model_peers(cpus: Sequence[int], settings: Settings) -> dict[str, float]:
    """Saturated rates of the peers that speak nothing else, once each, against a stub that takes no time."""
    protocol: PeerProtocol = "openai"
    rates: dict[str, float] = {}
    peers = [peer for peer in ready_peers(protocol, _say) if peer.protocols == {protocol}]
    with OpenAIStub(cpus[:1], StubOptions(service=Service(kind="constant", mean_ms=0.0), precise=False)) as stub:
        for peer in peers:
            try:
                result = peer.run(
                    stub.target,
                    arrivals="closed",
                    rate_qps=None,
                    connections=CONNECTIONS,
                    duration_s=settings.peer_s,
                    cpus=cpus[-1:],
                )
            except RunError as error:
                _say(f"  {peer.name}: {error}")
                continue
            rates[peer.name] = result.rate_qps
    return rates


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
