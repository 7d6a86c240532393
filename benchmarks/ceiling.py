"""The client's own ceiling over HTTP, beside its peers', on one core.

Run it with ``python -m benchmarks.ceiling``: four minutes, or ``--quick``, one, without open loops of
peers. nginx has the first CPU and answers with constants (see `benchmarks.nginx`), whoever asks has the last. What is
compared, and how, is told in `benchmarks.contest`. AIPerf and GuideLLM speak OpenAI's API alone: with the
server's core given to a stub of it, they run their closed loops, without ``--quick``.

Exit codes: 0 the floors are met, 1 they are not or a run failed, 2 the machine lacks nginx or a
second CPU. Floors, with ``--quick`` too: 25,000/s clean (`FLOOR_QPS`), and ratios to the peers that ran (`FLOORS`). Targets
are told and decide nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from servebench_servers.stub import StubOptions
from servebench_servers.stub_queue import Service

from benchmarks.ceilings import Ceiling
from benchmarks.contest import CONNECTIONS, Goal, Settings
from benchmarks.entry import need_nginx, say
from benchmarks.nginx import NullServer
from benchmarks.openai_stub import OpenAIStub
from benchmarks.peers import ready_peers
from benchmarks.peers.base import Load, PeerProtocol
from benchmarks.peers.query import http_target
from servebench.errors import RunError

FLOOR_QPS = 25_000
#: Less than half of what is usual. Saturated rates, because a neighbour's burst makes any rate unclean.
FLOORS = (Goal("saturated", "aiohttp", 3.0), Goal("saturated", "locust", 3.0), Goal("saturated", "wrk", 0.25))
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


CEILING = Ceiling(
    name="ceiling",
    people="HTTP",
    protocol="kserve-http",
    need_program=need_nginx,
    server=NullServer,
    target=http_target,
    ladder_qps=_LADDER_QPS,
    first_rung=3,
    floor_qps=FLOOR_QPS,
    floors=FLOORS,
    peers_required=False,
    targets=TARGETS,
    version=2,
    openai_rates=_language_model_peers,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return CEILING.main(__doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
