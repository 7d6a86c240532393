"""The client's own ceiling over gRPC, beside its peers', on one core: `benchmarks.ceiling` with nghttpd as the null server.

Run it with ``python -m benchmarks.ceiling_grpc``: some three minutes, or ``--quick``, one.

Exit codes: 0 the floors are met, 1 they are not or a run failed, 2 the machine lacks nghttpd or a second CPU. Floors:
`FLOOR_QPS` and `FLOORS`, and with ``--quick`` the ratios of `QUICK_FLOORS` alone.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence

from benchmarks.contest import Contest, Goal, Settings, hold, table
from benchmarks.nghttpd import NullGrpcServer, find_nghttpd
from benchmarks.peers import ready_peers
from benchmarks.peers.query import grpc_target
from benchmarks.report import write_result
from benchmarks.steps import header_line
from benchmarks.verdicts import draw_contest, floor_line, goal_lines, result_document
from servebench.errors import ServebenchError

FLOOR_QPS = 20_000
FLOORS = (Goal("clean", "grpc.aio", 3.0),)
#: For ``--quick``: half of what is usual. Saturated rates, because a neighbour's burst makes any rate unclean.
QUICK_FLOORS = (Goal("saturated", "grpc.aio", 3.0),)
#: Wanted, and decides nothing.
TARGETS = (Goal("clean", "grpc.aio", 3.5), Goal("clean", "perf_analyzer", 1.0))
_LADDER_QPS = (10_000, FLOOR_QPS, 28_000, 35_000, 45_000, 60_000, 80_000, 100_000, 120_000)
FULL = Settings(rounds=3, step_s=3.0, peer_s=2.0, shares=(0.9, 0.6, 0.3), ladder_qps=_LADDER_QPS, first_rung=1)
QUICK = Settings(rounds=1, step_s=2.0, peer_s=2.0, shares=(0.6,), ladder_qps=_LADDER_QPS, first_rung=1)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.ceiling_grpc", description=__doc__.partition("\n")[0])
    parser.add_argument("--quick", action="store_true", help="one round of shorter runs, judged by ratios alone")
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else every start of a worker is a line about fork
    quick: bool = parser.parse_args(argv).quick
    nghttpd, cpus = find_nghttpd(), sorted(os.sched_getaffinity(0))
    if nghttpd is None:
        print("nghttpd was not found, and the null gRPC server is one: apt install nghttp2-server", file=sys.stderr)
        return 2
    if len(cpus) < 2:
        print("one CPU is not enough: nghttpd and the worker need one each", file=sys.stderr)
        return 2
    try:
        peers = ready_peers("kserve-grpc", _say)
        with NullGrpcServer(nghttpd, cpus[:1]) as server:
            _say(f"One core for each client in turn, another for {server.version}.\n{header_line(server.name)}")
            contest = hold(server, grpc_target(server.url), peers, cpus[-1:], QUICK if quick else FULL, say=_say)
    except ServebenchError as error:
        print(f"the measurement failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    floors = QUICK_FLOORS if quick else FLOORS
    path = write_result(
        "ceiling_grpc", result_document(contest, server.version, quick=quick, floor_qps=FLOOR_QPS, floors=floors)
    )
    print(f"\n{table(contest)}\n")
    print(
        "\n".join(
            [
                *goal_lines(contest, TARGETS, "Target"),
                *goal_lines(contest, floors, "Floor"),
                floor_line(contest, FLOOR_QPS, "Target" if quick else "Floor"),
            ]
        )
    )
    draw_contest(contest, "gRPC queries a second on one core", server.version, path.with_suffix(".png"), _say)
    print(f"Written to {path}")
    return exit_code(contest, quick=quick)


def exit_code(contest: Contest, *, quick: bool) -> int:
    """0 when the floors are met, else 1. Without ``quick`` the peers of `FLOORS` must have been measured."""
    if quick:
        return 0 if contest.meets(QUICK_FLOORS, required=False) else 1
    clean = contest.clean_qps
    return 0 if clean is not None and clean.median >= FLOOR_QPS and contest.meets(FLOORS, required=True) else 1


def _say(line: str) -> None:
    print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
