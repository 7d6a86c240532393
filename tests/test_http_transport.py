"""The HTTP transport against scripted peers: who ends how, and what is left behind."""

import asyncio
import contextlib
import re
import socket
import ssl
import struct
from collections.abc import AsyncIterator
from typing import Any

import pytest
from descriptors import no_descriptor_left
from scripted_peers import Tape, run, until
from stream_server import StreamScript, serving, tls_pair

from servebench.clock import now_ns
from servebench.errors import TransportError
from servebench.record.outcome import Outcome
from servebench.transport.http import HttpTransport
from servebench.wire.http1 import encode_request, parse_reply

OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
REQUEST = encode_request("POST", "/infer", "test", [], b"payload")


async def read_request(reader: asyncio.StreamReader) -> bytes:
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length"))
    return await reader.readexactly(length)


def replying(*replies: bytes) -> StreamScript:
    """Answers the n-th request of every connection with the n-th reply, then closes; b'' closes without a reply."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        for reply in replies:
            await read_request(reader)
            writer.write(reply)
            await writer.drain()

    return script


async def always_ok(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
    while True:
        await read_request(reader)
        writer.write(OK)


def ok_behind(gate: asyncio.Event) -> StreamScript:
    """Answers every request, none before the gate is open."""

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        while True:
            await read_request(reader)
            await gate.wait()
            writer.write(OK)

    return script


async def one_reply(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
    """Answers one request on the first connection; closes every other one."""
    if number == 0:
        await replying(OK)(reader, writer, number)


@contextlib.asynccontextmanager
async def opened(url: str, tape: Tape, connections: int = 1, **settings: Any) -> AsyncIterator[HttpTransport]:
    transport = HttpTransport(url, tape, **settings)
    await transport.open(connections)
    try:
        yield transport
    finally:
        await transport.close()


def test_stamps_are_in_order_and_replies_are_counted() -> None:
    async def test() -> None:
        tape = Tape(keep={1})
        async with serving(always_ok) as url, opened(url, tape) as transport:
            for row in range(3):
                before_ns = now_ns()
                transport.issue(row, REQUEST)
                end = await tape.of(row)
                assert end.outcome is Outcome.OK
                assert (end.status, end.response_bytes) == (200, 2)
                assert before_ns <= tape.issues[row][0] < end.first_byte_ns <= end.at_ns <= now_ns()
            assert parse_reply(tape.replies[1]) == (200, {"content-length": "2"}, b"ok")
            assert set(tape.replies) == {1}

    run(test())


FAULTS = [
    pytest.param([OK, b""], Outcome.RESET, "while the query was out, before any reply", id="closed while it was served"),
    pytest.param([b""], Outcome.RESET, "before any reply", id="closed before the first reply"),
    pytest.param([OK, OK[:-1]], Outcome.RESET, "inside the reply, after 1 body", id="truncated body"),
    pytest.param([OK, OK[:10]], Outcome.RESET, "inside the reply", id="truncated header"),
    pytest.param([OK, b"\x00\x01 not HTTP at all\r\n\r\n"], Outcome.PROTOCOL, "not valid HTTP", id="garbage"),
    pytest.param([OK, OK + OK], Outcome.PROTOCOL, "more bytes", id="two replies"),
    pytest.param(
        [OK, b"HTTP/1.1 503 Busy\r\nContent-Length: 4\r\n\r\nfull"], Outcome.STATUS, "503 Busy.*full", id="error status"
    ),
]


@pytest.mark.parametrize(("replies", "outcome", "detail"), FAULTS)
def test_a_fault_ends_one_query_and_the_next_one_works(replies: list[bytes], outcome: Outcome, detail: str) -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        if number == 0:
            await replying(*replies)(reader, writer, number)
        if number or outcome is Outcome.STATUS:  # an error status leaves the connection usable
            await always_ok(reader, writer, number)

    async def test() -> None:
        tape = Tape(keep=False)
        async with serving(script) as url, opened(url, tape, max_connections=1) as transport:
            last = len(replies) - 1
            for row in range(last + 2):
                transport.issue(row, REQUEST)
                end = await tape.of(row)
                if row == last:
                    assert end.outcome is outcome
                    assert re.search(detail, " ".join(end.detail.split())), end.detail
                else:
                    assert end.outcome is Outcome.OK
            assert len(tape.issues) == last + 2, "nothing was sent twice"

    run(test())


@pytest.mark.parametrize("tls", [False, True], ids=["plain", "TLS"])
@pytest.mark.parametrize(
    ("closed", "outcome", "detail"),
    [
        pytest.param("before", Outcome.STALE, "the server closed the idle connection as it was reused", id="before it came"),
        pytest.param(
            "after", Outcome.RESET, "the server closed the connection while the query was out, before any reply", id="after"
        ),
    ],
)
def test_a_reused_connection_is_stale_only_if_it_was_closed_before_the_query_came(
    closed: str, outcome: Outcome, detail: str, tls: bool
) -> None:
    """The server's blocking socket is the test's: nothing lies between its close and our next query."""
    server_tls, client_tls = tls_pair()

    async def test() -> None:
        tape = Tape(keep=False)
        with socket.create_server(("127.0.0.1", 0)) as listener:
            listener.settimeout(10)
            url = f"{'https' if tls else 'http'}://127.0.0.1:{listener.getsockname()[1]}"

            def accept() -> socket.socket:
                conversation = listener.accept()[0]
                conversation.settimeout(10)
                return server_tls.wrap_socket(conversation, server_side=True) if tls else conversation

            def hang_up(conversation: socket.socket) -> None:
                if isinstance(conversation, ssl.SSLSocket):
                    conversation.setblocking(False)
                    with contextlib.suppress(ssl.SSLWantReadError):
                        conversation.unwrap()  # says goodbye, and does not wait for ours
                conversation.close()

            accepting = asyncio.create_task(asyncio.to_thread(accept))
            async with opened(url, tape, max_connections=1, ssl_context=client_tls if tls else None) as transport:
                with await accepting as conversation:
                    transport.issue(0, REQUEST)
                    assert await asyncio.to_thread(conversation.recv, 1 << 16) == REQUEST
                    conversation.send(OK)
                    assert (await tape.of(0)).outcome is Outcome.OK
                    if closed == "before":
                        hang_up(conversation)
                    transport.issue(1, REQUEST)
                    if closed == "after":
                        assert await asyncio.to_thread(conversation.recv, 1 << 16) == REQUEST
                        hang_up(conversation)
                    end = await tape.of(1)
                    assert (end.outcome, end.first_byte_ns, end.detail) == (outcome, 0, detail)
                    assert tape.issues[1][1] == tape.issues[0][1], "it was sent on the reused connection"

    run(test())


def test_a_reused_connection_that_we_close_ourselves_is_not_said_to_be_the_servers_doing() -> None:
    async def test() -> None:
        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
            await read_request(reader)
            writer.write(OK)
            await reader.read()

        tape = Tape(keep=False)
        async with serving(script) as url, opened(url, tape, max_connections=1) as transport:
            transport.issue(0, REQUEST)
            assert (await tape.of(0)).outcome is Outcome.OK
            transport.issue(1, REQUEST)
            await transport.close()
            end = await tape.of(1)
            assert (end.outcome, end.detail) == (Outcome.RESET, "connection closed before any reply")

    run(test())


def test_a_reset_connection_is_a_reset() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await read_request(reader)
        sock = writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        writer.transport.abort()

    async def test() -> None:
        tape = Tape(keep=False)
        async with serving(script) as url, opened(url, tape) as transport:
            transport.issue(0, REQUEST)
            assert (await tape.of(0)).outcome is Outcome.RESET

    run(test())


def test_nobody_listens() -> None:
    async def test() -> None:
        tape = Tape(keep=False)
        async with serving(one_reply) as url, opened(url, tape) as transport:
            transport.issue(0, REQUEST)
            await tape.of(0)
            # The transport grew ahead by one connection; both are closed by the server.
            await until(lambda: transport.stats.connections_opened == 2 and transport.stats.connections_open == 0)
        # The server is gone, and so is the connection: opening a new one is refused.
        transport.issue(1, REQUEST)
        end = await tape.of(1)
        assert end.outcome is Outcome.CONNECT
        assert end.detail == "connect: Connection refused"
        assert 1 not in tape.issues, "no byte of it was sent"
        with pytest.raises(TransportError, match=r"127\.0\.0\.1:\d+: cannot connect: Connection refused"):
            await HttpTransport(url, tape).open(1)

    run(test())


def test_waiting_under_a_cap_is_counted_and_nothing_is_lost() -> None:
    async def test() -> None:
        gate = asyncio.Event()
        tape = Tape(keep=False)
        async with serving(ok_behind(gate)) as url, opened(url, tape, connections=2, max_connections=2) as transport:
            for row in range(6):
                transport.issue(row, REQUEST)
            assert set(tape.issues) == {0, 1}
            opened_gate_ns = now_ns()
            gate.set()
            ends = [await tape.of(row) for row in range(6)]
            assert all(end.outcome is Outcome.OK for end in ends)
            assert list(tape.issues) == list(range(6)), "first come, first served"
            assert all(tape.issues[row][0] >= opened_gate_ns for row in range(2, 6))
            stats = transport.stats
            assert (stats.connections_opened, stats.connections_peak) == (2, 2)
            assert (stats.connection_waits, stats.cap_waits) == (4, 4)
            assert stats.cap_wait_ns >= 4 * (tape.issues[2][0] - opened_gate_ns)
            assert stats.cap_wait_ns <= 4 * (tape.issues[5][0] - tape.issues[1][0])

    run(test())


def test_without_a_cap_connections_grow_with_the_queries_outstanding() -> None:
    async def test() -> None:
        gate = asyncio.Event()
        tape = Tape(keep=False)
        async with serving(ok_behind(gate)) as url, opened(url, tape) as transport:
            for row in range(50):
                transport.issue(row, REQUEST)
            await until(lambda: len(tape.issues) == 50)
            assert transport.stats.cap_waits == 0
            assert transport.stats.connections_peak >= 50
            gate.set()
            assert {(await tape.of(row)).outcome for row in range(50)} == {Outcome.OK}

    run(test())


def test_a_late_reply_is_never_taken_for_the_next_query() -> None:
    async def test() -> None:
        late = asyncio.Event()

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
            await read_request(reader)
            if number == 0:
                await late.wait()
                writer.write(OK.replace(b"ok", b"NO"))
            else:
                writer.write(OK)
            await reader.read()

        tape = Tape(keep={0, 1})
        async with serving(script) as url, opened(url, tape) as transport:
            transport.issue(0, REQUEST)
            transport.cancel(0, tape.issues[0][1], Outcome.TIMEOUT, "no complete reply in time")
            assert (await tape.of(0)).outcome is Outcome.TIMEOUT
            late.set()
            transport.issue(1, REQUEST)
            assert (await tape.of(1)).outcome is Outcome.OK
            assert tape.replies[1].endswith(b"ok")
            transport.cancel(1, tape.issues[1][1], Outcome.TIMEOUT, "too late to matter")

    run(test())


def test_large_payloads_both_ways() -> None:
    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        while True:
            body = await read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(body) + body[::-1])
            await writer.drain()

    async def test() -> None:
        payload = bytes(range(256)) * 4096 * 8
        request = encode_request("POST", "/infer", "test", [], payload)
        tape = Tape(keep={0, 1})
        async with serving(script) as url, opened(url, tape) as transport:
            for row, data in enumerate([request, memoryview(request)]):
                transport.issue(row, data)
                end = await tape.of(row)
                assert (end.outcome, end.response_bytes) == (Outcome.OK, len(payload))
                assert end.first_byte_ns < end.at_ns
                assert parse_reply(tape.replies[row])[2] == payload[::-1]
            assert transport.stats.connections_opened <= 2

    run(test())


def test_an_early_reply_ends_the_query_and_the_connection() -> None:
    over = asyncio.Event()

    async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        if number == 0:
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\n\r\n")
            await over.wait()  # never reads the body
            return
        await always_ok(reader, writer, number)

    async def test() -> None:
        tape = Tape(keep=False)
        async with serving(script) as url, opened(url, tape, max_connections=1) as transport:
            transport.issue(0, encode_request("POST", "/", "test", [], bytes(32 << 20)))
            end = await tape.of(0)
            assert (end.outcome, end.status) == (Outcome.STATUS, 413)
            transport.issue(1, REQUEST)
            assert (await tape.of(1)).outcome is Outcome.OK
            assert tape.issues[1][1] != tape.issues[0][1], "the half-sent request's connection is not reused"
            over.set()

    run(test())


def test_bytes_nobody_asked_for_close_an_idle_connection() -> None:
    async def test() -> None:
        sent = asyncio.Event()

        async def script(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
            if number == 0:
                await read_request(reader)
                writer.write(OK)
                await sent.wait()
                writer.write(OK)
                await reader.read()
            await always_ok(reader, writer, number)

        tape = Tape(keep=False)
        async with serving(script) as url, opened(url, tape, max_connections=1) as transport:
            transport.issue(0, REQUEST)
            await tape.of(0)
            first = tape.issues[0][1]
            sent.set()
            await until(lambda: transport.stats.connections_open == 0)
            transport.issue(1, REQUEST)
            assert (await tape.of(1)).outcome is Outcome.OK
            assert tape.issues[1][1] != first

    run(test())


def test_queries_that_never_got_a_connection_are_given_back() -> None:
    async def hang(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, number: int) -> None:
        await reader.read()

    async def test() -> None:
        tape = Tape(keep=False)
        async with serving(hang) as url, opened(url, tape, max_connections=1) as transport:
            for row in range(3):
                transport.issue(row, REQUEST)
            assert transport.abandon_waiting() == [1, 2]
            stats = transport.stats
            assert (stats.connection_waits, stats.cap_waits) == (2, 2)
            assert 0 < stats.cap_wait_ns <= 2 * (now_ns() - tape.issues[0][0])
            transport.cancel(0, tape.issues[0][1], Outcome.UNFINISHED, "end of drain")
            assert (await tape.of(0)).outcome is Outcome.UNFINISHED
            assert set(tape.issues) == {0}

    run(test())


def test_our_own_host_running_out_of_files_is_our_fault() -> None:
    async def test() -> None:
        tape = Tape(keep=False)
        async with serving(one_reply) as url, opened(url, tape) as transport:
            transport.issue(0, REQUEST)
            await tape.of(0)
            # The transport grew ahead by one connection; both are closed by the server.
            await until(lambda: transport.stats.connections_opened == 2 and transport.stats.connections_open == 0)
            with no_descriptor_left():
                transport.issue(1, REQUEST)
                end = await tape.of(1)
            assert end.outcome is Outcome.CLIENT
            assert end.detail == "connect: Too many open files"

    run(test())


def test_tls_with_a_private_authority() -> None:
    server_tls, client_tls = tls_pair()

    async def test() -> None:
        tape = Tape(keep=False)
        async with serving(always_ok, server_tls) as url:
            async with opened(url, tape, connections=2, ssl_context=client_tls) as transport:
                for row in range(4):
                    transport.issue(row, memoryview(REQUEST))
                    assert (await tape.of(row)).outcome is Outcome.OK
            with pytest.raises(TransportError, match="TLS: CERTIFICATE_VERIFY_FAILED"):
                await HttpTransport(url, tape).open(1)

    run(test())


def test_an_unresolvable_host_is_named() -> None:
    async def test() -> None:
        with pytest.raises(TransportError, match=r"no-such-host\.invalid: cannot be resolved"):
            await HttpTransport("http://no-such-host.invalid", Tape(keep=False)).open(1)

    run(test())
