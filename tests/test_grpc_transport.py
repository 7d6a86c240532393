"""The gRPC transport over real sockets, against scripted h2 servers and against grpcio's own server.

What holds for every transport is in ``test_transport_contract``; here is what HTTP/2 and gRPC add:
streams that share a connection, limits and goodbyes of the server, and faults inside a reply.
"""

import asyncio
import contextlib
import json
import resource
import socket
import ssl
import struct
import threading
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import grpc
import h2.config
import h2.connection
import h2.events
import pytest
import trustme
from h2.settings import SettingCodes, Settings
from hyperframe import frame as hf
from test_http_transport import Tape, run, serving, until

from servebench.clock import now_ns
from servebench.errors import TransportError
from servebench.record.outcome import Outcome
from servebench.transport.grpc import GrpcTransport
from servebench.wire import http2
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


# --- one call -----------------------------------------------------------------------------------


def test_a_call_arrives_whole_and_its_reply_is_stamped_in_order() -> None:
    seen: list[Call] = []

    async def script(calls: Calls, number: int) -> None:
        while True:
            seen.append(await calls.next())
            calls.reply(seen[-1], b"reply")

    async def test() -> None:
        tape = Tape(keep={1})
        async with h2_serving(script) as url, opened(url, tape) as transport:
            for row in range(3):
                before_ns = now_ns()
                transport.issue(row, memoryview(REQUEST))
                end = await tape.of(row)
                assert (end.outcome, end.status, end.response_bytes) == (Outcome.OK, 0, 10)
                assert before_ns <= tape.issues[row][0] < end.first_byte_ns <= end.at_ns <= now_ns()
            assert {row: unframe_message(reply) for row, reply in tape.replies.items()} == {1: b"reply"}
            assert transport.stats.connection_waits == 0
        assert [call.number for call in seen] == [1, 3, 5]
        assert {call.message for call in seen} == {b"payload"}
        assert seen[2].headers == {
            ":method": "POST",
            ":scheme": "http",
            ":path": "/test.Echo/Reverse",
            ":authority": "test",
            "grpc-timeout": "10000m",
            "te": "trailers",
            "content-type": "application/grpc",
            "grpc-accept-encoding": "identity",
            "user-agent": "servebench",
            "x-one": "1",
        }

    run(test())


async def _status(calls: Calls, call: Call) -> None:
    calls.trailers(call, "14", first=((":status", "200"), ("grpc-message", quote("voll: größer als 3 €"))))


async def _late_status(calls: Calls, call: Call) -> None:
    calls.headers(call)
    calls.http2.send_data(call.number, frame_message(b"half an answer"))
    calls.trailers(call, "13")


async def _proxy(calls: Calls, call: Call) -> None:
    calls.http2.send_headers(call.number, [(":status", "502"), ("content-type", "text/html")])
    calls.http2.send_data(call.number, b"<html>", end_stream=True)
    calls.flush()


async def _no_status(calls: Calls, call: Call) -> None:
    calls.headers(call)
    calls.http2.send_data(call.number, frame_message(b"ok"), end_stream=True)
    calls.flush()


async def _two_messages(calls: Calls, call: Call) -> None:
    calls.headers(call)
    calls.http2.send_data(call.number, frame_message(b"ok") * 2)
    calls.trailers(call, "0")


async def _compressed(calls: Calls, call: Call) -> None:
    calls.headers(call)
    calls.http2.send_data(call.number, b"\1" + frame_message(b"ok")[1:])
    calls.trailers(call, "0")


async def _refused_stream(calls: Calls, call: Call) -> None:
    calls.http2.reset_stream(call.number, 7)
    calls.flush()


async def _reset_inside(calls: Calls, call: Call) -> None:
    calls.headers(call)
    calls.http2.send_data(call.number, frame_message(b"ok"))
    calls.http2.reset_stream(call.number, 2)
    calls.flush()


async def _reset_after(calls: Calls, call: Call) -> None:
    calls.reply(call)
    calls.raw(hf.RstStreamFrame(call.number, error_code=0))


async def _closed(calls: Calls, call: Call) -> None:
    calls.headers(call)
    calls.writer.close()


async def _aborted(calls: Calls, call: Call) -> None:
    sock = calls.writer.get_extra_info("socket")
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    calls.writer.transport.abort()


async def _push(calls: Calls, call: Call) -> None:
    calls.raw(hf.PushPromiseFrame(call.number, promised_stream_id=2, data=b"\x82", flags=["END_HEADERS"]))


async def _garbage(calls: Calls, call: Call) -> None:
    calls.raw(b"\xff" * 40)


