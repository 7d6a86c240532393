"""What a peer is: another load generator that can be pointed at the same server, on the same core, in the same run.

A peer is started as a process of its own, pinned to the client's CPUs, and bounded in time: it has
`GRACE_S` beyond what it was asked for, then everything that it started is killed. What it reports
is taken at its word: its own count of replies, its own clock, its own percentiles.
"""

from __future__ import annotations

import contextlib
import os
import resource
import subprocess
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

import psutil

from servebench.errors import RunError

#: ``closed``: a query follows a reply, ``connections`` at a time. Else arrivals at a rate, Poisson or evenly spaced.
Arrivals = Literal["closed", "poisson", "constant"]
#: ``openai`` is the chat completions API, for peers that speak nothing else (see `benchmarks.openai_stub`).
PeerProtocol = Literal["kserve-http", "kserve-grpc", "openai"]
Progress = Callable[[str], None]

#: How much longer than asked a peer's process may take: interpreters start, models of replies are built, reports are written.
GRACE_S = 60.0


@dataclass(frozen=True, slots=True)
class Target:
    """Who is asked what."""

    url: str  #: scheme, host and port; no path. ``http://`` or ``grpc://``
    model: str
    path: str  #: path of an HTTP POST, or a gRPC method (``/package.Service/Method``)
    body: bytes  #: of one query; for gRPC the serialised message without its frame
    headers: tuple[tuple[str, str], ...] = ()  #: of one HTTP query, beside host and content-length
    binary_model: str | None = None  #: a model with binary replies, where ``model`` answers in JSON, which some dislike

    @property
    def address(self) -> str:
        """Host and port."""
        return self.url.rpartition("//")[2]


@dataclass(frozen=True, slots=True)
class Load:
    """How a peer is to ask."""

    arrivals: Arrivals
    rate_qps: float | None  #: of an open loop; None in a closed one
    connections: int  #: queries outstanding in a closed loop, and at most in an open loop of a peer that has such a limit
    duration_s: float
    cpus: Sequence[int]

    @property
    def limit_s(self) -> float:
        """When the peer is killed."""
        return self.duration_s + GRACE_S


@dataclass(frozen=True, slots=True)
class PeerResult:
    """What a peer says that it did."""

    completed: int  #: queries answered without an error
    errors: int  #: queries that failed in any way the peer noticed
    duration_s: float  #: of the measurement, without the peer's start and end where it tells
    rate_qps: float  #: completed queries a second
    percentiles: (
        Mapping[float, int] | None
    )  #: of what the peer calls latency: percentile (50, 99, 99.9) -> ns; None when it has none
    cpu_s: float  #: CPU time of all its processes; with their start, unless the peer itself tells the two apart
    command: str  #: for the record


class Peer(Protocol):
    """A load generator to compare with."""

    @property
    def name(self) -> str:
        """What tables call it."""

    @property
    def protocols(self) -> frozenset[PeerProtocol]:
        """What it can speak."""

    @property
    def arrivals(self) -> frozenset[Arrivals]:
        """When it can send."""

    def absent(self) -> str | None:
        """One line on why it cannot run on this machine and what to install; None when it can (after `set_up`)."""

    def set_up(self, progress: Progress) -> None:
        """Make the peer's environment unless it is there; ``progress`` is told what takes long. `RunError` if it fails."""

    def run(self, target: Target, load: Load) -> PeerResult:
        """Send the load from one process. `RunError` when the peer fails, or takes more than `GRACE_S` longer."""


@dataclass(frozen=True, slots=True)
class Finished:
    """A process that ended by itself with exit code 0."""

    stdout: str
    stderr: str
    cpu_s: float  #: of the process and of all descendants that were waited for


def run_bounded(
    name: str,
    argv: Sequence[str],
    *,
    timeout_s: float,
    cpus: Sequence[int] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: bytes | None = None,
) -> Finished:
    """Run a command on ``cpus``; it and its descendants are gone when this returns, also by an exception.

    ``env`` is added to ours. `RunError` with the command's last words when it fails or takes longer than ``timeout_s``.
    """
    before = _children_cpu_s()
    with pinned(cpus):
        process = subprocess.Popen(
            list(argv),
            stdin=subprocess.DEVNULL if stdin is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={**os.environ, **(env or {})},
            cwd=cwd,
            start_new_session=True,
        )
    try:
        stdout, stderr = process.communicate(stdin, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        _kill_tree(process)
        raise RunError(f"{name} was still running after {timeout_s:g} s, and was killed") from None
    finally:
        _kill_tree(process)
    out, err = stdout.decode(errors="replace"), stderr.decode(errors="replace")
    if process.returncode != 0:
        raise RunError(
            f"{name} failed (exit code {process.returncode}): {last_words(err) or last_words(out) or 'it wrote nothing'}"
        )
    return Finished(out, err, _children_cpu_s() - before)


def last_words(output: str, limit: int = 300) -> str:
    """The end of what a command wrote, on one line."""
    return " ".join(output.split())[-limit:]


@contextlib.contextmanager
def pinned(cpus: Sequence[int] | None) -> Iterator[None]:
    """Keep this thread, and what it starts meanwhile, on ``cpus`` (None: where it is)."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, before if cpus is None else cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)


def _children_cpu_s() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def _kill_tree(process: subprocess.Popen[bytes]) -> None:
    """End the process, its descendants, and whatever is left of its process group."""
    with contextlib.suppress(psutil.NoSuchProcess):
        # A descendant may have left the group, and can be found only while its parents live.
        for descendant in psutil.Process(process.pid).children(recursive=True):
            with contextlib.suppress(psutil.NoSuchProcess):
                descendant.kill()
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, 9)
    process.wait()
    for stream in (process.stdin, process.stdout, process.stderr):
        if stream is not None:
            stream.close()
