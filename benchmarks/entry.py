"""How every benchmark begins and ends: its one option, what the machine must have, its exit codes."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Protocol

from benchmarks.nghttpd import find_nghttpd
from benchmarks.nginx import find_nginx
from servebench.errors import ServebenchError


class MachineLacks(Exception):
    """What the benchmark needs and this machine does not have, in one line that says what to do."""


class Measure(Protocol):
    """A benchmark's body: measures, reports, and returns 0 when its targets or floors are met, else 1."""

    def __call__(self, *, quick: bool) -> int: ...


def enter(measure: Measure, name: str, doc: str, argv: Sequence[str] | None, *, quick_help: str) -> int:
    """Run ``python -m benchmarks.NAME``; ``doc`` is its module's.

    Returns ``measure``'s exit code; 1 when it fails, 2 when the machine lacks something, each with a line on stderr;
    130 when it is interrupted.
    """
    what, _, details = doc.replace("`", "").partition("\n\n")
    parser = argparse.ArgumentParser(
        prog=f"python -m benchmarks.{name}",
        description=what,
        epilog=details,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help=quick_help)
    quick: bool = parser.parse_args(argv).quick
    os.environ.setdefault("GRPC_VERBOSITY", "ERROR")  # else every start of a worker is a line about fork
    try:
        return measure(quick=quick)
    except MachineLacks as lack:
        print(lack, file=sys.stderr)
        return 2
    except (ServebenchError, OSError) as error:
        print(f"the measurement failed: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


def need_nginx() -> str:
    """Path of nginx. `MachineLacks` without one."""
    nginx = find_nginx()
    if nginx is None:
        raise MachineLacks("nginx was not found, and the null server is one: apt install nginx-light")
    return nginx


def need_nghttpd() -> str:
    """Path of nghttpd. `MachineLacks` without one."""
    nghttpd = find_nghttpd()
    if nghttpd is None:
        raise MachineLacks("nghttpd was not found, and the null gRPC server is one: apt install nghttp2-server")
    return nghttpd


def need_cpus() -> list[int]:
    """The CPUs that may be used, ascending. `MachineLacks` if it is only one: a server and its clients need one each."""
    cpus = sorted(os.sched_getaffinity(0))
    if len(cpus) < 2:
        raise MachineLacks("one CPU is not enough: the server and the load generator need one each")
    return cpus


def say(line: str) -> None:
    """Print a line at once, for those who watch."""
    print(line, flush=True)