async def _informational(calls: Calls, call: Call) -> None:
    calls.http2.send_headers(call.number, [(":status", "103"), ("link", "</a>")])
    calls.reply(call)


FAULTS = [
    pytest.param(_informational, Outcome.OK, 0, "", id="a 103 before the reply"),
    pytest.param(_reset_after, Outcome.OK, 0, "", id="reset after the reply"),
    pytest.param(_status, Outcome.STATUS, 14, "UNAVAILABLE: voll: größer als 3 €", id="an error status"),
    pytest.param(_late_status, Outcome.STATUS, 13, "INTERNAL", id="an error status after a message"),
    pytest.param(_proxy, Outcome.STATUS, 502, "HTTP 502 without a grpc-status", id="a proxy's page"),
    pytest.param(_no_status, Outcome.PROTOCOL, 0, "the reply ended without a grpc-status", id="no grpc-status"),
    pytest.param(_two_messages, Outcome.PROTOCOL, 0, "more than one message", id="two messages"),
    pytest.param(_compressed, Outcome.PROTOCOL, 0, "is compressed", id="a compressed message"),
    pytest.param(_refused_stream, Outcome.RESET, 0, "RST_STREAM REFUSED_STREAM", id="a refused stream"),
    pytest.param(_reset_inside, Outcome.RESET, 0, "RST_STREAM INTERNAL_ERROR", id="reset inside the reply"),
]
FATAL_FAULTS = [
    pytest.param(_closed, Outcome.RESET, 0, "connection lost", id="closed inside the reply"),
    pytest.param(_aborted, Outcome.RESET, 0, "connection lost", id="connection reset"),
    pytest.param(_push, Outcome.PROTOCOL, 0, "PUSH_PROMISE although push is off", id="a push"),
    pytest.param(_garbage, Outcome.PROTOCOL, 0, "frame of 16777215 bytes", id="garbage"),
]


@pytest.mark.parametrize(("fault", "outcome", "status", "detail"), FAULTS + FATAL_FAULTS)
def test_a_fault_ends_its_call_and_the_next_one_works(
    fault: Callable[[Calls, Call], Awaitable[None]], outcome: Outcome, status: int, detail: str
) -> None:
    fatal = fault in [row.values[0] for row in FATAL_FAULTS]

    async def script(calls: Calls, number: int) -> None:
        if number == 0:
            calls.reply(await calls.next())
            await fault(calls, await calls.next())
        await reversing(calls, number)

    async def test() -> None:
        tape = Tape()
        async with h2_serving(script) as url, opened(url, tape) as transport:
            for row in range(4):
                transport.issue(row, REQUEST)
                end = await tape.of(row)
                if row == 1:
                    assert (end.outcome, end.status) == (outcome, status)
                    assert detail in end.detail
                else:
                    assert end.outcome is Outcome.OK
            assert len(tape.issues) == 4, "nothing was sent twice"
            assert transport.stats.connections_opened == (2 if fatal else 1)

    run(test())


def test_a_broken_connection_ends_every_call_on_it_but_not_those_already_answered() -> None:
    async def script(calls: Calls, number: int) -> None:
        if number == 0:
            first, _, third = [await calls.next() for _ in range(3)]
            # One write: the second reply and what breaks the protocol arrive together.
            calls.reply(third)
            await until(lambda: tape.of(2).done())
            calls.http2.send_headers(first.number, [(":status", "200")])
            calls.http2.send_data(first.number, frame_message(b"ok"))
            calls.http2.send_headers(first.number, [("grpc-status", "0")], end_stream=True)
            calls.raw(calls.http2.data_to_send() + b"\xff" * 9)
        await reversing(calls, number)

    tape = Tape()

    async def test() -> None:
        async with h2_serving(script) as url, opened(url, tape) as transport:
            for row in range(3):
                transport.issue(row, REQUEST)
            assert await ends(tape, 3) == [Outcome.OK, Outcome.PROTOCOL, Outcome.OK]
            transport.issue(3, REQUEST)
            assert (await tape.of(3)).outcome is Outcome.OK

    run(test())


def test_large_messages_both_ways_through_small_windows() -> None:
    async def test() -> None:
        tape = Tape(keep={0, 1, 2})
        settings = {SettingCodes.INITIAL_WINDOW_SIZE: 20_000}
        payloads = [bytes(range(256)) * 4096 * (row + 1) for row in range(3)]
        async with h2_serving(reversing, settings) as url, opened(url, tape) as transport:
            for row, payload in enumerate(payloads):
                transport.issue(row, frame_message(payload))
            for row, payload in enumerate(payloads):
                end = await tape.of(row)
                assert (end.outcome, end.response_bytes) == (Outcome.OK, len(payload) + 5)
                assert unframe_message(tape.replies[row]) == payload[::-1]
            assert transport.stats.connections_opened == 1

    run(test())


