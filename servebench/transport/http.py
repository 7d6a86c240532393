"""HTTP/1.1 over asyncio Protocols, made for load: one query at a time on warm keep-alive connections.

Strategy: a stack of idle connections (last used first, so a few stay hot and the rest age),
a queue of queries that found none, and connections opened on demand up to an explicit cap.
Sending is one non-blocking write on the socket itself, so the issue stamp is next to the
system call; the event loop's transport only takes over what the kernel would not accept at
once, and everything under TLS. The time stamp of received bytes is taken before they are
looked at. Nothing is ever retried: a connection that the server closed just as it was reused
is its own outcome, STALE. It is told from one closed while the query was being served by what
TCP knows: whether the server's host acknowledged any of the request before it closed.
"""

from __future__ import annotations

import asyncio
import fcntl
import os
import ssl
import struct
import termios
from collections import deque
from typing import cast

from servebench.clock import now_ns
from servebench.errors import TransportError
from servebench.record.outcome import Outcome
from servebench.transport.base import Sink, TransportStats
from servebench.transport.connecting import Address, connect, connect_outcome, connect_reason, read_http_address, resolve
from servebench.wire.faults import ProtocolFault
from servebench.wire.http1 import HeaderMemo, Progress, ResponseReader

_MAX_CONNECTS_IN_FLIGHT = 128
_IDLE = -1
# Looking an enum's member up costs more than the comparison it is for.
_PARTIAL, _COMPLETE_CLOSE = Progress.PARTIAL, Progress.COMPLETE_CLOSE


class Connection(asyncio.Protocol):
    """One keep-alive connection; carries at most one query at a time."""

    __slots__ = ("_fd", "_pool", "_size", "_transport", "chunks", "closed", "first_byte_ns", "number", "reader", "row", "used")

    def __init__(self, pool: HttpTransport, number: int, *, direct: bool) -> None:
        self._pool = pool
        self._fd = 0 if direct else -1
        self._size = 0
        self.number = number
        self.reader = ResponseReader(pool.memo)
        self.row = _IDLE
        self.used = False
        self.closed = False
        self.first_byte_ns = 0
        self.chunks: list[bytes] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has the methods, not the base class
        if self._fd == 0:
            self._fd = transport.get_extra_info("socket").fileno()

    def send(self, row: int, request: bytes | memoryview) -> None:
        """Hand one query to the socket."""
        pool = self._pool
        self.row = row
        size = self._size = len(request)
        self.first_byte_ns = 0
        self.chunks = [] if pool.sink.issued(row, now_ns(), self.number) else None
        if self._fd < 0:
            self._transport.write(request)
            return
        try:
            sent = os.write(self._fd, request)
        except BlockingIOError:
            sent = 0
        except OSError as error:
            self.fail(Outcome.STALE if self.used else Outcome.RESET, f"write: {os.strerror(error.errno or 0)}")
            return
        if sent != size:
            self._transport.write(memoryview(request)[sent:])

    def data_received(self, data: bytes) -> None:
        at_ns = now_ns()
        row = self.row
        if row == _IDLE:  # bytes that nobody asked for: whatever follows could not be trusted
            self.discard()
            return
        if self.first_byte_ns == 0:
            self.first_byte_ns = at_ns
        if self.chunks is not None:
            self.chunks.append(data)
        try:
            progress = self.reader.feed(data)
        except ProtocolFault as fault:
            self.fail(Outcome.PROTOCOL, str(fault), at_ns)
            return
        if progress is not _PARTIAL:
            self._finish(row, at_ns, progress, data)

    @property
    def usable(self) -> bool:
        """Whether another query may be sent; false as soon as either side has begun to close."""
        return not (self.closed or self._transport.is_closing())

    def eof_received(self) -> bool:
        self.closed = True  # the socket may be gone before connection_lost says so
        if self.row == _IDLE:
            return False
        at_ns = now_ns()
        if self.first_byte_ns:
            try:
                self._finish(self.row, at_ns, self.reader.eof(), b"")
            except ProtocolFault as fault:
                self.fail(Outcome.RESET, str(fault), at_ns)
        elif self.used and _unacknowledged_bytes(self._transport) >= self._size:
            self.fail(Outcome.STALE, "the server closed the idle connection as it was reused", at_ns)
        else:
            self.fail(Outcome.RESET, "the server closed the connection while the query was out, before any reply", at_ns)
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        ours, self.closed = self.closed, True
        if self.row != _IDLE:
            if self.first_byte_ns:
                self.fail(Outcome.RESET, "connection reset inside the reply")
            else:  # a reset, or TLS without its goodbye: nobody can say any more what had been acknowledged
                where = " (it had served queries before: perhaps closed while idle)" if self.used and not ours else ""
                self.fail(Outcome.RESET, f"connection closed before any reply{f': {exc}' if exc else ''}{where}")
        self.reader.close()
        self._pool.lost(self)

    def fail(self, outcome: Outcome, detail: str, at_ns: int | None = None) -> None:
        """End the current query without a reply, and throw the connection away."""
        row, self.row = self.row, _IDLE
        self.discard()
        self._pool.sink.failed(row, self.first_byte_ns, now_ns() if at_ns is None else at_ns, outcome, detail)

    def discard(self) -> None:
        """Close now; the pool stops using it."""
        self.closed = True
        self._transport.abort()

    def _finish(self, row: int, at_ns: int, progress: Progress, tail: bytes) -> None:
        self.row = _IDLE
        self.used = True
        pool, reader = self._pool, self.reader
        status = reader.status
        if 200 <= status < 300:
            pool.sink.completed(row, self.first_byte_ns, at_ns, status, reader.body_bytes)
            if self.chunks is not None:
                pool.sink.reply(row, self.chunks)
        else:
            pool.sink.refused(row, self.first_byte_ns, at_ns, status, reader.body_bytes, f"HTTP {status}", tail)
        self.chunks = None
        # An early reply: the rest of the request is still queued, so the next one could not follow it.
        if progress is _COMPLETE_CLOSE or self.closed or self._transport.get_write_buffer_size():
            self.discard()
        else:
            pool.free(self)


