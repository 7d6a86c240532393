"""h2load: nghttp2's load generator, in C, over HTTP/1.1 and HTTP/2; gRPC is HTTP/2 with a prefix to it."""

from __future__ import annotations

import re
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.peers.base import Arrivals, Load, PeerProtocol, PeerResult, Progress, Target, last_words, run_bounded
from benchmarks.peers.numbers import of_times
from servebench.errors import RunError
from servebench.wire.grpc import frame_message

#: nghttpd, and most servers, allow that many streams a connection.
_MAX_STREAMS = 100
_FINISHED = re.compile(r"^finished in (\S+), ", re.MULTILINE)
_REQUESTS = re.compile(r"^requests: .* (\d+) succeeded, (\d+) failed, (\d+) errored, (\d+) timeout", re.MULTILINE)
_UNITS_S = {"us": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0}


@dataclass(frozen=True, slots=True)
class H2Load:
    """One thread. It does not look at grpc-status: a gRPC call counts as answered when HTTP says 200."""

    name: str = "h2load"
    protocols: frozenset[PeerProtocol] = frozenset({"kserve-http", "kserve-grpc", "openai"})
    arrivals: frozenset[Arrivals] = frozenset({"closed", "constant"})

    def absent(self) -> str | None:
        return None if shutil.which("h2load") else "not on the PATH (apt install nghttp2-client)"

    def set_up(self, progress: Progress) -> None:
        pass

    def run(self, target: Target, load: Load) -> PeerResult:
        grpc = target.url.startswith("grpc://")
        clients = -(-load.connections // _MAX_STREAMS) if grpc else load.connections
        with tempfile.TemporaryDirectory(prefix="h2load-") as scratch:
            body, log = Path(scratch) / "body", Path(scratch) / "log"
            body.write_bytes(frame_message(target.body) if grpc else target.body)
            # h2load knows whole seconds only.
            argv = ["h2load", "-t1", f"-c{clients}", f"-D{max(1, round(load.duration_s))}", "-d", str(body)]
            argv += [f"-m{-(-load.connections // clients)}"] if grpc else ["--h1"]
            if grpc:
                argv += ["-H", "content-type: application/grpc", "-H", "te: trailers"]
            argv += [word for name, value in target.headers for word in ("-H", f"{name}: {value}")]
            if load.rate_qps is not None:
                # A log of every request: the only percentiles it can give. In a closed loop it would cost what is measured.
                argv += [f"--rps={load.rate_qps / clients}", f"--log-file={log}"]
            argv.append(f"http://{target.address}{target.path}")
            finished = run_bounded(self.name, argv, timeout_s=load.limit_s, cpus=load.cpus)
            times_ns = logged_times_ns(log.read_text(encoding="ascii")) if log.exists() else None
        result = parse_h2load(finished.stdout, cpu_s=finished.cpu_s, command=" ".join(argv))
        if times_ns is None:
            return result
        return PeerResult(
            result.completed,
            result.errors,
            result.duration_s,
            result.rate_qps,
            of_times(times_ns),
            result.cpu_s,
            result.command,
        )


def parse_h2load(output: str, *, cpu_s: float, command: str) -> PeerResult:
    """h2load's summary. `RunError` when it measured nothing."""
    finished, requests = _FINISHED.search(output), _REQUESTS.search(output)
    if finished is None or requests is None:
        raise RunError(f"h2load did not measure: {last_words(output) or 'it wrote nothing'}")
    completed, failed, errored, timed_out = map(int, requests.groups())
    duration_s = _seconds(finished[1])
    return PeerResult(completed, failed + errored + timed_out, duration_s, completed / duration_s, None, cpu_s, command)


def logged_times_ns(log: str) -> np.ndarray[tuple[int], np.dtype[np.int64]]:
    """Times of the requests with status 200 in a ``--log-file``: lines of start, status, duration (us)."""
    rows = np.fromstring(log, dtype=np.int64, sep=" ").reshape(-1, 3)
    times_ns: np.ndarray[tuple[int], np.dtype[np.int64]] = rows[rows[:, 1] == 200, 2] * 1000
    return times_ns


def _seconds(text: str) -> float:
    match = re.fullmatch(r"([\d.]+)(us|ms|s|m)", text)
    if match is None:
        raise RunError(f"h2load did not measure: its duration reads {text!r}")
    return float(match[1]) * _UNITS_S[match[2]]