# --- many calls ---------------------------------------------------------------------------------


def test_calls_go_to_the_channel_with_the_fewest() -> None:
    gate = asyncio.Event()

    async def script(calls: Calls, number: int) -> None:
        held = [await calls.next() for _ in range(3)]
        await gate.wait()
        for call in reversed(held):
            calls.reply(call)
        await reversing(calls, number)

    async def test() -> None:
        tape = Tape()
        async with h2_serving(script) as url, opened(url, tape, channels=3) as transport:
            for row in range(9):
                transport.issue(row, REQUEST)
            assert [tape.issues[row][1] for row in range(9)] == [0, 1, 2] * 3
            gate.set()
            assert await ends(tape, 9) == [Outcome.OK] * 9
            assert (transport.stats.connections_peak, transport.stats.connection_waits) == (3, 0)

    run(test())


def test_the_servers_limit_of_streams_makes_calls_wait_and_is_counted() -> None:
    gate = asyncio.Event()

    async def script(calls: Calls, number: int) -> None:
        held = [await calls.next() for _ in range(2)]
        await gate.wait()
        for call in held:
            calls.reply(call)
        await reversing(calls, number)

    async def test() -> None:
        tape = Tape()
        settings = {SettingCodes.MAX_CONCURRENT_STREAMS: 2}
        async with h2_serving(script, settings) as url, opened(url, tape, channels=2) as transport:
            for row in range(10):
                transport.issue(row, REQUEST)
            assert set(tape.issues) == {0, 1, 2, 3}
            opened_gate_ns = now_ns()
            gate.set()
            assert await ends(tape, 10) == [Outcome.OK] * 10
            assert list(tape.issues) == list(range(10)), "first come, first served"
            stats = transport.stats
            assert (stats.connection_waits, stats.stream_waits, stats.cap_waits) == (6, 6, 0)
            assert stats.stream_wait_ns >= 6 * (tape.issues[4][0] - opened_gate_ns)
            assert stats.stream_wait_ns <= 6 * (tape.issues[9][0] - tape.issues[3][0])
            assert stats.connections_opened == 2

    run(test())


def test_calls_wait_at_a_limit_of_no_streams_until_it_is_lifted() -> None:
    async def script(calls: Calls, number: int) -> None:
        await calls.settled()
        await lift.wait()
        calls.http2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: 1})
        calls.flush()
        calls.reply(await calls.next())
        call = await calls.next()
        calls.http2.update_settings({SettingCodes.MAX_CONCURRENT_STREAMS: 0})
        calls.reply(call)
        await calls.next()

    lift = asyncio.Event()

    async def test() -> None:
        tape = Tape()
        async with h2_serving(script, {SettingCodes.MAX_CONCURRENT_STREAMS: 0}) as url, opened(url, tape) as transport:
            for row in range(3):
                transport.issue(row, REQUEST)
            assert tape.issues == {}
            lift.set()
            assert await ends(tape, 2) == [Outcome.OK] * 2
            assert transport.abandon_waiting() == [2]
            assert transport.abandon_waiting() == []
            assert set(tape.issues) == {0, 1}

    run(test())


def test_a_late_reply_is_never_taken_for_another_calls() -> None:
    late = asyncio.Event()

    async def script(calls: Calls, number: int) -> None:
        first = await calls.next()
        second = await calls.next()
        await late.wait()
        await calls.until(lambda: first.number in calls.resets)
        assert calls.resets == {first.number: 8}, "CANCEL"
        # As a server would that had not read the cancellation yet.
        calls.raw(hf.HeadersFrame(first.number, data=b"\x88", flags=["END_HEADERS"]))
        calls.raw(hf.DataFrame(first.number, data=frame_message(b"NO")))
        calls.raw(hf.HeadersFrame(first.number, data=b"\x88", flags=["END_HEADERS", "END_STREAM"]))
        calls.reply(second, b"yes")
        await reversing(calls, number)

    async def test() -> None:
        tape = Tape(keep={0, 1})
        async with h2_serving(script) as url, opened(url, tape) as transport:
            transport.issue(0, REQUEST)
            transport.issue(1, REQUEST)
            transport.cancel(0, tape.issues[0][1], Outcome.TIMEOUT, "no complete reply in time")
            end = await tape.of(0)
            assert (end.outcome, end.first_byte_ns, end.detail) == (Outcome.TIMEOUT, 0, "no complete reply in time")
            late.set()
            assert (await tape.of(1)).outcome is Outcome.OK
            assert {row: unframe_message(reply) for row, reply in tape.replies.items()} == {1: b"yes"}
            transport.cancel(1, tape.issues[1][1], Outcome.TIMEOUT, "too late to matter")
            transport.cancel(1, 99, Outcome.TIMEOUT, "no such channel")
            assert transport.stats.connections_opened == 1, "a cancelled call does not cost its connection"

    run(test())


