"""Unary gRPC calls over HTTP/2, made for load: many streams on a few connections ("channels").

Strategy: a fixed number of channels, each call on the one with the fewest active streams.
A channel that says GOAWAY or breaks is replaced at once, and finishes what it is allowed to.
The server's MAX_CONCURRENT_STREAMS is respected: a call that finds every channel full waits in
order, and is counted. As over HTTP/1.1, bytes are written by one system call right after the
issue stamp, receipt is stamped before parsing, and nothing is ever retried.
"""

from __future__ import annotations

import asyncio
import os
import ssl
from collections import deque
from typing import cast
from urllib.parse import urlsplit

from servebench.clock import now_ns
from servebench.errors import TransportError
from servebench.record.outcome import Outcome
from servebench.transport.base import Sink, TransportStats
from servebench.transport.connecting import Address, connect, connect_outcome, connect_reason, resolve
from servebench.wire.faults import ProtocolFault
from servebench.wire.grpc import read_end
from servebench.wire.http2 import HeaderMemo, Http2Client, Stream


class Channel(asyncio.Protocol):
    """One HTTP/2 connection."""

    def __init__(self, pool: GrpcTransport, number: int, *, direct: bool) -> None:
        self._pool = pool
        self._fd = 0 if direct else -1
        self.number = number
        self.http2 = Http2Client(pool.header_block, pool.memo)
        self.closed = False
        self.settled: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has the methods, not the base class
        if self._fd == 0:
            self._fd = transport.get_extra_info("socket").fileno()
        self._write(self.http2.preface())

    @property
    def capacity(self) -> int:
        """How many more calls may be sent now."""
        return 0 if self.closed or self._transport.is_closing() else self.http2.capacity

    def send(self, row: int, message: bytes | memoryview) -> None:
        """Open a stream for one call."""
        keep = self._pool.sink.issued(row, now_ns(), self.number)
        self._write(self.http2.request(row, message, keep=keep))

    def data_received(self, data: bytes) -> None:
        at_ns = now_ns()
        http2, was_going = self.http2, self.http2.goaway is not None
        try:
            ended = http2.feed(data, at_ns)
        except ProtocolFault as fault:
            self.break_off(Outcome.PROTOCOL, str(fault), at_ns)
            return
        if http2.outgoing:
            out = bytes(http2.outgoing)
            http2.outgoing.clear()
            self._write(out)
        for stream in ended:
            self._pool.finish(stream, at_ns)
        if http2.ready and not self.settled.done():
            self.settled.set_result(None)
        if http2.goaway is not None:
            if not was_going:
                self._pool.retire(self)
            if not http2.active:
                self.discard()
        if ended:
            self._pool.serve_waiting()

    def eof_received(self) -> bool:
        return False

    def connection_lost(self, exc: Exception | None) -> None:
        self.break_off(Outcome.RESET, f"connection lost{f': {exc}' if exc else ''}", now_ns())
        if not self.settled.done():
            self.settled.set_exception(ConnectionResetError("closed before the HTTP/2 settings were exchanged"))
        self._pool.lost(self)

    def cancel(self, row: int) -> Stream | None:
        """Give a call up; None when it has ended."""
        stream = self.http2.cancel(row)
        if stream is not None and not self.closed:
            out = bytes(self.http2.outgoing)
            self.http2.outgoing.clear()
            self._write(out)
        return stream

    def break_off(self, outcome: Outcome, detail: str, at_ns: int) -> None:
        """The connection is of no more use: its calls end, and it is closed."""
        self.discard()
        for stream in self.http2.drop_all():
            self._pool.sink.failed(stream.row, stream.first_byte_ns, at_ns, outcome, detail)

    def discard(self) -> None:
        """Close now."""
        self.closed = True
        self._transport.abort()

    def _write(self, data: bytes) -> None:
        if self._fd < 0 or self._transport.get_write_buffer_size():
            self._transport.write(data)
            return
        try:
            sent = os.write(self._fd, data)
        except BlockingIOError:
            sent = 0
        except OSError:
            # The peer is gone. Its last words may still be in our buffer: let the loop read them and then close.
            return
        if sent != len(data):
            self._transport.write(memoryview(data)[sent:])