def _unacknowledged_bytes(transport: asyncio.Transport) -> int:
    """What the kernel has sent or will send, and the other host has not acknowledged (SIOCOUTQ, in termios' name)."""
    answer = fcntl.ioctl(transport.get_extra_info("socket").fileno(), termios.TIOCOUTQ, bytes(4))
    return cast(int, struct.unpack("i", answer)[0])


class HttpTransport:
    """A pool of connections to one ``http://`` or ``https://`` server; see `servebench.transport.base.Transport`.

    ``sink`` may be replaced between phases, while no query is outstanding.
    """

    def __init__(
        self,
        url: str,
        sink: Sink,
        *,
        max_connections: int | None = None,
        ssl_context: ssl.SSLContext | None = None,
        connect_timeout_s: float = 10.0,
    ) -> None:
        self._host, self._port, self._ssl = read_http_address(url, ssl_context)
        self._max_connections = max_connections
        self._connect_timeout_s = connect_timeout_s
        self._address: Address | None = None
        self._idle: list[Connection] = []
        # A run far behind its schedule holds millions here: two entries take 48 bytes a query, a tuple with its time 150.
        self._waiting: deque[int] = deque()  # rows; the complement of one that waits at the cap
        self._waiting_requests: deque[bytes | memoryview] = deque()
        self._connections: dict[int, Connection] = {}
        self._connecting: set[asyncio.Task[Connection]] = set()
        self._next_number = 0
        self.sink = sink
        self.memo: HeaderMemo = {}
        self.stats = TransportStats()

    def __repr__(self) -> str:
        return (
            f"<HttpTransport {self._host}:{self._port} open={len(self._connections)} "
            f"connecting={len(self._connecting)} waiting={len(self._waiting)}>"
        )

    async def open(self, connections: int) -> None:
        """Resolve the host once and open ``connections`` ahead (at least one is tried, to find out whether anybody listens)."""
        self._address = await resolve(self._host, self._port)
        wanted = max(1, min(connections, self._max_connections or connections))
        gate = asyncio.Semaphore(_MAX_CONNECTS_IN_FLIGHT)

        async def connect_one() -> OSError | TimeoutError | None:
            async with gate:
                try:
                    self._idle.append(await self._connect())
                except OSError as error:
                    return error
                return None

        failures = [error for error in await asyncio.gather(*(connect_one() for _ in range(wanted))) if error]
        if len(failures) == wanted:
            raise TransportError(f"{self._host}:{self._port}: cannot connect: {connect_reason(failures[0])}")

    def issue(self, row: int, request: bytes | memoryview) -> None:
        idle = self._idle
        while idle:
            connection = idle.pop()
            if connection.usable:
                connection.send(row, request)
                if not idle and not self._connecting and not self._at_cap():
                    self._start_connect()  # grow ahead: the next query should not wait for a handshake
                return
        stats = self.stats
        stats.connection_waits += 1
        if self._at_cap():
            stats.cap_waits += 1
            stats.cap_wait_ns -= now_ns()  # and when it leaves is added: the sum needs nobody's own time
            row = ~row
        self._waiting.append(row)
        self._waiting_requests.append(request)
        self._connect_for_waiting()

    def cancel(self, row: int, connection: int, outcome: Outcome, detail: str) -> None:
        found = self._connections.get(connection)
        if found is not None and found.row == row:
            found.fail(outcome, detail)

    def abandon_waiting(self) -> list[int]:
        return [self._next_waiting()[0] for _ in range(len(self._waiting))]

    async def close(self) -> None:
        for task in self._connecting:
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        for connection in list(self._connections.values()):
            connection.discard()
        self._idle.clear()
        await asyncio.sleep(0)  # let the transports run their connection_lost

    # --- called by connections ----------------------------------------------------------

    def free(self, connection: Connection) -> None:
        """A connection finished its query: give it the longest-waiting one, or rest it."""
        if self._waiting:
            connection.send(*self._next_waiting())
        else:
            self._idle.append(connection)

    def lost(self, connection: Connection) -> None:
        """A connection is gone; one that waits for a place under the cap may open now."""
        if self._connections.pop(connection.number, None) is not None:
            self.stats.connections_open -= 1
        self._connect_for_waiting()

    # --- connecting ---------------------------------------------------------------------

    def _at_cap(self) -> bool:
        cap = self._max_connections
        return cap is not None and len(self._connections) + len(self._connecting) >= cap

    def _next_waiting(self) -> tuple[int, bytes | memoryview]:
        """Take the longest-waiting query out of the line."""
        row = self._waiting.popleft()
        if row < 0:
            self.stats.cap_wait_ns += now_ns()
            row = ~row
        return row, self._waiting_requests.popleft()

    def _connect_for_waiting(self) -> None:
        if len(self._connecting) < len(self._waiting) and not self._at_cap():
            self._start_connect()

    def _start_connect(self) -> None:
        task = asyncio.get_running_loop().create_task(self._connect())
        self._connecting.add(task)
        task.add_done_callback(self._connect_ended)

    def _connect_ended(self, task: asyncio.Task[Connection]) -> None:
        self._connecting.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            self.free(task.result())
        elif isinstance(error, OSError):
            reason = connect_reason(error)
            self.stats.connect_failures[reason] = self.stats.connect_failures.get(reason, 0) + 1
            if self._waiting:
                row, _ = self._next_waiting()
                self.sink.failed(row, 0, now_ns(), connect_outcome(error), f"connect: {reason}")
                self._connect_for_waiting()
        else:
            raise error

    async def _connect(self) -> Connection:
        assert self._address is not None, "open() comes first"
        number = self._next_number
        self._next_number += 1
        connection = await connect(
            Connection(self, number, direct=self._ssl is None),
            self._address,
            tls=self._ssl,
            host=self._host,
            timeout_s=self._connect_timeout_s,
        )
        self._connections[number] = connection
        stats = self.stats
        stats.connections_opened += 1
        stats.connections_open += 1
        stats.connections_peak = max(stats.connections_peak, stats.connections_open)
        return connection