def test_a_cancelled_call_makes_room_for_one_that_waits() -> None:
    async def script(calls: Calls, number: int) -> None:
        await calls.until(lambda: 1 in calls.resets)
        await calls.next()
        calls.reply(await calls.next())

    async def test() -> None:
        tape = Tape()
        async with h2_serving(script, {SettingCodes.MAX_CONCURRENT_STREAMS: 1}) as url, opened(url, tape) as transport:
            transport.issue(0, REQUEST)
            transport.issue(1, REQUEST)
            assert set(tape.issues) == {0}
            transport.cancel(0, tape.issues[0][1], Outcome.TIMEOUT, "late")
            assert set(tape.issues) == {0, 1}
            assert await ends(tape, 2) == [Outcome.TIMEOUT, Outcome.OK]

    run(test())


# --- goodbyes -----------------------------------------------------------------------------------


def test_a_graceful_goaway_finishes_what_is_on_its_way_and_a_new_channel_takes_the_rest() -> None:
    async def script(calls: Calls, number: int) -> None:
        if number == 0:
            held = [await calls.next() for _ in range(3)]
            calls.raw(hf.GoAwayFrame(0, last_stream_id=LAST, additional_data=b"graceful_stop"))
            await second_opened.wait()
            calls.raw(hf.GoAwayFrame(0, last_stream_id=3, additional_data=b"graceful_stop"))
            for call in held[:2]:
                calls.reply(call)
            await calls.next()
        second_opened.set()
        await reversing(calls, number)

    second_opened = asyncio.Event()

    async def test() -> None:
        tape = Tape()
        async with h2_serving(script) as url, opened(url, tape) as transport:
            for row in range(3):
                transport.issue(row, REQUEST)
            await until(lambda: transport.stats.connections_opened == 2)
            transport.issue(3, REQUEST)
            assert await ends(tape, 4) == [Outcome.OK, Outcome.OK, Outcome.RESET, Outcome.OK]
            assert tape.of(2).result().detail == "GOAWAY NO_ERROR: graceful_stop"
            assert [tape.issues[row][1] for row in range(4)] == [0, 0, 0, 1]
            await until(lambda: transport.stats.connections_open == 1)

    run(test())


def test_what_is_lost_after_a_goaway_says_why() -> None:
    async def script(calls: Calls, number: int) -> None:
        if number == 0:
            await calls.next()
            calls.raw(hf.GoAwayFrame(0, last_stream_id=LAST, error_code=11, additional_data=b"too_many_pings"))
            calls.writer.close()
        await reversing(calls, number)

    async def test() -> None:
        tape = Tape()
        async with h2_serving(script) as url, opened(url, tape) as transport:
            transport.issue(0, REQUEST)
            end = await tape.of(0)
            assert end.outcome is Outcome.RESET
            assert end.detail == "connection lost after GOAWAY ENHANCE_YOUR_CALM: too_many_pings"
            transport.issue(1, REQUEST)
            assert (await tape.of(1)).outcome is Outcome.OK

    run(test())


def test_the_last_call_of_a_retired_channel_may_be_cancelled() -> None:
    async def script(calls: Calls, number: int) -> None:
        if number == 0:
            await calls.next()
            calls.raw(hf.GoAwayFrame(0, last_stream_id=LAST))
        await reversing(calls, number)

    async def test() -> None:
        tape = Tape()
        async with h2_serving(script) as url, opened(url, tape) as transport:
            transport.issue(0, REQUEST)
            await until(lambda: transport.stats.connections_opened == 2)
            transport.cancel(0, 0, Outcome.TIMEOUT, "late")
            await until(lambda: transport.stats.connections_open == 1)
            transport.issue(1, REQUEST)
            assert await ends(tape, 2) == [Outcome.TIMEOUT, Outcome.OK]

    run(test())


