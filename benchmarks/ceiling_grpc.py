"""The client's own ceiling over gRPC, and grpc.aio's in the same minutes on the same cores.

``make bench`` runs it after `benchmarks.ceiling`, with nghttpd as the null server. Our wire client
and grpcio's asyncio client climb the same kind of ladder, each an ordinary run of an ordinary
profile; the ratio of their highest clean rates is what a core is worth with one and the other.

Exit codes: 0 the floors are met, 1 they are not or a run failed, 2 the machine lacks nghttpd or a second CPU.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict

from benchmarks.ceiling import MAX_TRIES, RESULT, STEP_S, Step, climb, floor_line, header_line, measure_step, step_line
from benchmarks.nghttpd import NullGrpcServer, find_nghttpd
from servebench.errors import ServebenchError
from servebench.record.environment import collect_environment
from servebench.record.files import write_json

FLOOR_QPS = 20_000
FLOOR_RATIO = 3.0
LADDERS_QPS = {
    "grpcio": (1_000, 2_000, 3_000, 4_000, 5_000, 6_000, 8_000, 10_000, 13_000, 16_000, 20_000),
    "wire": (10_000, FLOOR_QPS, 25_000, 30_000, 35_000, 40_000, 50_000, 60_000, 80_000, 100_000, 120_000),
}


def main() -> int:
    """Entry point; returns the exit code."""
    nghttpd, cpus = find_nghttpd(), sorted(os.sched_getaffinity(0))
    if nghttpd is None:
        print("nghttpd was not found, and the null gRPC server is one: apt install nghttp2-server", file=sys.stderr)
        return 2
    if len(cpus) < 2:
        print("one CPU is not enough: nghttpd and the worker need one each", file=sys.stderr)
        return 2
    try:
        with NullGrpcServer(nghttpd, cpus[:1]) as server:
            best, steps = _climb_all(server, cpus[-1:])
    except ServebenchError as error:
        print(f"the measurement failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    result = RESULT.with_name("ceiling-grpc.json")
    write_json(
        result,
        {
            "schema": "servebench.ceiling-grpc/1",
            "floor_qps": FLOOR_QPS,
            "highest_clean_qps": {client: step.target_qps if step else None for client, step in best.items()},
            "steps": [{"client": client, **asdict(step), "problems": step.problems} for client, step in steps],
            "server": server.version,
            "environment": collect_environment(),
        },
    )
    print(f"\n{floor_line(best['wire'], FLOOR_QPS)}\n{ratio_line(best)}\nWritten to {result}")
    return exit_code(best)


def ratio_line(best: dict[str, Step | None]) -> str:
    """How many of grpc.aio's queries our client issues, in a sentence."""
    ratio = _ratio(best)
    if ratio is None:
        return "No ratio to grpc.aio: a client had no clean rate."
    met = "met" if ratio >= FLOOR_RATIO else "NOT met"
    return f"Floor {met}: {ratio:.1f} times grpc.aio's highest clean rate; required are {FLOOR_RATIO:g} times."


def exit_code(best: dict[str, Step | None]) -> int:
    """0 when the rate and the ratio reach their floors, else 1."""
    wire, ratio = best["wire"], _ratio(best)
    return 0 if wire is not None and wire.target_qps >= FLOOR_QPS and ratio is not None and ratio >= FLOOR_RATIO else 1


def _ratio(best: dict[str, Step | None]) -> float | None:
    wire, reference = best["wire"], best["grpcio"]
    return None if wire is None or reference is None else wire.target_qps / reference.target_qps


def _climb_all(server: NullGrpcServer, cpus: Sequence[int]) -> tuple[dict[str, Step | None], list[tuple[str, Step]]]:
    RESULT.parent.mkdir(exist_ok=True)
    print(f"One worker on CPU {cpus[0]}, {server.version} on another; each rate {STEP_S:g} s, at most {MAX_TRIES} tries.\n")
    print(header_line(server.name), flush=True)
    best: dict[str, Step | None] = {}
    steps: list[tuple[str, Step]] = []
    for client, ladder_qps in LADDERS_QPS.items():

        def seen(step: Step, client: str = client) -> None:
            steps.append((client, step))
            print(f"{step_line(step)}   ({client})", flush=True)

        def measure(rate_qps: float, client: str = client) -> Step:
            return measure_step(server, cpus, rate_qps, transport=client)

        best[client] = climb(measure, ladder_qps, seen)
    return best, steps


if __name__ == "__main__":
    sys.exit(main())
