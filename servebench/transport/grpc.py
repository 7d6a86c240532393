"""Unary gRPC calls over HTTP/2, made for load: many streams on a few connections ("channels").

Strategy: a fixed number of channels, each call on the one with the fewest active streams.
A channel that says GOAWAY or breaks is replaced at once, and finishes what it is allowed to.
(One that breaks just after it opened, before it carried a call, is replaced when a call needs
it: a server that turns every connection away must not keep us connecting.)
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

from servebench.clock import now_ns
from servebench.errors import TransportError
from servebench.record.outcome import Outcome
from servebench.transport.base import Sink, TransportStats
from servebench.transport.connecting import Address, connect, connect_outcome, connect_reason, read_grpc_address, resolve
from servebench.wire.faults import ProtocolFault
from servebench.wire.grpc import read_end
from servebench.wire.http2 import HeaderMemo, Http2Client, Stream

_SHORT_LIFE_NS = 1_000_000_000


class Channel(asyncio.Protocol):
    """One HTTP/2 connection."""

    def __init__(self, pool: GrpcTransport, number: int) -> None:
        loop = asyncio.get_running_loop()
        self._pool = pool
        self._fd = -1
        self._is_ready = False
        self._opened_ns = 0
        self.number = number
        self.http2 = Http2Client(pool.header_block, pool.memo)
        self.settled: asyncio.Future[None] = loop.create_future()  #: done when calls may be sent, or never will be
        self.gone: asyncio.Future[None] = loop.create_future()  #: done when the connection is closed

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)  # uvloop's has the methods, not the base class
        self._opened_ns = now_ns()
        self._pool.opened(self)
        tls = transport.get_extra_info("ssl_object")
        if tls is None:
            self._fd = transport.get_extra_info("socket").fileno()
        elif tls.selected_alpn_protocol() != "h2":
            self.break_off(Outcome.PROTOCOL, "the server does not speak HTTP/2 over TLS (ALPN h2)", self._opened_ns)
            return
        self._write(self.http2.preface())

    @property
    def usable(self) -> bool:
        """Whether either side has not begun to close."""
        return not self._transport.is_closing()

    @property
    def short_lived(self) -> bool:
        """Whether it opened just now and never carried a call."""
        return not self.http2.used and now_ns() - self._opened_ns < _SHORT_LIFE_NS

    def send(self, row: int, message: bytes | memoryview) -> None:
        """Open a stream for one call."""
        keep = self._pool.sink.issued(row, now_ns(), self.number)
        self._write(self.http2.request(row, message, keep=keep))

    def data_received(self, data: bytes) -> None:
        at_ns = now_ns()
        http2, pool = self.http2, self._pool
        ended: list[Stream] = []
        fault = None
        try:
            http2.feed(data, at_ns, ended)
        except ProtocolFault as error:
            fault = str(error)
        if http2.outgoing:
            self._flush()
        for stream in ended:
            pool.finish(stream, at_ns)
        if fault is not None:
            self.break_off(Outcome.PROTOCOL, fault, at_ns)
        elif http2.goaway is not None:
            pool.retire(self)
        elif http2.ready and not self._is_ready:
            self._is_ready = True
            pool.ready(self)
            _settle(self.settled)
        if pool.waiting:
            pool.serve_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        goaway = self.http2.goaway
        detail = f"connection lost{f' after {goaway}' if goaway else ''}{f': {exc}' if exc else ''}"
        self._pool.closed(self)
        self.gone.set_result(None)
        self.break_off(Outcome.RESET, detail, now_ns())

    def cancel(self, row: int) -> Stream | None:
        """Give a call up; None when it has ended."""
        stream = self.http2.cancel(row)
        if stream is not None and self.usable:
            self._flush()
        return stream

    def break_off(self, outcome: Outcome, detail: str, at_ns: int) -> None:
        """The connection is of no more use: its calls end, and it is closed."""
        self.discard()
        _settle(self.settled, ConnectionError(detail))
        for stream in self.http2.drop_all():
            self._pool.sink.failed(stream.row, stream.first_byte_ns, at_ns, outcome, detail)

    def discard(self) -> None:
        """Close now."""
        self._pool.leave(self)
        self._transport.abort()

    def _flush(self) -> None:
        out = bytes(self.http2.outgoing)
        self.http2.outgoing.clear()
        self._write(out)

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


def _settle(future: asyncio.Future[None], error: Exception | None = None) -> None:
    """Decide a future that perhaps nobody awaits any more."""
    if future.done():
        return
    if error is None:
        future.set_result(None)
    else:
        future.set_exception(error)
        future.exception()  # counts as looked at


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
        self._host, self._port, tls = read_grpc_address(url)
        self._ssl: ssl.SSLContext | None = None
        if tls:
            self._ssl = ssl_context or ssl.create_default_context()
            self._ssl.set_alpn_protocols(["h2"])
        self._wanted = channels
        self._connect_timeout_s = connect_timeout_s
        self._address: Address | None = None
        self._open: dict[int, Channel] = {}  # until their connection is closed
        self._channels: dict[int, Channel] = {}  # of those, the ones that take calls
        self._connecting: set[asyncio.Task[None]] = set()
        self._next_number = 0
        # A run far behind its schedule holds millions here: two entries take 48 bytes a call, a tuple with its time 150.
        self.waiting: deque[int] = deque()  #: rows; the complement of one that waits for a stream
        self._waiting_messages: deque[bytes | memoryview] = deque()
        self.sink = sink
        self.header_block = header_block
        self.memo: HeaderMemo = {}
        self.stats = TransportStats()

    def __repr__(self) -> str:
        return (
            f"<GrpcTransport {self._host}:{self._port} channels={len(self._channels)} "
            f"going={len(self._open) - len(self._channels)} connecting={len(self._connecting)} waiting={len(self.waiting)}>"
        )

    async def open(self, connections: int) -> None:
        """Resolve the host once and open all channels (``connections`` is HTTP/1.1's matter)."""
        self._address = await resolve(self._host, self._port)
        results = await asyncio.gather(*(self._connect() for _ in range(self._wanted)), return_exceptions=True)
        for result in results:
            if isinstance(result, BaseException) and not isinstance(result, OSError):
                raise result
        if not self._channels:
            failure = next((result for result in results if isinstance(result, OSError)), None)
            reason = connect_reason(failure) if failure else "the server closed the connection at once"
            raise TransportError(f"{self._host}:{self._port}: cannot connect: {reason}")

    def issue(self, row: int, request: bytes | memoryview) -> None:
        channel = None if self.waiting else self._emptiest()
        if channel is not None:
            channel.send(row, request)
            return
        stats = self.stats
        stats.connection_waits += 1
        if self._channels:
            stats.stream_waits += 1
            stats.stream_wait_ns -= now_ns()  # and when it leaves is added: the sum needs nobody's own time
            row = ~row
        self.waiting.append(row)
        self._waiting_messages.append(request)
        for one in [one for one in self._channels.values() if one.http2.goaway is not None]:
            self.retire(one)  # its stream numbers were used up
        self._reconnect()

    def cancel(self, row: int, connection: int, outcome: Outcome, detail: str) -> None:
        channel = self._open.get(connection)
        stream = channel.cancel(row) if channel is not None else None
        if channel is None or stream is None:
            return
        self.sink.failed(row, stream.first_byte_ns, now_ns(), outcome, detail)
        if channel.http2.goaway is not None:
            self.retire(channel)
        self.serve_waiting()

    def abandon_waiting(self) -> list[int]:
        return [self._next_waiting()[0] for _ in range(len(self.waiting))]

    async def close(self) -> None:
        self._wanted = 0
        for task in self._connecting:
            task.cancel()
        await asyncio.gather(*self._connecting, return_exceptions=True)
        channels = list(self._open.values())
        for channel in channels:
            channel.discard()
        await asyncio.gather(*(channel.gone for channel in channels))

    # --- called by channels -------------------------------------------------------------

    def opened(self, channel: Channel) -> None:
        """A channel has its connection."""
        self._open[channel.number] = channel
        stats = self.stats
        stats.connections_opened += 1
        stats.connections_open += 1
        stats.connections_peak = max(stats.connections_peak, stats.connections_open)

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
        while self.waiting and (channel := self._emptiest()) is not None:
            channel.send(*self._next_waiting())

    def ready(self, channel: Channel) -> None:
        """A channel takes calls."""
        self._channels[channel.number] = channel

    def retire(self, channel: Channel) -> None:
        """A channel takes no more calls, but finishes those it has."""
        self.leave(channel)
        if not channel.http2.streams:
            channel.discard()

    def leave(self, channel: Channel) -> None:
        """A channel takes no more calls: open another in its place."""
        if self._channels.pop(channel.number, None) is not None and (self.waiting or not channel.short_lived):
            self._reconnect()

    def closed(self, channel: Channel) -> None:
        """A channel's connection is closed, if it ever had one."""
        if self._open.pop(channel.number, None) is not None:
            self.stats.connections_open -= 1

    def _next_waiting(self) -> tuple[int, bytes | memoryview]:
        """Take the longest-waiting call out of the line."""
        row = self.waiting.popleft()
        if row < 0:
            self.stats.stream_wait_ns += now_ns()
            row = ~row
        return row, self._waiting_messages.popleft()

    # --- connecting ---------------------------------------------------------------------

    def _emptiest(self) -> Channel | None:
        while True:
            best, fewest = None, 1 << 62
            for channel in self._channels.values():
                http2 = channel.http2
                active = len(http2.streams)
                if active < fewest and active < http2.max_streams:
                    best, fewest = channel, active
            if best is None or best.usable:
                return best
            self.leave(best)

    def _reconnect(self) -> None:
        while len(self._channels) + len(self._connecting) < self._wanted:
            task = asyncio.get_running_loop().create_task(self._connect())
            self._connecting.add(task)
            task.add_done_callback(self._connect_ended)

    def _connect_ended(self, task: asyncio.Task[None]) -> None:
        self._connecting.discard(task)
        if task.cancelled():
            return
        error = task.exception()
        if error is None:
            if self.waiting:  # the channel may have broken meanwhile
                self._reconnect()
        elif isinstance(error, OSError):
            reason = connect_reason(error)
            self.stats.connect_failures[reason] = self.stats.connect_failures.get(reason, 0) + 1
            if self.waiting and not self._channels:
                row, _ = self._next_waiting()
                self.sink.failed(row, 0, now_ns(), connect_outcome(error), f"connect: {reason}")
                if self.waiting:  # with nobody waiting, the next call tries again
                    self._reconnect()
        else:
            raise error

    async def _connect(self) -> None:
        """Open one more channel, ready for calls. `OSError` when it cannot be."""
        assert self._address is not None, "open() comes first"
        number = self._next_number
        self._next_number += 1
        channel = Channel(self, number)
        try:
            await connect(channel, self._address, tls=self._ssl, host=self._host, timeout_s=self._connect_timeout_s)
        except BaseException:
            self.closed(channel)  # uvloop does not always say connection_lost of one that it gives up itself
            raise
        try:
            async with asyncio.timeout(self._connect_timeout_s):
                await channel.settled
        except BaseException:
            channel.discard()
            await channel.gone
            raise