@pytest.mark.parametrize("channels", [1, 2])
def test_a_channel_whose_stream_numbers_are_used_up_is_replaced(channels: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "LAST_STREAM", 5)  # streams 1, 3, 5

    async def script(calls: Calls, number: int) -> None:
        for _ in range(3):
            calls.reply(await calls.next())
        with pytest.raises(ConnectionResetError):
            await calls.next()

    async def test() -> None:
        tape = Tape()
        async with h2_serving(script) as url, opened(url, tape, channels=channels) as transport:
            for row in range(20):
                transport.issue(row, REQUEST)  # more at once than the channels have numbers
            assert await ends(tape, 20) == [Outcome.OK] * 20
            used = [connection for _, connection in tape.issues.values()]
            assert max(used.count(number) for number in used) == 3
            assert transport.stats.connections_opened >= 7

    run(test())


def test_a_call_does_not_wait_for_the_replies_of_a_channel_that_is_used_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http2, "LAST_STREAM", 3)
    arrived = asyncio.Event()

    async def script(calls: Calls, number: int) -> None:
        held = [await calls.next() for _ in range(2 - number)]
        if number:
            arrived.set()
        await arrived.wait()
        for call in held:
            calls.reply(call)
        await reversing(calls, number)

    async def test() -> None:
        tape = Tape()
        async with h2_serving(script) as url, opened(url, tape) as transport:
            for row in range(3):
                transport.issue(row, REQUEST)
            assert await ends(tape, 3) == [Outcome.OK] * 3
            assert [tape.issues[row][1] for row in range(3)] == [0, 0, 1]

    run(test())


# --- servers that are not there, or not what they should be -----------------------------------------


def test_a_server_that_is_gone() -> None:
    async def script(calls: Calls, number: int) -> None:
        raise AssertionError("nobody is to connect")

    async def test() -> None:
        tape = Tape()
        async with h2_serving(script) as url:
            pass
        async with made(url, tape, channels=2) as transport:
            with pytest.raises(TransportError, match=r"127\.0\.0\.1:\d+: cannot connect: Connection refused"):
                await transport.open(1)

    run(test())


def test_a_server_that_goes_away_for_good() -> None:
    over = asyncio.Event()

    async def script(calls: Calls, number: int) -> None:
        calls.reply(await calls.next())
        await over.wait()

    async def test() -> None:
        tape = Tape()
        async with contextlib.AsyncExitStack() as stack:
            async with h2_serving(script) as url:
                transport = await stack.enter_async_context(opened(url, tape))
                transport.issue(0, REQUEST)
                await tape.of(0)
            over.set()  # it closes the connection, and nobody listens any more
            await until(lambda: transport.stats.connections_open == 0)
            for row in (1, 2):
                transport.issue(row, REQUEST)
            for row in (1, 2):
                end = await tape.of(row)
                assert (end.outcome, end.detail) == (Outcome.CONNECT, "connect: Connection refused")
                assert row not in tape.issues, "no byte of it was sent"
            assert transport.stats.connect_failures["Connection refused"] >= 2

    run(test())


def test_a_channel_that_cannot_be_replaced_does_not_fail_calls_that_wait_for_another() -> None:
    gates = [asyncio.Event(), asyncio.Event()]
    served: dict[int, int] = {}

    async def script(calls: Calls, number: int) -> None:
        call = await calls.next()
        row = call.message[0]
        served[row] = number
        await gates[row].wait()
        if row == 0:
            return
        calls.reply(call)
        await reversing(calls, number)

    async def test() -> None:
        tape = Tape()
        async with contextlib.AsyncExitStack() as stack:
            async with h2_serving(script, {SettingCodes.MAX_CONCURRENT_STREAMS: 1}) as url:
                transport = await stack.enter_async_context(opened(url, tape, channels=2))
                for row in range(3):
                    transport.issue(row, frame_message(bytes([row])))
                await until(lambda: len(served) == 2)
            gates[0].set()
            await until(lambda: bool(transport.stats.connect_failures))
            assert (await tape.of(0)).outcome is Outcome.RESET
            assert not tape.of(2).done()
            gates[1].set()
            assert await ends(tape, 3) == [Outcome.RESET, Outcome.OK, Outcome.OK]

    run(test())


