"""What tests of every transport share: a sink that remembers, and scripted servers of each protocol.

A query's payload begins with its row (`payload_of`), so that a server knows whom it answers. A
`Script` says what it does with a query; the servers here act on it over real sockets: HTTP/1.1
written out by hand, gRPC on the h2 library. Neither shares code with the transports under test.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import struct
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import quote

import h2.config
import h2.connection
import h2.events
import h2.settings
import uvloop

from servebench.record.outcome import Outcome

_ROW = struct.Struct(">I")


def payload_of(row: int, rest: bytes = b"") -> bytes:
    """What a query sends."""
    return _ROW.pack(row) + rest


def row_of(payload: bytes) -> int:
    """Whose payload it is."""
    row: int = _ROW.unpack_from(payload)[0]
    return row


@dataclass(frozen=True)
class Answer:
    """What a server does with one query: not before ``after`` queries have ended at the client, and ``seen`` arrived here."""

    kind: Literal["reply", "refuse", "drop", "never"] = "reply"
    body: bytes = b"ok"
    after: int = 0
    seen: int = 0


#: payload -> its answer
Script = Callable[[bytes], Answer]

REFUSAL = "the queue is full: 100 % (3 > 2)"  #: what servers say when they refuse
REFUSAL_HTTP_STATUS = 503
REFUSAL_GRPC_STATUS = 14  # UNAVAILABLE, which client libraries also say of their own troubles


@dataclass
class End:
    """How a query ended, as the sink heard it."""

    outcome: Outcome
    first_byte_ns: int
    at_ns: int
    status: int = 0
    response_bytes: int = 0
    detail: str = ""


@dataclass
class Tape:
    """A sink that remembers, asks for every reply (``keep``), none, or some rows', and lets a test wait for a query's end."""

    keep: bool | set[int] = True
    issues: dict[int, tuple[int, int]] = field(default_factory=dict)  #: row -> (issued ns, connection)
    replies: dict[int, bytes] = field(default_factory=dict)
    order: list[int] = field(default_factory=list)  #: rows in the order of their ends
    _ends: dict[int, asyncio.Future[End]] = field(default_factory=dict)
    _changed: asyncio.Event = field(default_factory=asyncio.Event)

    def issued(self, row: int, at_ns: int, connection: int) -> bool:
        assert row not in self.issues, "issued twice"
        self.issues[row] = (at_ns, connection)
        return self.keep if isinstance(self.keep, bool) else row in self.keep

    def completed(self, row: int, first_byte_ns: int, at_ns: int, status: int, response_bytes: int) -> None:
        self._end(row, End(Outcome.OK, first_byte_ns, at_ns, status, response_bytes))

    def refused(
        self, row: int, first_byte_ns: int, at_ns: int, status: int, response_bytes: int, detail: str, tail: bytes = b""
    ) -> None:
        self._end(row, End(Outcome.STATUS, first_byte_ns, at_ns, status, response_bytes, detail + tail.decode("latin-1")))

    def failed(self, row: int, first_byte_ns: int, at_ns: int, outcome: Outcome, detail: str) -> None:
        self._end(row, End(outcome, first_byte_ns, at_ns, detail=detail))

    def reply(self, row: int, chunks: Sequence[bytes]) -> None:
        assert self.order[-1] == row, "a reply follows its query's end at once"
        assert row not in self.replies, "two replies to one query"
        self.replies[row] = b"".join(chunks)

    def _end(self, row: int, end: End) -> None:
        self.of(row).set_result(end)  # a second end is an InvalidStateError
        self.order.append(row)
        self._changed.set()

    def of(self, row: int) -> asyncio.Future[End]:
        """A query's end, now or later."""
        return self._ends.setdefault(row, asyncio.get_running_loop().create_future())

    async def ends(self, count: int) -> None:
        """Wait until that many queries have ended."""
        while len(self.order) < count:
            self._changed.clear()
            await self._changed.wait()