class GrpcTransport:
    """Channels to one ``grpc://`` or ``grpcs://`` server; see `servebench.transport.base.Transport`.

    ``header_block`` is that of every call (`servebench.wire.grpc.call_headers`); requests are
    messages behind their prefix. ``sink`` may be replaced between phases, while no query is outstanding.
    """

    def __init__(
        self,
        url: str,
        sink: Sink,
        header_block: bytes,
        *,
        channels: int,
        ssl_context: ssl.SSLContext | None = None,
        connect_timeout_s: float = 10.0,
    ) -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("grpc", "grpcs") or parts.hostname is None or parts.port is None:
            raise TransportError(f"{url}: not a grpc:// or grpcs:// address with a port")
        self._host, self._port = parts.hostname, parts.port
        self._ssl: ssl.SSLContext | None = None
        if parts.scheme == "grpcs":
            self._ssl = ssl_context or ssl.create_default_context()
            self._ssl.set_alpn_protocols(["h2"])
        self._wanted = channels
        self._connect_timeout_s = connect_timeout_s
        self._address: Address | None = None
        self._channels: dict[int, Channel] = {}  # that take calls
        self._going: dict[int, Channel] = {}  # that finish theirs after a GOAWAY
        self._waiting: deque[tuple[int, bytes | memoryview, int]] = deque()
        self._connecting: set[asyncio.Task[Channel]] = set()
        self._next_number = 0
        self.sink = sink
        self.header_block = header_block
        self.memo: HeaderMemo = {}
        self.stats = TransportStats()

    def __repr__(self) -> str:
        return (
            f"<GrpcTransport {self._host}:{self._port} channels={len(self._channels)} going={len(self._going)} "
            f"connecting={len(self._connecting)} waiting={len(self._waiting)}>"
        )

    async def open(self, connections: int) -> None:
        """Resolve the host once and open all channels (``connections`` is HTTP/1.1's matter)."""
        self._address = await resolve(self._host, self._port)
        results = await asyncio.gather(*(self._connect() for _ in range(self._wanted)), return_exceptions=True)
        for result in results:
            if isinstance(result, Channel):
                self._channels[result.number] = result
            elif not isinstance(result, OSError):
                raise result
        if not self._channels:
            failure = next(result for result in results if isinstance(result, OSError))
            raise TransportError(f"{self._host}:{self._port}: cannot connect: {connect_reason(failure)}")

    def issue(self, row: int, request: bytes | memoryview) -> None:
        channel = None if self._waiting else self._emptiest()
        if channel is not None:
            channel.send(row, request)
            return
        self.stats.connection_waits += 1
        self.stats.stream_waits += bool(self._channels)
        self._waiting.append((row, request, now_ns()))
        self._reconnect()

    def cancel(self, row: int, connection: int, outcome: Outcome, detail: str) -> None:
        channel = self._channels.get(connection) or self._going.get(connection)
        stream = channel.cancel(row) if channel is not None else None
        if stream is not None:
            self.sink.failed(row, stream.first_byte_ns, now_ns(), outcome, detail)
            self.serve_waiting()

    def abandon_waiting(self) -> list[int]:
        rows = [row for row, _, _ in self._waiting]
        self._waiting.clear()
        return rows

    async def close(self) -> None:
        for task in self._connecting:
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        self._wanted = 0
        for channel in [*self._channels.values(), *self._going.values()]:
            channel.discard()
        await asyncio.sleep(0)  # let the transports run their connection_lost

    # --- called by channels -------------------------------------------------------------

    def finish(self, stream: Stream, at_ns: int) -> None:
        """A call has ended; tell the sink how."""
        kind, status, detail = read_end(stream)
        if kind == "ok":
            self.sink.completed(stream.row, stream.first_byte_ns, at_ns, 0, stream.body_bytes)
            if stream.kept is not None:
                self.sink.reply(stream.row, stream.kept)
        elif kind == "status":
            self.sink.refused(stream.row, stream.first_byte_ns, at_ns, status, stream.body_bytes, detail)
        else:
            outcome = Outcome.RESET if kind == "reset" else Outcome.PROTOCOL
            self.sink.failed(stream.row, stream.first_byte_ns, at_ns, outcome, detail)

    def serve_waiting(self) -> None:
        """Send calls that waited, as far as there is room now."""
        while self._waiting and (channel := self._emptiest()) is not None:
            row, request, since_ns = self._waiting.popleft()
            self.stats.stream_wait_ns += now_ns() - since_ns
            channel.send(row, request)

    def retire(self, channel: Channel) -> None:
        """A channel takes no more calls, but finishes those it has: open another."""
        if self._channels.pop(channel.number, None) is not None:
            self._going[channel.number] = channel
            self._reconnect()

    def lost(self, channel: Channel) -> None:
        """A channel is gone: open another in its place."""
        self.stats.connections_open -= 1
        self._going.pop(channel.number, None)
        if self._channels.pop(channel.number, None) is not None:
            self._reconnect()

    # --- connecting ---------------------------------------------------------------------

    def _emptiest(self) -> Channel | None:
        best, fewest = None, 1 << 62
        for channel in self._channels.values():
            active = channel.http2.active
            if active < fewest and channel.capacity > 0:
                best, fewest = channel, active
        return best

    def _reconnect(self) -> None:
        while len(self._channels) + len(self._connecting) < self._wanted:
            task = asyncio.get_running_loop().create_task(self._connect())
            self._connecting.add(task)
            task.add_done_callback(self._connect_ended)

    def _connect_ended(self, task: asyncio.Task[Channel]) -> None:
        self._connecting.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            channel = task.result()
            if channel.closed:  # it broke between its settings and now
                self._reconnect()
            else:
                self._channels[channel.number] = channel
                self.serve_waiting()
        elif isinstance(error, OSError):
            reason = connect_reason(error)
            self.stats.connect_failures[reason] = self.stats.connect_failures.get(reason, 0) + 1
            if self._waiting and not self._channels:
                row, _, _ = self._waiting.popleft()
                self.sink.failed(row, 0, now_ns(), connect_outcome(error), f"connect: {reason}")
            if self._waiting:  # with nobody waiting, the next call tries again
                self._reconnect()
        else:
            raise error

    async def _connect(self) -> Channel:
        assert self._address is not None, "open() comes first"
        number = self._next_number
        self._next_number += 1
        channel = Channel(self, number, direct=self._ssl is None)
        await connect(channel, self._address, tls=self._ssl, host=self._host, timeout_s=self._connect_timeout_s)
        stats = self.stats
        stats.connections_opened += 1
        stats.connections_open += 1
        stats.connections_peak = max(stats.connections_peak, stats.connections_open)
        async with asyncio.timeout(self._connect_timeout_s):
            await channel.settled
        return channel
