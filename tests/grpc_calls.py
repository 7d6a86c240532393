"""gRPC calls for tests of the gRPC transport: a server that a test scripts call by call, and transports to it.

The server's side is the h2 library's; what h2 would not send goes out frame by frame.
"""

import asyncio
import contextlib
import ssl
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from typing import Any

import h2.config
import h2.connection
import h2.events
from h2.settings import Settings
from hyperframe import frame as hf
from scripted_peers import Tape
from stream_server import serving

from servebench.record.outcome import Outcome
from servebench.transport.grpc import GrpcTransport
from servebench.wire.grpc import call_headers, frame_message, unframe_message

BLOCK = call_headers("test", "/test.Echo/Reverse", tls=False, timeout_ns=10**10, metadata=[("x-one", "1")])
REQUEST = frame_message(b"payload")
LAST = 2**31 - 1


@dataclass(frozen=True)
class Call:
    """A complete call, as a server sees it."""

    number: int
    headers: dict[str, str]
    message: bytes


class Calls:
    """The server's side of one connection."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, settings: dict[int, int]) -> None:
        self.writer = writer
        self.http2 = h2.connection.H2Connection(h2.config.H2Configuration(client_side=False, header_encoding="utf-8"))
        self.http2.local_settings = Settings(client=False, initial_values=settings)
        self.resets: dict[int, int | None] = {}
        self.pongs = 0
        self._reader = reader
        self._headers: dict[int, dict[str, str]] = {}
        self._bodies: dict[int, bytes] = {}
        self._complete: deque[Call] = deque()
        self.http2.initiate_connection()
        self.flush()

    async def next(self) -> Call:
        """The next call whose request is complete. `ConnectionError` when the client is gone."""
        await self.until(lambda: bool(self._complete))
        return self._complete.popleft()

    async def settled(self) -> None:
        """Read, and acknowledge, the client's settings."""
        await self.until(lambda: self.http2.remote_settings.header_table_size == 0)

    async def heard(self) -> None:
        """Wait until the client has read all that was sent."""
        self.http2.ping(b"12345678")
        self.flush()
        wanted = self.pongs + 1
        await self.until(lambda: self.pongs == wanted)

    async def until(self, condition: Callable[[], bool]) -> None:
        """Read until something has happened."""
        while not condition():
            data = await self._reader.read(1 << 18)
            if not data:
                raise ConnectionResetError
            for event in self.http2.receive_data(data):
                self._take(event)
            self.flush()

    def _take(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.RequestReceived(stream_id=int(number), headers=headers):
                self._headers[number] = dict(headers or ())
                self._bodies[number] = b""
            case h2.events.DataReceived(stream_id=int(number), data=data):
                self._bodies[number] += data or b""
                self.http2.acknowledge_received_data(event.flow_controlled_length or 0, number)
            case h2.events.StreamEnded(stream_id=int(number)):
                self._complete.append(Call(number, self._headers[number], unframe_message(self._bodies[number])))
            case h2.events.PingAckReceived():
                self.pongs += 1
            case h2.events.StreamReset(stream_id=int(number), error_code=code):
                self.resets[number] = code

    def reply(self, call: Call, message: bytes = b"ok") -> None:
        """Answer with a message and status 0."""
        self.headers(call)
        body = frame_message(message)
        for position in range(0, len(body), self.http2.max_outbound_frame_size):
            self.http2.send_data(call.number, body[position : position + self.http2.max_outbound_frame_size])
        self.trailers(call, "0")

    def headers(self, call: Call) -> None:
        self.http2.send_headers(call.number, [(":status", "200"), ("content-type", "application/grpc")])
        self.flush()

    def trailers(self, call: Call, status: str, *, first: tuple[tuple[str, str], ...] = ()) -> None:
        self.http2.send_headers(call.number, [*first, ("grpc-status", status)], end_stream=True)
        self.flush()

    def raw(self, *frames: hf.Frame | bytes) -> None:
        """Bytes that h2 knows nothing of."""
        self.writer.write(b"".join(one if isinstance(one, bytes) else one.serialize() for one in frames))

    def flush(self) -> None:
        self.writer.write(self.http2.data_to_send())


Script = Callable[[Calls, int], Awaitable[None]]


@contextlib.asynccontextmanager
async def h2_serving(
    script: Script, settings: dict[int, int] | None = None, tls: ssl.SSLContext | None = None
) -> AsyncIterator[str]:
    """A server that runs ``script(calls, connection number)`` on each connection; its faults are the test's."""
    faults: list[Exception] = []

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        try:
            await script(Calls(reader, writer, settings or {}), number)
        except ConnectionError:
            pass
        except Exception as fault:
            faults.append(fault)
        except asyncio.CancelledError:  # the test has failed
            writer.transport.abort()
            raise

    async with serving(accept, tls) as url:
        yield url.replace("http", "grpc", 1)
    assert faults == []


@contextlib.asynccontextmanager
async def made(
    url: str, tape: Tape, channels: int = 1, *, block: bytes = BLOCK, **settings: Any
) -> AsyncIterator[GrpcTransport]:
    """A transport that is closed whatever happens: uvloop does not end where warnings are errors and a socket is left."""
    transport = GrpcTransport(url.replace("http", "grpc", 1), tape, block, channels=channels, **settings)
    try:
        yield transport
    finally:
        await transport.close()
    assert transport.stats.connections_open == 0


@contextlib.asynccontextmanager
async def opened(url: str, tape: Tape, channels: int = 1, **settings: Any) -> AsyncIterator[GrpcTransport]:
    async with made(url, tape, channels, **settings) as transport:
        await transport.open(1)
        yield transport


async def reversing(calls: Calls, number: int) -> None:
    while True:
        call = await calls.next()
        calls.reply(call, call.message[::-1])


async def ends(tape: Tape, rows: int) -> list[Outcome]:
    return [(await tape.of(row)).outcome for row in range(rows)]