def run(test: Coroutine[Any, Any, None]) -> None:
    """Run a test on uvloop within a time; what fails in a callback fails the test."""
    faults: list[dict[str, Any]] = []

    async def bounded() -> None:
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(context))
        async with asyncio.timeout(20):
            await test

    uvloop.run(bounded())
    assert not faults, faults


async def until(condition: Callable[[], bool]) -> None:
    """Let the loop run until something has happened; whoever runs the test bounds it."""
    while not condition():
        await asyncio.sleep(0)


class Peer:
    """A scripted server on a free port of the loopback."""

    scheme = ""

    def __init__(
        self, script: Script, tape: Tape, *, max_streams: int | None = None, tls: ssl.SSLContext | None = None
    ) -> None:
        self.script = script
        self.tape = tape
        self.max_streams = max_streams
        self.tls = tls
        self.payloads: list[bytes] = []  #: in the order they arrived
        self.heads: list[bytes] = []  #: HTTP/1.1's
        self.accepted = 0  #: connections
        self.open = 0
        self.received_bytes = 0
        self.tasks: set[asyncio.Task[None]] = set()
        self.transports: set[asyncio.Transport] = set()
        self._arrived = asyncio.Event()

    async def __aenter__(self) -> Peer:
        loop = asyncio.get_running_loop()
        self._server = await loop.create_server(self.protocol, "127.0.0.1", 0, ssl=self.tls)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url = f"{self.scheme}{'s' if self.tls else ''}://127.0.0.1:{self.port}"
        return self

    async def __aexit__(self, *exception: object) -> None:
        await self.stop()

    def arrive(self, payload: bytes) -> None:
        """A whole query is here."""
        self.payloads.append(payload)
        self._arrived.set()

    async def seen(self, count: int) -> None:
        """Wait until that many queries have arrived."""
        while len(self.payloads) < count:
            self._arrived.clear()
            await self._arrived.wait()

    async def stop(self) -> None:
        """Stop listening and close every connection."""
        self._server.close()
        for task in self.tasks:
            task.cancel()
        await asyncio.gather(*self.tasks, return_exceptions=True)
        for transport in list(self.transports):
            transport.abort()
        await until(lambda: self.open == 0)

    def protocol(self) -> PeerConnection:
        raise NotImplementedError


class PeerConnection(asyncio.Protocol):
    """One connection of a scripted server."""

    def __init__(self, peer: Peer) -> None:
        self.peer = peer

    def connection_made(self, transport: Any) -> None:
        self.transport = transport
        self.peer.accepted += 1
        self.peer.open += 1
        self.peer.transports.add(transport)

    def connection_lost(self, error: Exception | None) -> None:
        self.peer.open -= 1
        self.peer.transports.discard(self.transport)

    def take(self, payload: bytes, *where: int) -> None:
        """A whole query is here: act as the script says."""
        self.peer.arrive(payload)
        answer = self.peer.script(payload)
        if answer.kind == "never":
            return
        task = asyncio.get_running_loop().create_task(self._act(answer, where))
        self.peer.tasks.add(task)
        task.add_done_callback(self.peer.tasks.discard)

    async def _act(self, answer: Answer, where: tuple[int, ...]) -> None:
        await self.peer.tape.ends(answer.after)
        await self.peer.seen(answer.seen)
        if not self.transport.is_closing():
            self.act(answer, *where)

    def act(self, answer: Answer, *where: int) -> None:
        raise NotImplementedError


class HttpPeer(Peer):
    """HTTP/1.1, one request after the other."""

    scheme = "http"

    def protocol(self) -> PeerConnection:
        return HttpConnection(self)


