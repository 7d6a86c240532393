"""What others get out of the same null server on the same core: wrk in a closed loop, and a bare blocking socket.

Both send the query that servebench's own encoder makes, so all parties move the same bytes.
"""

from __future__ import annotations

import contextlib
import os
import random
import socket
import subprocess
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np

from benchmarks.nginx import INFER_PATH, INPUT
from servebench.clock import now_ns
from servebench.errors import RunError
from servebench.wire.http1 import encode_request
from servebench.wire.kserve import encode_infer

WRK_CONNECTIONS = 16
BODY, HEADERS = encode_infer([INPUT], {INPUT.name: np.zeros((1, 4), dtype=np.float32)}, tensor_format="json")


def ping_pong_ns(url: str, cpus: Sequence[int], *, rate_qps: float, duration_s: float) -> list[int]:
    """Times from send to reply of a blocking socket that spins until each Poisson arrival: the least Python can measure."""
    parts = urlsplit(url)
    request = encode_request("POST", INFER_PATH, parts.netloc, HEADERS, BODY)
    gaps, times_ns = random.Random(0), []
    with _pinned(cpus), socket.create_connection((parts.hostname, parts.port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        due_ns = now_ns()
        end_ns = due_ns + round(duration_s * 1e9)
        while due_ns < end_ns:
            while now_ns() < due_ns:
                pass
            sent_ns = now_ns()
            sock.sendall(request)
            sock.recv(65536)  # a reply this small comes in one piece
            times_ns.append(now_ns() - sent_ns)
            due_ns += round(gaps.expovariate(rate_qps) * 1e9)
    return times_ns


def wrk_qps(wrk: str, url: str, cpus: Sequence[int], *, duration_s: int) -> float:
    """Replies a second that wrk gets with one thread on ``cpus``, one query at a time a connection. `RunError` if it fails."""
    with tempfile.TemporaryDirectory(prefix="wrk-") as scratch, _pinned(cpus):
        script = Path(scratch) / "query.lua"
        script.write_text(wrk_script(), encoding="utf-8")
        argv = [wrk, "-t1", f"-c{WRK_CONNECTIONS}", f"-d{duration_s}s", "-s", str(script), url + INFER_PATH]
        return parse_wrk(subprocess.run(argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False).stdout)


def wrk_script() -> str:
    """wrk's Lua script: the query, and a last line for `parse_wrk`."""
    return "\n".join(
        [
            'wrk.method = "POST"',
            f"wrk.body = [==[{BODY.decode()}]==]",
            *(f'wrk.headers["{name}"] = "{value}"' for name, value in HEADERS),
            "function done(summary)",
            "  local e = summary.errors",
            "  local failed = e.connect + e.read + e.write + e.timeout + e.status",
            '  io.write(string.format("RESULT %d %d %d\\n", summary.requests, summary.duration, failed))',
            "end",
            "",
        ]
    )


def parse_wrk(output: str) -> float:
    """Replies a second, out of wrk's output with our last line. `RunError` when wrk failed, or any of its requests did."""
    for line in output.splitlines():
        match line.split():
            case ["RESULT", requests, duration_us, "0"]:
                return int(requests) / (int(duration_us) / 1e6)
    raise RunError(f"wrk did not measure: {' '.join(output.split()) or 'it wrote nothing'}")


@contextlib.contextmanager
def _pinned(cpus: Sequence[int]) -> Iterator[None]:
    """Keep this thread, and what it starts, on ``cpus``."""
    before = os.sched_getaffinity(0)
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
