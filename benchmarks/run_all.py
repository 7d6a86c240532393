"""All benchmarks, one after the other: ``make bench`` (``--quick``, four minutes) and ``make bench-full`` (22 minutes).

Each runs in a process of its own and prints its own tables; what they wrote is gathered in
``results/all.json``. One that lacks something on this machine (exit code 2) is left out with its own line.

Exit codes: 0 no benchmark failed, 1 one did (its floors were not met, or it could not run), 2 none could run,
130 interrupted.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.report import RESULTS, write_result

BENCHMARKS = ("ceiling", "ceiling_grpc", "punctuality", "truth", "floor", "scale", "start")
_WORDS = {0: "passed", 1: "FAILED", 2: "left out"}


@dataclass(frozen=True, slots=True)
class Ran:
    """One benchmark that ran, or could not."""

    name: str
    exit_code: int
    wall_s: float
    result: dict[str, Any] | None  #: what it wrote; None when it wrote nothing


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    description = __doc__.replace("`", "").partition("\n")[0]
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run_all", description=description)
    parser.add_argument("--quick", action="store_true", help="a small version of each, in some minutes")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"only these: {', '.join(BENCHMARKS)}")
    arguments = parser.parse_args(argv)
    if unknown := [name for name in arguments.names if name not in BENCHMARKS]:
        parser.error(f"there is no benchmark {unknown[0]!r}; there are {', '.join(BENCHMARKS)}")
    ran = []
    for name in arguments.names or BENCHMARKS:
        print(f"\n=== {name} ===", flush=True)
        ran.append(run_one(name, quick=arguments.quick))
        if ran[-1].exit_code == 130:
            return 130
    path = write_result("all", {"quick": arguments.quick, "benchmarks": {one.name: document(one) for one in ran}})
    print("\n" + "\n".join(f"{one.name:<14}{words(one):<10}{one.wall_s:6.0f} s" for one in ran))
    print(f"Written to {path}")
    return exit_code(ran)


def run_one(name: str, *, quick: bool) -> Ran:
    """Run a benchmark to its end, and read what it wrote."""
    result = RESULTS / f"{name}.json"
    written_ns = result.stat().st_mtime_ns if result.exists() else None
    began_s = time.monotonic()
    argv = [sys.executable, "-m", f"benchmarks.{name}", *(["--quick"] if quick else [])]
    process = subprocess.Popen(argv, cwd=Path(__file__).parents[1])
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()  # the terminal interrupted it too; it stops what it started
        code = 130
    wrote = result.exists() and result.stat().st_mtime_ns != written_ns
    found = json.loads(result.read_text(encoding="utf-8")) if wrote else None
    return Ran(name, code, time.monotonic() - began_s, found)


def exit_code(ran: Sequence[Ran]) -> int:
    """What all of them together come to."""
    if any(one.exit_code not in (0, 2) for one in ran):
        return 1
    return 0 if any(one.exit_code == 0 for one in ran) else 2


def words(one: Ran) -> str:
    """How it ended, in words."""
    return _WORDS.get(one.exit_code, f"exit {one.exit_code}")


def document(one: Ran) -> dict[str, Any]:
    """Its entry in ``all.json``."""
    return {"exit_code": one.exit_code, "wall_s": one.wall_s, "result": one.result}


if __name__ == "__main__":
    sys.exit(main())
