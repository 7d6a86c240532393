"""The gRPC transport's connections: goodbyes and replacements, servers that are none, and what closing leaves."""

import asyncio
import contextlib
import re
from typing import Any

import pytest
from descriptors import no_descriptor_left
from grpc_calls import BLOCK, LAST, REQUEST, Calls, ends, h2_serving, made, opened, reversing
from h2.settings import SettingCodes
from hyperframe import frame as hf
from scripted_peers import Tape, run, until
from stream_server import serving, tls_pair

from servebench.errors import TransportError
from servebench.record.outcome import Outcome
from servebench.transport.grpc import GrpcTransport
from servebench.wire import http2
from servebench.wire.grpc import frame_message, unframe_message

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
        tape = Tape(keep=False)
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
        tape = Tape(keep=False)
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
        tape = Tape(keep=False)
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
        tape = Tape(keep=False)
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
        tape = Tape(keep=False)
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
        tape = Tape(keep=False)
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
        tape = Tape(keep=False)
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
        tape = Tape(keep=False)
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
        async with serving(script) as url, made(url, Tape(keep=False), channels=2, connect_timeout_s=0.1) as transport:
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
        tape = Tape(keep=False)
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
        tape = Tape(keep=False)
        async with h2_serving(script) as url, opened(url, tape) as transport:
            transport.issue(0, REQUEST)
            await tape.of(0)
            # The server closes after its one reply, and closes what is opened in its place at once.
            await until(lambda: bool(transport.stats.connect_failures) and transport.stats.connections_open == 0)
            with no_descriptor_left():
                transport.issue(1, REQUEST)
                end = await tape.of(1)
            assert (end.outcome, end.detail) == (Outcome.CLIENT, "connect: Too many open files")

    run(test())


@pytest.mark.parametrize("url", ["http://a:1", "grpc://a", "grpc://:1", "a:1"])
def test_an_address_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(TransportError, match="not a grpc:// or grpcs:// address with a port"):
        GrpcTransport(url, Tape(keep=False), BLOCK, channels=1)


@pytest.mark.parametrize(
    ("url", "why"),
    [("grpc://a:b", "Port could not be cast"), ("grpcs://a:70000", "Port out of range"), ("grpc://[::1:1", "Invalid IPv6")],
)
def test_an_address_that_cannot_be_read_is_refused(url: str, why: str) -> None:
    with pytest.raises(TransportError, match=rf"{re.escape(url)}: {why}"):
        GrpcTransport(url, Tape(keep=False), BLOCK, channels=1)


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
        async with serving(_http1, server) as url, made(url, Tape(keep=False), ssl_context=client) as transport:
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
        tape = Tape(keep=False)
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


def test_closing_ends_even_where_the_sink_fails() -> None:
    async def script(calls: Calls, number: int) -> None:
        await calls.until(lambda: False)

    faults: list[type[Exception]] = []

    async def test() -> None:
        tape = Tape(keep=False)
        asyncio.get_running_loop().set_exception_handler(lambda _, context: faults.append(type(context["exception"])))
        async with h2_serving(script) as url, opened(url, tape) as transport:
            transport.issue(0, REQUEST)
            tape.of(0).cancel()  # the tape takes no end of this call

    run(test())
    assert faults == [asyncio.InvalidStateError]


def test_closing_while_connecting() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        if number == 0:
            with contextlib.suppress(ConnectionError):
                await Calls(reader, writer, {}).next()
        else:
            await reader.read()  # says nothing

    async def test() -> None:
        tape = Tape(keep=False)
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
