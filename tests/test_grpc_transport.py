"""The gRPC transport's calls over real sockets, against scripted h2 servers.

What holds for every transport is in ``test_transport_contract``; here is what HTTP/2 and gRPC add:
streams that share a connection, the server's limit of them, and faults inside a reply.
"""

import asyncio
import socket
import struct
from collections.abc import Awaitable, Callable
from urllib.parse import quote

import pytest
from grpc_calls import REQUEST, Call, Calls, ends, h2_serving, opened, reversing
from h2.settings import SettingCodes
from hyperframe import frame as hf
from scripted_peers import Tape, run, until

from servebench.clock import now_ns
from servebench.record.outcome import Outcome
from servebench.wire.grpc import frame_message, unframe_message

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
        tape = Tape(keep=False)
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

    tape = Tape(keep=False)

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
        tape = Tape(keep=False)
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
        tape = Tape(keep=False)
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
        tape = Tape(keep=False)
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
        tape = Tape(keep=False)
        async with h2_serving(script, {SettingCodes.MAX_CONCURRENT_STREAMS: 1}) as url, opened(url, tape) as transport:
            transport.issue(0, REQUEST)
            transport.issue(1, REQUEST)
            assert set(tape.issues) == {0}
            transport.cancel(0, tape.issues[0][1], Outcome.TIMEOUT, "late")
            assert set(tape.issues) == {0, 1}
            assert await ends(tape, 2) == [Outcome.TIMEOUT, Outcome.OK]

    run(test())
