"""Notices when the worker's own event loop stood still: the client's part in a bad number."""

from __future__ import annotations

import asyncio
import heapq
from pathlib import Path

from servebench.clock import now_ns

_BEAT_S = 0.005
#: A gap this much longer than the beat is a stall; uvloop's own timers are 1 ms coarse.
STALL_NS = 5_000_000
_KEPT = 20


def cpu_wait_ns() -> int | None:
    """How long this process's main thread has been ready to run so far while others had its CPU; None where it is not counted.

    The second field of ``schedstat`` (Linux, Documentation/scheduler/sched-stats.rst). What a hypervisor takes is not in it.
    """
    try:
        return int(Path("/proc/self/schedstat").read_text(encoding="ascii").split()[1])
    except (OSError, IndexError):
        return None


class StallMonitor:
    """A heartbeat on the loop; remembers the longest gaps (absolute start and length, ns)."""

    def __init__(self) -> None:
        self.count = 0
        self._longest: list[tuple[int, int]] = []  # heap of (duration, start)
        self._loop = asyncio.get_running_loop()
        self._last_ns = now_ns()
        self._handle = self._loop.call_later(_BEAT_S, self._beat)

    def stop(self) -> None:
        """End the heartbeat."""
        self._handle.cancel()

    def longest(self) -> list[tuple[int, int]]:
        """(start ns, duration ns) of the longest stalls, longest first, at most 20."""
        return [(start, duration) for duration, start in sorted(self._longest, reverse=True)]

    def _beat(self) -> None:
        now = now_ns()
        stalled_ns = now - self._last_ns - int(_BEAT_S * 1e9)
        if stalled_ns >= STALL_NS:
            self.count += 1
            heapq.heappush(self._longest, (stalled_ns, self._last_ns))
            if len(self._longest) > _KEPT:
                heapq.heappop(self._longest)
        self._last_ns = now
        self._handle = self._loop.call_later(_BEAT_S, self._beat)
