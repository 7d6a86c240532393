"""Start: how long ``servebench --help`` takes, and ``servebench run`` until its first query leaves, with the server up.

``python -m benchmarks.start`` takes some twenty seconds, ``--quick`` ten. Both are the installed command in a process
of its own, nothing pinned, as at a user's prompt. The first query is the run's own earliest ``issued_ns``, on the clock that
started the command; the profile has no warm-up and its server (nginx) answers at once.

Exit codes: 0 the targets are met, 1 they are not or a command failed, 2 the machine lacks nginx.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import yaml

from benchmarks.entry import enter, need_nginx, say
from benchmarks.nginx import NullServer
from benchmarks.report import QUICK_SLACK, write_result
from benchmarks.turns import text_table
from servebench.errors import RunError
from servebench.record.rundir import open_run

COMMAND = str(Path(sys.executable).with_name("servebench"))
MAX_HELP_S = 0.35
MAX_FIRST_QUERY_S = 1.5
ROUNDS, QUICK_ROUNDS = 11, 5


@dataclass(frozen=True, slots=True)
class Started:
    """Wall times of one command, in seconds, as often as it was repeated."""

    what: str
    times_s: tuple[float, ...]
    target_s: float

    @property
    def median_s(self) -> float:
        """What is held against the target."""
        return statistics.median(self.times_s)

    @property
    def met(self) -> bool:
        """Whether the target is."""
        return self.median_s <= self.target_s


def help_s() -> float:
    """How long ``servebench --help`` takes. `RunError` when it fails."""
    began_ns = time.monotonic_ns()
    _run([COMMAND, "--help"])
    return (time.monotonic_ns() - began_ns) / 1e9


def first_query_s(url: str) -> float:
    """From the start of ``servebench run`` to its first query. `RunError` when it fails."""
    settings = {
        "name": "start",
        "server": {"url": url},
        "endpoint": NullServer.endpoint,
        "load": {"target_qps": 1_000, "min_duration_s": 0, "min_query_count": 100, "warmup_s": 0},
        "constraints": ["p99 <= 50ms"],
    }
    with tempfile.TemporaryDirectory(prefix="start-") as scratch:
        profile, directory = Path(scratch) / "start.yaml", Path(scratch) / "run"
        profile.write_text(yaml.safe_dump(settings), encoding="utf-8")
        began_ns = time.monotonic_ns()
        _run([COMMAND, "run", str(profile), "--out", str(directory)], allowed=(0, 3, 4, 5))
        run = open_run(directory)
        return float(run.facts["start_ns"] + int(run.column("issued_ns").min()) - began_ns) / 1e9


def table(found: Sequence[Started]) -> str:
    """All commands as text."""
    head = ("command", "median", "shortest", "longest", "target", "")
    return text_table([head, *map(_cells, found)])


def _cells(one: Started) -> tuple[str, ...]:
    times_s = (one.median_s, min(one.times_s), max(one.times_s))
    return (one.what, *(f"{time_s:.2f} s" for time_s in times_s), f"<= {one.target_s:g} s", "met" if one.met else "NOT met")


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit code."""
    return enter(measure, "start", __doc__, argv, quick_help="fewer repetitions")


def measure(*, quick: bool) -> int:
    """Start both commands again and again, and report."""
    with NullServer(need_nginx(), ()) as server:
        found = _measure_all(server.url, QUICK_ROUNDS if quick else ROUNDS)
    print(f"{table(found)}\n")
    path = write_result(
        "start",
        {
            "quick": quick,
            "commands": [asdict(one) | {"median_s": one.median_s, "met": one.met} for one in found],
        },
    )
    print(f"Written to {path}")
    slack = QUICK_SLACK if quick else 1
    return 0 if all(one.median_s <= slack * one.target_s for one in found) else 1


def _measure_all(url: str, rounds: int) -> list[Started]:
    wanted: tuple[tuple[str, Callable[[], float], float], ...] = (
        ("servebench --help", help_s, MAX_HELP_S),
        ("servebench run, to its first query", lambda: first_query_s(url), MAX_FIRST_QUERY_S),
    )
    times_s: list[list[float]] = [[] for _ in wanted]
    for number in range(1, rounds + 1):
        say(f"round {number} of {rounds}")
        for (_, measure, _), times in zip(wanted, times_s, strict=True):
            times.append(measure())
    return [Started(what, tuple(times), target_s) for (what, _, target_s), times in zip(wanted, times_s, strict=True)]


def _run(command: Sequence[str], *, allowed: Sequence[int] = (0,)) -> None:
    done = subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False)
    if done.returncode not in allowed:
        raise RunError(f"{' '.join(command[:2])} failed with exit code {done.returncode}: {' '.join(done.stderr.split())}")


if __name__ == "__main__":
    sys.exit(main())
