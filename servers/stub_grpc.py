"""One gRPC connection of the stub: calls in over HTTP/2, replies out when they are due.

Contract. Every complete unary call is answered at once, except an inference: that is admitted to
the queue, and its reply leaves when the queue says so. A call arrives when the chunk that ends it
does: ``now_ns`` is read before anything else happens to those bytes. A backlog, as it waits after a
freeze, is read in turns between which replies leave; its calls arrive when their turn comes.

Plan. The ``h2`` library does HTTP/2: an implementation of its own to test our client against. It
needs some 100 us to make the frames of a reply, so they are made ahead, while the query is in
service, and a departure is one system call. What makes that right: a header block of ours needs
no state (`_StatelessEncoder`), so blocks may leave in another order than they were made in; and
the windows were charged for what was made, so it is sent even if the call was given up since.

Limits. Settings bind from the start, before the client has acknowledged them (gRPC clients wait
for them). More calls than ``max_concurrent_streams`` end the connection, which is how h2
takes it. A client that says GOAWAY is not answered any more. Deadlines are the client's affair:
it gives the call up, which then gets no reply unless that was made already.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any, cast
from urllib.parse import quote

from h2 import events
from h2.config import H2Configuration
from h2.connection import H2Connection
from h2.errors import ErrorCodes
from h2.exceptions import ProtocolError
from h2.settings import SettingCodes, Settings
from hpack import Encoder
from hyperframe.frame import GoAwayFrame

from servebench.clock import now_ns

from .stub import StubOptions
from .stub_faults import Fault, Prepare
from .stub_grpc_kserve import INFER_PATH, CallError, GrpcModel, Inference, Status

Fields = tuple[tuple[bytes, bytes], ...]

_HEADERS: Fields = ((b":status", b"200"), (b"content-type", b"application/grpc"))
_TRAILERS: Fields = ((b"grpc-status", b"0"),)
# As a frame: 2^24 - 1 bytes of an unknown type, longer than any client allows.
_GARBAGE = b"\xff" * 9 + b" this is not HTTP/2\r\n\r\n"
_DEFAULT_WINDOW = 65_535
#: A call takes h2 some 0.2 ms, so a chunk of hundreds would hold up the departures: read so much of it at once (a few calls),
_SLICE_BYTES = 1024
#: and no more after so long.
_TURN_NS = 500_000
_MAX_HEADER_BYTES = 1 << 16
# Printable ASCII but "%" is not encoded in grpc-message ("gRPC over HTTP2", Responses).
_UNQUOTED = " !\"#$&'()*+,-./:;<=>?@[\\]^_`{|}~"


@lru_cache(maxsize=256)
def _header_block(fields: Fields) -> bytes:
    encoder = Encoder()
    encoder.header_table_size = 0
    return encoder.encode(fields)


class _StatelessEncoder(Encoder):
    """Makes header blocks that each begin by emptying the peer's header table (RFC 7541 section 6.3), and never refer to it."""

    def encode(self, headers: Iterable[Any], huffman: bool = True) -> bytes:
        """The block of ``headers``, a sequence of pairs of bytes."""
        return _header_block(tuple(headers))


@dataclass(slots=True, eq=False)
class Call:
    """A call that has not ended."""

    stream: int
    path: str
    received: list[bytes] = field(default_factory=list)
    #: The rest of the reply's message, and what follows it; None while that is to come.
    unsent: memoryview = field(default_factory=lambda: memoryview(b""))
    trailers: Fields | None = None
    #: The whole reply was given to h2.
    replied: bool = False
    #: The connection ends with it.
    closes: bool = False


@dataclass(frozen=True, slots=True)
class GrpcService:
    """What all connections share; ``admit`` is `StubServer.admit`, ``refusal`` what is said when that says no."""

    model: GrpcModel
    options: StubOptions
    admit: Callable[[int, Prepare], bool]
    refusal: str


