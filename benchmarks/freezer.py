"""Freezes the stub for a moment in the middle of somebody's traffic: SIGSTOP, a wait, SIGCONT."""

from __future__ import annotations

import os
import signal
import threading
from types import TracebackType

from benchmarks.arrivals_seen import Stub, fetch_stamps
from benchmarks.queue_theory import Freeze
from servebench.clock import now_ns

#: The freeze comes this long after the stub has seen this many queries: tools warm up and probe first.
AFTER_S = 2.0
AFTER_QUERIES = 100
_WATCH_INTERVAL_S = 0.05


class Freezer:
    """Watches for traffic while it is entered, and freezes the server once for ``freeze_s``; ``freeze`` tells when it did.

    The stub is asked for its stamps only until the traffic has begun, so nothing disturbs it around the freeze.
    On leaving, the server runs again, whatever happened.
    """

    def __init__(self, stub: Stub, freeze_s: float) -> None:
        self.freeze: Freeze | None = None  #: CLOCK_MONOTONIC; None until it is over
        self._stub = stub
        self._freeze_s = freeze_s
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Freezer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while len(fetch_stamps(self._stub)) < AFTER_QUERIES:
            if self._over.wait(_WATCH_INTERVAL_S):
                return
        if self._over.wait(AFTER_S):
            return
        begin_ns = now_ns()
        os.kill(self._stub.pid, signal.SIGSTOP)
        try:
            self._over.wait(self._freeze_s)
        finally:
            os.kill(self._stub.pid, signal.SIGCONT)
        self.freeze = Freeze(begin_ns, now_ns())
