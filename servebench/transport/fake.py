"""A transport without a network: queries end as a script says.

For tests, and for measuring how fast the issuer itself is. Like a real one it sends each query
on a connection of its own, up to an explicit cap; a query that finds none waits for one.
Unlike a real one it keeps what it was given to send (`FakeTransport.requests`).
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from servebench.clock import now_ns
from servebench.record.outcome import Outcome
from servebench.transport.base import Sink, Transport, TransportStats


@dataclass(frozen=True, slots=True)
class FakeEnd:
    """How a query shall end: OK with a reply, STATUS with a refusal, OUTSTANDING not by itself, anything else as failed."""

    outcome: Outcome = Outcome.OK
    delay_s: float | None = None  #: after it was sent; None: at once, before `FakeTransport.issue` returns
    status: int = 200
    reply: bytes = b""
    detail: str = "scripted"


_ANSWERED = FakeEnd()


def answer_at_once(_row: int) -> FakeEnd:
    """The default script: every query ends OK, with an empty reply, before `FakeTransport.issue` returns."""
    return _ANSWERED


class FakeTransport:
    """See `servebench.transport.base.Transport`. ``script(row)`` is asked as a query is sent.

    ``sink`` may be replaced between phases. ``clock`` gives the time stamps (ns).
    """

    def __init__(
        self,
        sink: Sink,
        script: Callable[[int], FakeEnd] = answer_at_once,
        *,
        max_connections: int | None = None,
        clock: Callable[[], int] = now_ns,
    ) -> None:
        self.sink = sink
        self.stats = TransportStats()
        self.requests: list[tuple[int, bytes | memoryview]] = []  #: (row, request) in the order of `issue`
        self._script = script
        self._max_connections = max_connections
        self._clock = clock
        self._idle: list[int] = []
        self._waiting: deque[int] = deque()
        self._out: dict[int, tuple[int, asyncio.TimerHandle | None]] = {}

    def __repr__(self) -> str:
        return f"<FakeTransport out={len(self._out)} idle={len(self._idle)} waiting={len(self._waiting)}>"

    async def open(self, connections: int) -> None:
        wanted = connections if self._max_connections is None else min(connections, self._max_connections)
        self._idle.extend(self._connect() for _ in range(wanted))

    def issue(self, row: int, request: bytes | memoryview) -> None:
        self.requests.append((row, request))
        if self._idle and not self._waiting:
            self._send(row, self._idle.pop())
        elif self._max_connections is None or self.stats.connections_open < self._max_connections:
            self._send(row, self._connect())
        else:
            self.stats.connection_waits += 1
            self.stats.cap_waits += 1
            self._waiting.append(row)

    def cancel(self, row: int, connection: int, outcome: Outcome, detail: str) -> None:
        if row in self._out and self._out[row][0] == connection:
            self._end(row, FakeEnd(outcome, detail=detail))

    def abandon_waiting(self) -> list[int]:
        rows = list(self._waiting)
        self._waiting.clear()
        return rows

    async def close(self) -> None:
        for row in list(self._out):
            self._end(row, FakeEnd(Outcome.RESET, detail="the transport was closed"))
        self._idle.clear()
        self.stats.connections_open = 0

    def _connect(self) -> int:
        stats = self.stats
        stats.connections_opened += 1
        stats.connections_open += 1
        stats.connections_peak = max(stats.connections_peak, stats.connections_open)
        return stats.connections_opened - 1

    def _send(self, row: int, connection: int) -> None:
        end = self._script(row)
        self._out[row] = (connection, None)
        keep = self.sink.issued(row, self._clock(), connection)
        if end.outcome is Outcome.OUTSTANDING:
            return
        if end.delay_s is None:
            self._end(row, end, keep=keep)
        else:
            loop = asyncio.get_running_loop()
            self._out[row] = (connection, loop.call_later(end.delay_s, lambda: self._end(row, end, keep=keep)))

    def _end(self, row: int, end: FakeEnd, *, keep: bool = False) -> None:
        connection, timer = self._out.pop(row)
        if timer is not None:
            timer.cancel()
        self._idle.append(connection)
        if self._waiting:  # through the loop: many that end at once would otherwise nest
            asyncio.get_running_loop().call_soon(self._serve_waiting)
        at_ns = self._clock()
        if end.outcome is Outcome.OK:
            self.sink.completed(row, at_ns, at_ns, end.status, len(end.reply))
            if keep:
                self.sink.reply(row, [end.reply])
        elif end.outcome is Outcome.STATUS:
            self.sink.refused(row, at_ns, at_ns, end.status, len(end.reply), end.detail, end.reply)
        else:
            self.sink.failed(row, 0, at_ns, end.outcome, end.detail)

    def _serve_waiting(self) -> None:
        if self._waiting and self._idle:
            self._send(self._waiting.popleft(), self._idle.pop())


_: type[Transport] = FakeTransport