async def _http1(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n")
    await reader.read()


async def _mute(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
    await reader.read()


async def _hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
    await reader.readexactly(24)


async def _never_acknowledges(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
    writer.write(hf.SettingsFrame(0).serialize())
    while await reader.read(1 << 16):
        pass


async def _turns_away(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
    goaway = hf.GoAwayFrame(0, error_code=11, additional_data=b"too many connections")
    writer.write(hf.SettingsFrame(0).serialize() + hf.SettingsFrame(0, flags=["ACK"]).serialize() + goaway.serialize())
    await reader.read()


@pytest.mark.parametrize(
    ("script", "message"),
    [
        pytest.param(_http1, "not HTTP/2: the connection begins with b'HTTP/1.1 400", id="HTTP/1.1"),
        pytest.param(_mute, "no answer within the time allowed", id="says nothing"),
        pytest.param(_never_acknowledges, "no answer within the time allowed", id="never acknowledges our settings"),
        pytest.param(_hang_up, "connection lost", id="hangs up"),
        pytest.param(_turns_away, "GOAWAY ENHANCE_YOUR_CALM: too many connections", id="turns connections away"),
    ],
)
def test_a_server_that_is_no_use_is_named(script: Any, message: str) -> None:
    async def test() -> None:
        async with serving(script) as url, made(url, Tape(), channels=2, connect_timeout_s=0.1) as transport:
            with pytest.raises(TransportError, match=message):
                await transport.open(1)
            assert transport.stats.connections_open == 0, "nothing is left of the attempt"

    run(test())


def test_a_server_that_turns_connections_away_is_not_stormed() -> None:
    accepted = 0
    welcome = True

    async def script(calls: Calls, number: int) -> None:
        nonlocal accepted
        accepted += 1
        if welcome:
            call = await calls.next()
            calls.reply(call)
            await until(lambda: not welcome)
        await calls.settled()
        await calls.heard()
        calls.raw(hf.GoAwayFrame(0, last_stream_id=0, error_code=11))
        await calls.next()

    async def test() -> None:
        nonlocal welcome
        tape = Tape()
        async with h2_serving(script) as url, opened(url, tape) as transport:
            transport.issue(0, REQUEST)
            assert (await tape.of(0)).outcome is Outcome.OK
            welcome = False
            await until(lambda: transport.stats.connections_open == 0 and accepted > 1)
            for _ in range(100):
                await asyncio.sleep(0)
            settled = accepted
            assert settled <= 3, "it broke before it carried a call: no other is opened until one is needed"
            transport.issue(1, REQUEST)
            end = await tape.of(1)
            assert end.outcome in (Outcome.CONNECT, Outcome.RESET)
            assert "GOAWAY ENHANCE_YOUR_CALM" in end.detail
            assert accepted <= settled + 2

    run(test())


def test_our_own_host_running_out_of_files_is_our_fault() -> None:
    async def script(calls: Calls, number: int) -> None:
        if number == 0:
            calls.reply(await calls.next())

    async def test() -> None:
        tape = Tape()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        async with h2_serving(script) as url, opened(url, tape) as transport:
            transport.issue(0, REQUEST)
            await tape.of(0)
            # The server closes after its one reply, and closes what is opened in its place at once.
            await until(lambda: bool(transport.stats.connect_failures) and transport.stats.connections_open == 0)
            probe = socket.socket()
            resource.setrlimit(resource.RLIMIT_NOFILE, (probe.fileno(), hard))
            probe.close()
            taken = []
            try:
                with contextlib.suppress(OSError):
                    while True:
                        taken.append(socket.socket())
                transport.issue(1, REQUEST)
                end = await tape.of(1)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                for sock in taken:
                    sock.close()
            assert (end.outcome, end.detail) == (Outcome.CLIENT, "connect: Too many open files")

    run(test())


@pytest.mark.parametrize("url", ["http://a:1", "grpc://a", "grpc://:1", "a:1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(TransportError, match="not a grpc:// or grpcs:// address with a port"):
        GrpcTransport(url, Tape(), BLOCK, channels=1)


def tls_pair(*alpn: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    if alpn:
        server.set_alpn_protocols(list(alpn))
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client


def test_tls() -> None:
    server, client = tls_pair("http/1.1", "h2")

    async def test() -> None:
        tape = Tape(keep={0, 1})
        payloads = [b"abc", bytes(range(256)) * 4000]
        async with h2_serving(reversing, tls=server) as url:
            assert url.startswith("grpcs://")
            async with opened(url, tape, channels=2, ssl_context=client) as transport:
                for row, payload in enumerate(payloads):
                    transport.issue(row, frame_message(payload))
                for row, payload in enumerate(payloads):
                    assert (await tape.of(row)).outcome is Outcome.OK
                    assert unframe_message(tape.replies[row]) == payload[::-1]
            async with made(url, tape) as transport:
                with pytest.raises(TransportError, match="TLS: CERTIFICATE_VERIFY_FAILED"):
                    await transport.open(1)

    run(test())


@pytest.mark.parametrize("alpn", [pytest.param([], id="no ALPN"), pytest.param(["http/1.1"], id="HTTP/1.1 only")])
def test_a_tls_server_that_does_not_speak_http2(alpn: list[str]) -> None:
    server, client = tls_pair(*alpn)

    async def test() -> None:
        async with serving(_http1, server) as url, made(url, Tape(), ssl_context=client) as transport:
            with pytest.raises(TransportError, match="does not speak HTTP/2 over TLS"):
                await transport.open(1)
            assert transport.stats.connections_open == 0

    run(test())


# --- closing ------------------------------------------------------------------------------------


@pytest.mark.parametrize("tls", [False, True])
def test_closing_leaves_nothing(tls: bool) -> None:
    server, client = tls_pair("h2") if tls else (None, None)

    async def script(calls: Calls, number: int) -> None:
        await calls.next()
        if number == 0:
            calls.raw(hf.GoAwayFrame(0, last_stream_id=LAST))
        await calls.until(lambda: False)

    async def test() -> None:
        tape = Tape()
        async with h2_serving(script, tls=server) as url:
            before = asyncio.all_tasks()
            async with opened(url, tape, channels=2, ssl_context=client) as transport:
                transport.issue(0, REQUEST)
                transport.issue(1, frame_message(bytes(1 << 20)))
                await until(lambda: transport.stats.connections_opened == 3)  # one retired, two in use: one perhaps half open
            assert await ends(tape, 2) == [Outcome.RESET, Outcome.RESET], "every issued call ends"
            await until(lambda: all("accept" in repr(task) for task in asyncio.all_tasks() - before))
            assert repr(transport).endswith("channels=0 going=0 connecting=0 waiting=0>")

    run(test())


def test_closing_ends_even_where_the_sink_fails(caplog: pytest.LogCaptureFixture) -> None:
    async def script(calls: Calls, number: int) -> None:
        await calls.until(lambda: False)

    async def test() -> None:
        tape = Tape()
        async with h2_serving(script) as url, opened(url, tape) as transport:
            transport.issue(0, REQUEST)
            tape.of(0).cancel()  # the tape takes no end of this call

    run(test())
    assert "InvalidStateError" in caplog.text


def test_closing_while_connecting() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        if number == 0:
            with contextlib.suppress(ConnectionError):
                await Calls(reader, writer, {}).next()
        else:
            await reader.read()  # says nothing

    async def test() -> None:
        tape = Tape()
        async with serving(script) as url:
            async with opened(url, tape) as transport:
                transport.issue(0, REQUEST)
                assert (await tape.of(0)).outcome is Outcome.RESET
                await until(lambda: transport.stats.connections_opened == 2)
                transport.issue(1, REQUEST)  # waits for settings that never come
                assert (transport.stats.connection_waits, transport.stats.stream_waits) == (1, 0)
                assert transport.abandon_waiting() == [1]
            assert "connecting=0" in repr(transport)

    run(test())


# --- grpcio as the peer -----------------------------------------------------------------------------


class Grpcio:
    """A grpcio server of a few methods, without protobuf."""

    def __init__(self, **options: int) -> None:
        self.gate = threading.Event()
        self.entered = threading.Semaphore(0)
        self.server = grpc.server(
            ThreadPoolExecutor(8),
            options=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.max_send_message_length", -1),
                *((f"grpc.{name}", value) for name, value in options.items()),
            ],
        )
        methods = {name: grpc.unary_unary_rpc_method_handler(getattr(self, name)) for name in ("echo", "fail", "tell", "hold")}
        self.server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test.S", methods),))
        self.port = self.server.add_insecure_port("127.0.0.1:0")
        self.server.start()

    def echo(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        return request[::-1]

    def fail(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        number, _, text = request.decode().partition(" ")
        codes = {code.value[0]: code for code in grpc.StatusCode}
        context.abort(codes[int(number)], text)

    def tell(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        metadata = [(key, list(value) if isinstance(value, bytes) else value) for key, value in context.invocation_metadata()]
        return json.dumps([metadata, context.time_remaining()]).encode()

    def hold(self, request: bytes, context: grpc.ServicerContext) -> bytes:
        self.entered.release()
        self.gate.wait(20)
        return request

    @contextlib.asynccontextmanager
    async def opened(self, tape: Tape, method: str, metadata: tuple[tuple[str, str], ...] = ()) -> AsyncIterator[GrpcTransport]:
        address = f"127.0.0.1:{self.port}"
        block = call_headers(address, f"/test.S/{method}", tls=False, timeout_ns=5 * 10**9, metadata=metadata)
        async with opened(f"grpc://{address}", tape, block=block) as transport:
            yield transport


@pytest.fixture(scope="module")
def grpcio() -> Iterator[Grpcio]:
    peer = Grpcio()
    yield peer
    peer.server.stop(None).wait()


def test_grpcio_echoes_messages_of_every_size(grpcio: Grpcio) -> None:
    sizes = [0, 1, 5, 16_378, 16_379, 16_380, 65_530, 65_531, 500_000, 2_000_000]

    async def test() -> None:
        payloads = [(bytes(range(251)) * (size // 251 + 1))[:size] for size in sizes]
        tape = Tape(keep=set(range(len(sizes))))
        async with grpcio.opened(tape, "echo") as transport:
            for row, payload in enumerate(payloads):
                transport.issue(row, frame_message(payload))
            for row, payload in enumerate(payloads):
                end = await tape.of(row)
                assert (end.outcome, end.detail) == (Outcome.OK, "")
                assert unframe_message(tape.replies[row]) == payload[::-1]
            assert transport.stats.connections_opened == 1

    run(test())


@pytest.mark.parametrize(
    ("code", "text"), [(3, ""), (5, "kein Modell „größer“ — 100 %"), (8, "\u65e5\u672c\u8a9e \U0001f600"), (14, "a\nb\tc")]
)
def test_grpcio_says_what_is_wrong(code: int, text: str, grpcio: Grpcio) -> None:
    async def test() -> None:
        tape = Tape()
        async with grpcio.opened(tape, "fail") as transport:
            transport.issue(0, frame_message(f"{code} {text}".encode()))
            end = await tape.of(0)
            assert (end.outcome, end.status) == (Outcome.STATUS, code)
            assert end.detail.partition(": ")[2] == text
        async with grpcio.opened(tape, "no-such-method") as transport:
            transport.issue(1, REQUEST)
            end = await tape.of(1)
            assert (end.outcome, end.status, end.detail) == (Outcome.STATUS, 12, "UNIMPLEMENTED: Method not found!")

    run(test())


def test_grpcio_receives_metadata_and_the_deadline(grpcio: Grpcio) -> None:
    metadata = (("X-Key", "a value, with = and ;"), ("authorization", "Bearer t"), ("trace-bin", "AAECAw=="), ("two-bin", "/w"))

    async def test() -> None:
        tape = Tape(keep={0, 1})
        async with grpcio.opened(tape, "tell", metadata) as transport:
            for row in range(2):
                transport.issue(row, frame_message(b""))
                assert (await tape.of(row)).outcome is Outcome.OK
                told, remaining_s = json.loads(unframe_message(tape.replies[row]))
                received = dict(told)
                assert received.pop("user-agent") == "servebench"
                assert received == {
                    "x-key": "a value, with = and ;",
                    "authorization": "Bearer t",
                    "trace-bin": [0, 1, 2, 3],
                    "two-bin": [255],
                }
                assert 4 < remaining_s <= 5

    run(test())


def test_grpcio_limits_streams() -> None:
    async def test() -> None:
        peer = Grpcio(max_concurrent_streams=2)
        tape = Tape()
        async with peer.opened(tape, "hold") as transport:
            for row in range(20):
                transport.issue(row, REQUEST)
            assert set(tape.issues) == {0, 1}
            peer.gate.set()
            for row in range(20):
                end = await tape.of(row)
                # gRPC's C core counts a stream for a moment after it has said its end, and then refuses the next.
                assert (end.outcome, end.detail) in [(Outcome.OK, ""), (Outcome.RESET, "RST_STREAM REFUSED_STREAM")]
            assert transport.stats.stream_waits == 18
            assert transport.stats.connections_opened == 1
        peer.server.stop(None).wait()

    run(test())


def test_grpcio_goes_away_gracefully() -> None:
    async def test() -> None:
        peer = Grpcio()
        tape = Tape()
        async with peer.opened(tape, "hold") as transport:
            loop = asyncio.get_running_loop()
            transport.issue(0, REQUEST)
            await loop.run_in_executor(None, peer.entered.acquire)
            stopped = peer.server.stop(20)  # GOAWAY; what is on its way may finish, and nobody listens any more
            await until(lambda: bool(transport.stats.connect_failures))
            assert not tape.of(0).done()
            peer.gate.set()
            assert (await tape.of(0)).outcome is Outcome.OK
            transport.issue(1, REQUEST)
            assert (await tape.of(1)).outcome is Outcome.CONNECT
            await loop.run_in_executor(None, stopped.wait)

    run(test())
