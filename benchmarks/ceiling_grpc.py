"""The client's own ceiling over gRPC, beside its peers', on one core: `benchmarks.ceiling` with nghttpd as the null server.

Run it with ``python -m benchmarks.ceiling_grpc``: three minutes, or ``--quick``, half a minute, without
open loops of peers.

Exit codes: 0 the floors are met, 1 they are not or a run failed, 2 the machine lacks nghttpd or a second CPU. Floors, with
``--quick`` too: 20,000/s clean (`FLOOR_QPS`), and that three times grpc.aio's saturated rate (`FLOORS`), which must have run.
Targets are told and decide nothing.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from benchmarks.ceilings import Ceiling
from benchmarks.contest import Goal
from benchmarks.entry import need_nghttpd
from benchmarks.nghttpd import NullGrpcServer
from benchmarks.peers.query import grpc_target

FLOOR_QPS = 20_000
FLOORS = (Goal("clean", "grpc.aio", 3.0),)
TARGETS = (Goal("clean", "grpc.aio", 3.5), Goal("clean", "perf_analyzer", 1.0))
_LADDER_QPS = (
    *(10_000, FLOOR_QPS, 28_000, 35_000, 45_000, 60_000, 70_000, 80_000, 90_000),
    *(100_000, 110_000, 120_000, 140_000),
)
CEILING = Ceiling(
    name="ceiling_grpc",
    people="gRPC",
    protocol="kserve-grpc",
    need_program=need_nghttpd,
    server=NullGrpcServer,
    target=grpc_target,
    ladder_qps=_LADDER_QPS,
    first_rung=4,
    floor_qps=FLOOR_QPS,
    floors=FLOORS,
    peers_required=True,
    targets=TARGETS,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return CEILING.main(__doc__, argv)


if __name__ == "__main__":
    sys.exit(main())