class HttpConnection(PeerConnection):
    """One HTTP/1.1 connection."""

    def __init__(self, peer: Peer) -> None:
        super().__init__(peer)
        self._data = bytearray()

    def data_received(self, data: bytes) -> None:
        self.peer.received_bytes += len(data)
        self._data += data
        end = self._data.find(b"\r\n\r\n")
        if end < 0:
            return
        head = bytes(self._data[:end])
        fields = dict(line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:])
        start, size = end + 4, int(fields[b"content-length"])
        if len(self._data) == start + size:
            payload = bytes(self._data[start:])
            self._data.clear()
            self.peer.heads.append(head)
            self.take(payload)

    def act(self, answer: Answer, *where: int) -> None:
        body = answer.body
        if answer.kind == "refuse":
            body = REFUSAL.encode()
            self.transport.write(b"HTTP/1.1 %d Busy\r\nContent-Length: %d\r\n\r\n" % (REFUSAL_HTTP_STATUS, len(body)) + body)
            return
        self.transport.write(b"HTTP/1.1 200 OK\r\nX-Peer: scripted\r\nContent-Length: %d\r\n\r\n" % len(body))
        if answer.kind == "drop":
            self.transport.write(body[: len(body) // 2])
            self.transport.close()
        else:
            self.transport.write(body)


class GrpcPeer(Peer):
    """Unary gRPC calls over HTTP/2."""

    scheme = "grpc"

    def protocol(self) -> PeerConnection:
        return GrpcConnection(self)


class GrpcConnection(PeerConnection):
    """One HTTP/2 connection."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        # Small control frames follow a message at once: they must not wait for its acknowledgement.
        transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.http2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        self._bodies: dict[int, bytearray] = {}
        self._unsent: dict[int, bytes] = {}
        if self.peer.max_streams is not None:
            self.http2.local_settings = h2.settings.Settings(
                client=False, initial_values={h2.settings.SettingCodes.MAX_CONCURRENT_STREAMS: self.peer.max_streams}
            )
        self.http2.initiate_connection()
        self.flush()

    def data_received(self, data: bytes) -> None:
        self.peer.received_bytes += len(data)
        for event in self.http2.receive_data(data):
            match event:
                case h2.events.RequestReceived():
                    self._bodies[event.stream_id] = bytearray()
                case h2.events.DataReceived():
                    self.http2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
                    self._bodies[event.stream_id] += event.data
                case h2.events.StreamEnded():
                    message = bytes(self._bodies[event.stream_id])
                    assert len(message) == 5 + int.from_bytes(message[1:5], "big")
                    self.take(message[5:], event.stream_id)
                case h2.events.StreamReset():
                    self._bodies.pop(event.stream_id, None)
                    self._unsent.pop(event.stream_id, None)
                case h2.events.WindowUpdated():
                    self._send()
        self.flush()

    def act(self, answer: Answer, *where: int) -> None:
        (stream,) = where
        if self._bodies.pop(stream, None) is None:  # the client gave it up
            return
        if answer.kind == "refuse":
            status = str(REFUSAL_GRPC_STATUS)
            fields = [*GRPC_HEADERS, ("grpc-status", status), ("grpc-message", quote(REFUSAL))]
            self.http2.send_headers(stream, fields, end_stream=True)
            self.flush()
            return
        self.http2.send_headers(stream, GRPC_HEADERS)
        message = struct.pack(">BI", 0, len(answer.body)) + answer.body
        if answer.kind == "drop":
            self.http2.send_data(stream, message[: len(message) // 2])
            self.flush()
            self.transport.close()
        else:
            self._unsent[stream] = message
            self._send()
            self.flush()

    def _send(self) -> None:
        for stream, message in list(self._unsent.items()):
            position = 0
            while position < len(message):
                size = min(self.http2.local_flow_control_window(stream), self.http2.max_outbound_frame_size)
                if size == 0:
                    break
                self.http2.send_data(stream, message[position : position + size])
                position += size
            if position < len(message):
                self._unsent[stream] = message[position:]
            else:
                del self._unsent[stream]
                self.http2.send_headers(stream, [("grpc-status", "0")], end_stream=True)

    def flush(self) -> None:
        """Send what h2 has gathered."""
        self.transport.write(self.http2.data_to_send())


GRPC_HEADERS = [(":status", "200"), ("content-type", "application/grpc")]
