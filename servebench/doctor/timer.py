"""How late this host's timer wakes the event loop: the floor under the client's issue delay.

Measured with the pacer's own timer, without its spinning (``pacing: eco``): how long after an
absolute time its callback runs.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Iterable
from dataclasses import dataclass

from servebench.clock import DeadlineTimer, now_ns


@dataclass(frozen=True, slots=True)
class TimerOvershoot:
    """How late ``count`` deadlines were noticed; the percentiles are observed values (nearest rank)."""

    count: int
    median_ns: int
    p99_ns: int


def summarize(late_ns: Iterable[int]) -> TimerOvershoot:
    """Percentiles of at least one delay."""
    ordered = sorted(late_ns)

    def nearest_rank(percentile: int) -> int:
        return ordered[math.ceil(percentile * len(ordered) / 100) - 1]

    return TimerOvershoot(len(ordered), nearest_rank(50), nearest_rank(99))


def measure_overshoot(count: int = 200, interval_ns: int = 2_000_000) -> TimerOvershoot:
    """Wait for ``count`` deadlines, ``interval_ns`` apart, so it takes their product. Starts an event loop of its own."""
    return summarize(asyncio.run(_lateness_ns(count, interval_ns)))


async def _lateness_ns(count: int, interval_ns: int) -> list[int]:
    loop = asyncio.get_running_loop()
    done = loop.create_future()
    late_ns: list[int] = []
    due_ns = 0

    def arm() -> None:
        nonlocal due_ns
        due_ns = now_ns() + interval_ns
        timer.arm(due_ns)

    def fired() -> None:
        late_ns.append(now_ns() - due_ns)
        if len(late_ns) < count:
            arm()
        else:
            done.set_result(None)

    timer = DeadlineTimer(loop, fired)
    try:
        arm()
        await done
    finally:
        timer.close()
    return late_ns
