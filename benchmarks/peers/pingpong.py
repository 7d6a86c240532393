"""A bare blocking socket that asks one query at a time: the least that Python can measure.

Between a reply and the next query it pauses for an exponential time, as long as a server is idle under Poisson arrivals
of that rate: how deeply the host's cores sleep meanwhile decides what the next wake-up takes.
"""

from __future__ import annotations

import random
import socket
import time
from collections.abc import Sequence
from urllib.parse import urlsplit

from benchmarks.nginx import INFER_PATH
from benchmarks.peers.base import pinned
from benchmarks.peers.query import BODY, HEADERS
from servebench.clock import now_ns
from servebench.engine.issuer import PRECISE_SPIN_NS
from servebench.wire.http1 import encode_request


def ping_pong_ns(url: str, cpus: Sequence[int], *, rate_qps: float, duration_s: float) -> list[int]:
    """Times from send to reply, ns; the pauses' mean is 1 / ``rate_qps``. It sleeps in them, and spins at their end."""
    parts = urlsplit(url)
    request = encode_request("POST", INFER_PATH, parts.netloc, HEADERS, BODY)
    gaps, times_ns = random.Random(0), []
    with pinned(cpus), socket.create_connection((parts.hostname, parts.port)) as sock:
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        end_ns = now_ns() + round(duration_s * 1e9)
        while now_ns() < end_ns:
            due_ns = now_ns() + round(gaps.expovariate(rate_qps) * 1e9)
            time.sleep(max(0, due_ns - PRECISE_SPIN_NS - now_ns()) / 1e9)
            while now_ns() < due_ns:
                pass
            sent_ns = now_ns()
            sock.sendall(request)
            sock.recv(65536)  # a reply this small comes in one piece
            times_ns.append(now_ns() - sent_ns)
    return times_ns