class GrpcConnection(asyncio.Protocol):
    """The server's end of one client connection; ``connections`` holds it while it is open."""

    def __init__(self, service: GrpcService, connections: set[GrpcConnection]) -> None:
        self._service = service
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._fd = -1
        self._h2 = _start_h2(service.options)
        self._calls: dict[int, Call] = {}
        self._blocked: dict[int, Call] = {}  # the calls that have departed, but wait for a window
        self._accepted = 0
        self._leaving = False  # GOAWAY has been said
        self._given_up: set[int] = set()
        self._arrival_ns = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Send our settings."""
        self._transport = cast(asyncio.Transport, transport)
        self._fd = transport.get_extra_info("socket").fileno()
        self._connections.add(self)
        self._flush()

    def data_received(self, data: bytes) -> None:
        """Bytes of calls; complete ones are handled before this returns, but for those of a backlog."""
        self._read(now_ns(), data)

    def _read(self, arrival_ns: int, data: bytes) -> None:
        self._arrival_ns = arrival_ns
        for at in range(0, len(data), _SLICE_BYTES):
            transport = self._transport
            if transport is None:
                return
            if at and now_ns() - arrival_ns > _TURN_NS:
                transport.pause_reading()
                asyncio.get_running_loop().call_soon(self._read_on, data[at:])
                return
            self._receive(transport, data[at : at + _SLICE_BYTES])

    def _read_on(self, data: bytes) -> None:
        if self._transport is not None:
            self._transport.resume_reading()
        self._read(now_ns(), data)

    def _receive(self, transport: asyncio.Transport, data: bytes) -> None:
        try:
            received = self._h2.receive_data(data)
        except ProtocolError:
            self._flush()  # a GOAWAY with the error's code
            self._close()
            return
        # h2 is at the end of the slice already. What it has closed by then can be answered no more,
        # so ends come first: a call that is given up in the slice that completes it never arrived.
        self._given_up = {event.stream_id for event in received if isinstance(event, events.StreamReset)}
        for stream in self._given_up:
            if call := self._calls.get(stream):
                self._end(call)
        if any(isinstance(event, events.ConnectionTerminated) for event in received):
            self._close()
        for event in received:
            if transport.is_closing():
                return
            self._take(event)
        for call in list(self._blocked.values()):
            self._continue(call)
        self._flush()

    def connection_lost(self, exc: Exception | None) -> None:
        """Replies that are still owed are dropped."""
        self._transport = None
        self._calls.clear()
        self._blocked.clear()
        self._connections.discard(self)
        vars(self._h2).clear()  # it refers to itself, and garbage collection is off

    def abort(self) -> None:
        """End the connection now."""
        if self._transport is not None:
            self._transport.abort()

    # Receiving.

    def _take(self, event: events.Event) -> None:
        match event:
            case events.RequestReceived():
                self._open(event.stream_id, dict(event.headers))
            case events.DataReceived():
                if call := self._calls.get(event.stream_id):
                    call.received.append(event.data)
                self._h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case events.StreamEnded():
                if call := self._calls.get(event.stream_id):
                    self._handle(call)

    def _open(self, stream: int, headers: dict[bytes, bytes]) -> None:
        if stream in self._given_up:
            return
        if self._leaving:
            self._h2.reset_stream(stream, ErrorCodes.REFUSED_STREAM)
            return
        self._calls[stream] = Call(stream, headers.get(b":path", b"").decode("latin-1"))
        self._accepted += 1
        if self._accepted == self._service.options.goaway_after:
            # h2's own GOAWAY would be the end: it cannot finish calls after one.
            self._leaving = True
            self._write(GoAwayFrame(0, last_stream_id=stream).serialize())

    def _handle(self, call: Call) -> None:
        model = self._service.model
        data = b"".join(call.received)
        call.received.clear()
        try:
            if call.path != INFER_PATH:
                self._begin(call, model.answer(call.path, data))
                self._depart(call, b"")
            elif not self._service.admit(self._arrival_ns, partial(self._prepare, call, model.read(data))):
                raise CallError(Status.UNAVAILABLE, self._service.refusal)
        except CallError as error:
            self._fail(call, error.status, str(error))
            self._depart(call, b"")

    # Replying: `_begin` and `_fail` give h2 what there is to say, `_depart` sends it.

    def _prepare(self, call: Call, inference: Inference, fault: Fault | None) -> Callable[[], None]:
        if self._calls.get(call.stream) is not call or fault is Fault.HANG:
            return _do_nothing
        if fault is Fault.GARBAGE:
            return partial(self._write, _GARBAGE)
        self._flush()  # what it has to say by itself must not wait for the departure
        message = self._service.model.reply(inference, empty=fault is Fault.WRONG_OUTPUT)
        half = len(message) // 2
        rest = b""
        match fault:
            case Fault.STATUS:
                self._fail(call, Status.UNAVAILABLE, "an injected fault")
            case Fault.RESET:
                self._h2.reset_stream(call.stream, ErrorCodes.INTERNAL_ERROR)
                call.replied = True
            case Fault.TRUNCATED:
                self._begin(call, message[:half])
            case Fault.SLOW_BODY:
                self._begin(call, message[:half], None)
                rest = message[half:]
            case _:
                call.closes = fault is Fault.CLOSE_IDLE
                self._begin(call, message)
        return partial(self._depart, call, self._h2.data_to_send(), rest)

    def _begin(self, call: Call, message: bytes, trailers: Fields | None = _TRAILERS) -> None:
        self._h2.send_headers(call.stream, _HEADERS)
        call.unsent = memoryview(message)
        call.trailers = trailers
        self._push(call)

    def _fail(self, call: Call, status: Status, message: str) -> None:
        trailers = ((b"grpc-status", b"%d" % status), (b"grpc-message", quote(message, safe=_UNQUOTED).encode()))
        self._h2.send_headers(call.stream, _HEADERS + trailers, end_stream=True)
        call.replied = True

    def _push(self, call: Call) -> None:
        """Give h2 as much of a reply as the client's windows allow."""
        http2, stream = self._h2, call.stream
        while call.unsent:
            size = min(len(call.unsent), http2.local_flow_control_window(stream), http2.max_outbound_frame_size)
            if size <= 0:
                return
            http2.send_data(stream, call.unsent[:size])
            call.unsent = call.unsent[size:]
        if call.trailers is not None:
            http2.send_headers(stream, call.trailers, end_stream=True)
            call.replied = True

    def _depart(self, call: Call, frames: bytes, rest: bytes = b"") -> None:
        """Send ``frames``, made of a reply, and what may follow them; ``rest`` of its message follows later."""
        self._write(frames)
        self._continue(call)
        if rest:
            delay_s = self._service.options.faults.slow_body_delay_ms / 1e3
            asyncio.get_running_loop().call_later(delay_s, self._resume, call, rest)

    def _resume(self, call: Call, rest: bytes) -> None:
        call.unsent = memoryview(bytes(call.unsent) + rest)
        call.trailers = _TRAILERS
        self._continue(call)

    def _continue(self, call: Call) -> None:
        """Send what is left of a reply, as far as the client's windows allow."""
        if self._calls.get(call.stream) is not call:  # it was given up, or the connection is gone
            return
        if not call.replied:
            self._push(call)
        self._flush()
        if call.replied:
            self._end(call)
        elif call.unsent:
            self._blocked[call.stream] = call
        else:
            self._blocked.pop(call.stream, None)

    def _end(self, call: Call) -> None:
        self._blocked.pop(call.stream, None)
        del self._calls[call.stream]
        if (call.closes and call.replied) or (self._leaving and not self._calls):
            self._close()

    # The socket.

    def _flush(self) -> None:
        """Send what h2 has to say."""
        self._write(self._h2.data_to_send())

    def _write(self, data: bytes) -> None:
        # By a system call of our own: the loop's transport would wait for the end of the loop's iteration.
        transport = self._transport
        if transport is None or not data:
            return
        sent = 0
        if not transport.get_write_buffer_size():
            try:
                sent = os.write(self._fd, data)
            except BlockingIOError:
                pass
            except OSError:  # the client has gone; the loop will notice
                return
        if sent != len(data):
            transport.write(memoryview(data)[sent:])

    def _close(self) -> None:
        if self._transport is not None:
            self._transport.close()
            self._transport = None
            self._calls.clear()
            self._blocked.clear()


def _start_h2(options: StubOptions) -> H2Connection:
    # What we send is constant and known to be right; checking it again for every call takes 30 us.
    config = H2Configuration(client_side=False, validate_outbound_headers=False, normalize_outbound_headers=False)
    http2 = H2Connection(config)
    settings = {
        SettingCodes.INITIAL_WINDOW_SIZE: options.initial_window_size,
        SettingCodes.MAX_HEADER_LIST_SIZE: _MAX_HEADER_BYTES,
    }
    if options.max_concurrent_streams is not None:
        settings[SettingCodes.MAX_CONCURRENT_STREAMS] = options.max_concurrent_streams
    http2.local_settings = Settings(client=False, initial_values=settings)
    http2.encoder = _StatelessEncoder()
    http2.initiate_connection()
    if options.initial_window_size > _DEFAULT_WINDOW:
        http2.increment_flow_control_window(options.initial_window_size - _DEFAULT_WINDOW)
    return http2


def _do_nothing() -> None:
    pass
