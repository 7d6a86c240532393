"""The client's own ceiling over gRPC, beside its peers', on one core: `benchmarks.ceiling` with nghttpd as the null server.

Run it with ``python -m benchmarks.ceiling_grpc``: three minutes, or ``--quick``, half a minute, without
open loops of peers.

Exit codes: 0 the floors are met, 1 they are not or a run failed, 2 the machine lacks nghttpd or a second CPU. Floors:
`FLOOR_QPS` and `FLOORS`.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.contest import Contest, Goal, Settings, hold
from benchmarks.entry import enter, need_cpus, need_nghttpd, say
from benchmarks.nghttpd import NullGrpcServer
from benchmarks.peers import ready_peers
from benchmarks.peers.query import grpc_target
from benchmarks.report import write_result
from benchmarks.steps import header_line
from benchmarks.verdicts import announce, draw_contest, result_document

FLOOR_QPS = 20_000
FLOORS = (Goal("clean", "grpc.aio", 3.0),)
#: Wanted, and decides nothing.
TARGETS = (Goal("clean", "grpc.aio", 3.5), Goal("clean", "perf_analyzer", 1.0))
_LADDER_QPS = (
    *(10_000, FLOOR_QPS, 28_000, 35_000, 45_000, 60_000, 70_000, 80_000, 90_000),
    *(100_000, 110_000, 120_000, 140_000),
)
FULL = Settings(rounds=3, tries=3, step_s=2.0, peer_s=2.0, shares=(0.9, 0.6, 0.3), ladder_qps=_LADDER_QPS, first_rung=4)
QUICK = Settings(rounds=1, tries=3, step_s=1.5, peer_s=2.0, shares=(), ladder_qps=_LADDER_QPS, first_rung=4)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return enter(measure, "ceiling_grpc", __doc__, argv, quick_help="one round of shorter runs, without open loops of peers")


def measure(*, quick: bool) -> int:
    """Hold the contest and report it."""
    nghttpd, cpus = need_nghttpd(), need_cpus()
    peers = ready_peers("kserve-grpc", say)
    with NullGrpcServer(nghttpd, cpus[:1]) as server:
        say(f"One core for each client in turn, another for {server.version}.\n{header_line(server.name)}")
        contest = hold(server, grpc_target(server.url), peers, cpus[-1:], QUICK if quick else FULL, say=say)
    document = result_document(contest, server.version, quick=quick, floor_qps=FLOOR_QPS, floors=FLOORS)
    path = write_result("ceiling_grpc", document)
    announce(contest, targets=TARGETS, floors=FLOORS, floor_qps=FLOOR_QPS)
    draw_contest(contest, "gRPC queries a second on one core", server.version, path.with_suffix(".png"), say)
    say(f"Written to {path}")
    return exit_code(contest)


def exit_code(contest: Contest) -> int:
    """0 when the floors are met, else 1; the peers of `FLOORS` must have been measured."""
    clean = contest.clean_qps
    return 0 if clean is not None and clean.median >= FLOOR_QPS and contest.meets(FLOORS, required=True) else 1


if __name__ == "__main__":
    sys.exit(main())
