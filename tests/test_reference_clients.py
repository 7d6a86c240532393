"""The reference clients: do aiohttp and grpcio see the same server as our own wire clients do?

What both kinds of transport promise is in `test_transport_contract`. Here they are held against
each other, query by query, and the reference clients' own choices are tested.
"""

import asyncio
import contextlib
import gc
import json
import re
import resource
import socket
import ssl
import subprocess
import sys
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
import trustme
from e2e import stub
from scripted_peers import (
    GRPC_HEADERS,
    Answer,
    End,
    GrpcConnection,
    GrpcPeer,
    HttpConnection,
    HttpPeer,
    Peer,
    PeerConnection,
    Tape,
    payload_of,
    row_of,
    run,
    until,
)

from servebench.errors import TransportError
from servebench.record.outcome import Outcome
from servebench.transport.aiohttp_client import AiohttpTransport
from servebench.transport.base import Transport
from servebench.transport.grpc import GrpcTransport
from servebench.transport.grpcio_client import GrpcioTransport, read_error
from servebench.transport.http import HttpTransport
from servebench.transport.reference import Query, ReferenceTransport
from servebench.wire.grpc import call_headers, frame_message, unframe_message
from servebench.wire.http1 import encode_request, parse_reply

QUERIES = 200
METHOD = "/test.Echo/Reverse"
METADATA = [("x-tenant", "blue"), ("authorization", "Bearer 0123")]
TIMEOUT_NS = 20_000_000_000

Make = Callable[[str, Tape], Transport]


def http_transport(url: str, tape: Tape) -> Transport:
    return HttpTransport(url, tape, max_connections=8)


def aiohttp_transport(url: str, tape: Tape) -> Transport:
    return AiohttpTransport(url, tape, max_connections=8)


def grpc_transport(url: str, tape: Tape) -> Transport:
    authority = url.partition("://")[2]
    headers = call_headers(authority, METHOD, tls=False, timeout_ns=TIMEOUT_NS, metadata=METADATA)
    return GrpcTransport(url, tape, headers, channels=2)


def grpcio_transport(url: str, tape: Tape) -> Transport:
    return GrpcioTransport(url, tape, METHOD, METADATA, channels=2, timeout_ns=TIMEOUT_NS)


@contextlib.asynccontextmanager
async def opened(make: Make, url: str, tape: Tape) -> AsyncIterator[Transport]:
    transport = make(url, tape)
    await transport.open(1)
    try:
        yield transport
    finally:
        await transport.close()


async def told(make: Make, url: str, requests: list[bytes], *, at_once: bool) -> tuple[list[End], dict[int, bytes]]:
    """How every request ended, and the kept replies."""
    tape = Tape()
    async with opened(make, url, tape) as transport:
        for row, request in enumerate(requests):
            transport.issue(row, request)
            if not at_once:
                await tape.of(row)
        await tape.ends(len(requests))
    return [tape.of(row).result() for row in range(len(requests))], tape.replies


# --- against each other -----------------------------------------------------------------------


def inference_request(row: int) -> bytes:
    rows = 1 + row % 7
    inputs = [{"name": "INPUT", "datatype": "FP32", "shape": [rows, 16], "data": [0.5] * 16 * rows}]
    body = json.dumps({"id": str(row), "inputs": inputs}).encode()
    return encode_request("POST", "/v2/models/stub/infer", "test", [("Content-Type", "application/json")], body)


@pytest.mark.parametrize(
    ("faults", "at_once", "expected"),
    [
        pytest.param({}, True, {Outcome.OK}, id="all at once"),
        pytest.param(
            {"status": 0.1, "reset": 0.05, "truncated": 0.05, "garbage": 0.05, "seed": 5},
            False,
            {Outcome.OK, Outcome.STATUS, Outcome.RESET, Outcome.PROTOCOL},
            id="with faults",
        ),
    ],
)
def test_aiohttp_and_the_wire_client_see_the_same_server(
    tmp_path: Path, faults: dict[str, Any], at_once: bool, expected: set[Outcome]
) -> None:
    async def test(url: str) -> None:
        requests = [inference_request(row) for row in range(QUERIES)]
        wire, wire_replies = await told(http_transport, url, requests, at_once=at_once)
        (await asyncio.to_thread(urllib.request.urlopen, f"{url}/stub/reset", b"")).close()  # the same faults again
        ends, replies = await told(aiohttp_transport, url, requests, at_once=at_once)
        assert [end.outcome for end in ends] == [end.outcome for end in wire]
        assert {end.outcome for end in ends} == expected
        for row in range(QUERIES):
            assert (ends[row].status, ends[row].response_bytes) == (wire[row].status, wire[row].response_bytes)
            if ends[row].outcome is Outcome.STATUS:
                assert ends[row].detail == wire[row].detail
            if ends[row].outcome is Outcome.OK:
                assert parse_reply(replies[row]) == parse_reply(wire_replies[row])
                assert json.loads(parse_reply(replies[row])[2])["id"] == str(row)

    with stub(tmp_path, service={"kind": "constant", "mean_ms": 0.1}, faults=faults) as server:
        run(test(server.urls["http"]))


class Echo(grpc.GenericRpcHandler):
    """Reverses messages, but has no room for every seventh; remembers what came with them."""

    def __init__(self) -> None:
        self.metadata: list[dict[str, str]] = []
        self.time_remaining_s: list[float] = []

    def service(self, details: Any) -> Any:
        return grpc.unary_unary_rpc_method_handler(self.reverse) if details.method == METHOD else None

    async def reverse(self, message: bytes, context: Any) -> bytes:
        self.metadata.append(dict(context.invocation_metadata()))
        self.time_remaining_s.append(context.time_remaining())
        if row_of(message) % 7 == 3:
            await context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "no room: 100 % full")
        return message[::-1]


@contextlib.asynccontextmanager
async def echoing(echo: Echo) -> AsyncIterator[str]:
    server = grpc.aio.server(handlers=[echo], options=[("grpc.so_reuseport", 0)])
    port = server.add_insecure_port("127.0.0.1:0")
    await server.start()
    try:
        yield f"grpc://127.0.0.1:{port}"
    finally:
        await server.stop(None)


def test_grpcio_and_the_wire_client_see_the_same_server() -> None:
    async def test() -> None:
        echo = Echo()
        payloads = [payload_of(row, bytes([row]) * (37 * row)) for row in range(QUERIES)]
        requests = [frame_message(payload) for payload in payloads]
        async with echoing(echo) as url:
            wire, wire_replies = await told(grpc_transport, url, requests, at_once=True)
            ends, replies = await told(grpcio_transport, url, requests, at_once=True)
        assert [(end.outcome, end.status, end.detail) for end in ends] == [
            (end.outcome, end.status, end.detail) for end in wire
        ]
        refused = len(range(3, QUERIES, 7))
        assert Counter(end.outcome for end in ends) == {Outcome.OK: QUERIES - refused, Outcome.STATUS: refused}
        assert (ends[3].status, ends[3].detail) == (8, "RESOURCE_EXHAUSTED: no room: 100 % full")
        assert replies == wire_replies
        for row, reply in replies.items():
            assert ends[row].response_bytes == wire[row].response_bytes == len(reply)
            assert unframe_message(reply) == payloads[row][::-1]
        # What goes with a call arrives with both: metadata, and how long the client will wait.
        assert len(echo.metadata) == 2 * QUERIES
        for metadata, remaining_s in zip(echo.metadata, echo.time_remaining_s, strict=True):
            assert {name: metadata[name] for name, _ in METADATA} == dict(METADATA)
            assert 0.5 * TIMEOUT_NS / 1e9 < remaining_s <= TIMEOUT_NS / 1e9 + 0.1

    run(test())


OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"


class RawHttpConnection(HttpConnection):
    """Answers with the bytes of the script; empty ones and those behind a mark close the connection."""

    def act(self, answer: Answer, *where: int) -> None:
        self.transport.write(answer.body)
        if answer.kind == "drop":
            self.transport.close()


class RawHttpPeer(HttpPeer):
    def protocol(self) -> PeerConnection:
        return RawHttpConnection(self)


@pytest.mark.parametrize("make", [pytest.param(http_transport, id="http"), pytest.param(aiohttp_transport, id="aiohttp")])
@pytest.mark.parametrize(
    ("reply", "outcome", "words"),
    [
        pytest.param(Answer("drop", b""), Outcome.RESET, "before any reply", id="closed while it was served"),
        pytest.param(Answer("drop", OK[:10]), Outcome.RESET, "inside the reply", id="cut in the status line"),
        pytest.param(Answer("drop", OK[:30]), Outcome.RESET, "inside the reply", id="cut in the headers"),
        pytest.param(Answer("drop", OK[:-1]), Outcome.RESET, "inside the reply", id="cut in the body"),
        pytest.param(Answer("drop", CHUNKED + b"5\r\nab"), Outcome.RESET, "inside the reply", id="cut in a chunk"),
        pytest.param(Answer(body=b"\0\1 not HTTP\r\n\r\n"), Outcome.PROTOCOL, "not valid HTTP", id="garbage"),
        pytest.param(Answer(body=CHUNKED + b"zz\r\nabc"), Outcome.PROTOCOL, "not valid HTTP", id="garbage for a chunk size"),
        pytest.param(Answer("drop", b"HTTP/1.1 200 OK\r\n\r\nok"), Outcome.OK, "", id="a body until the close"),
        pytest.param(Answer(body=CHUNKED + b"2\r\nok\r\n0\r\n\r\n"), Outcome.OK, "", id="a chunked body"),
        pytest.param(Answer(body=b"HTTP/1.1 100 Continue\r\n\r\n" + OK), Outcome.OK, "", id="an interim reply first"),
        pytest.param(
            Answer(body=b"HTTP/1.1 302 Found\r\nLocation: /\r\nContent-Length: 0\r\n\r\n"),
            Outcome.STATUS,
            "HTTP 302",
            id="a redirect is not followed",
        ),
    ],
)
def test_replies_mean_the_same_to_both_http_clients(make: Make, reply: Answer, outcome: Outcome, words: str) -> None:
    async def test() -> None:
        tape = Tape()
        script = lambda payload: reply if row_of(payload) == 1 else Answer(body=OK)  # noqa: E731
        async with RawHttpPeer(script, tape) as peer, opened(make, peer.url, tape) as transport:
            for row in range(3):
                transport.issue(row, encode_request("POST", "/", "test", [], payload_of(row)))
                end = await tape.of(row)
                assert end.outcome is (outcome if row == 1 else Outcome.OK), end.detail
                if row == 1:
                    assert words in end.detail
                if end.outcome is Outcome.OK:
                    assert parse_reply(tape.replies[row])[2] == b"ok"
            assert [row_of(payload) for payload in peer.payloads] == [0, 1, 2], "nothing is sent twice"

    run(test())


class RawGrpcConnection(GrpcConnection):
    """Answers as the word in the script's body says."""

    def act(self, answer: Answer, *where: int) -> None:
        (stream,) = where
        match answer.body:
            case b"reset":
                self.http2.reset_stream(stream, error_code=8)  # CANCEL
            case b"reset inside":
                self.http2.send_headers(stream, GRPC_HEADERS)
                self.http2.send_data(stream, frame_message(b"ok")[:6])
                self.http2.reset_stream(stream, error_code=2)  # INTERNAL_ERROR
            case b"refused":
                self.http2.reset_stream(stream, error_code=7)  # REFUSED_STREAM: the client may send it again
            case b"garbage":
                self.transport.write(b"\xff" * 64)
            case b"no status":
                self.http2.send_headers(stream, GRPC_HEADERS)
                self.http2.send_data(stream, frame_message(b"ok"), end_stream=True)
            case b"no message":
                self.http2.send_headers(stream, GRPC_HEADERS)
                self.http2.send_headers(stream, [("grpc-status", "0")], end_stream=True)
            case b"half a message":
                self.http2.send_headers(stream, GRPC_HEADERS)
                self.http2.send_data(stream, frame_message(b"ok")[:6])
                self.http2.send_headers(stream, [("grpc-status", "0")], end_stream=True)
            case b"a proxy's error":
                self.http2.send_headers(stream, [(":status", "502")], end_stream=True)
            case _:
                super().act(answer, *where)
                return
        self.flush()


class RawGrpcPeer(GrpcPeer):
    def protocol(self) -> PeerConnection:
        return RawGrpcConnection(self)


@pytest.mark.parametrize("make", [pytest.param(grpc_transport, id="grpc"), pytest.param(grpcio_transport, id="grpcio")])
@pytest.mark.parametrize(
    ("word", "outcome"),
    [
        ("reset", Outcome.RESET),
        ("reset inside", Outcome.RESET),
        ("refused", Outcome.RESET),
        ("garbage", Outcome.PROTOCOL),
        ("no status", Outcome.PROTOCOL),
        ("no message", Outcome.PROTOCOL),
        ("half a message", Outcome.PROTOCOL),
        ("a proxy's error", Outcome.STATUS),
        ("ok", Outcome.OK),
    ],
)
def test_replies_mean_the_same_to_both_grpc_clients(make: Make, word: str, outcome: Outcome) -> None:
    async def test() -> None:
        tape = Tape()
        script = lambda payload: Answer(body=word.encode())  # noqa: E731
        async with RawGrpcPeer(script, tape) as peer, opened(make, peer.url, tape) as transport:
            transport.issue(0, frame_message(payload_of(0)))
            end = await tape.of(0)
            assert end.outcome is outcome, end.detail
            assert len(peer.payloads) == 1, "nothing is sent twice"

    run(test())


# --- what a library adds ----------------------------------------------------------------------


def test_aiohttp_sends_the_request_as_it_was_encoded() -> None:
    async def test() -> None:
        tape = Tape()
        headers = [("Content-Type", "application/x"), ("X-Tenant", "blue"), ("X-Tenant", "green")]
        request = encode_request("POST", "/v2/models/a%2Fb%7Ec/infer?x=%20&y", "example.com", headers, payload_of(0, b"body"))
        async with HttpPeer(lambda payload: Answer(), tape) as peer, opened(aiohttp_transport, peer.url, tape) as transport:
            for row in range(2):
                transport.issue(row, request)
                assert (await tape.of(row)).outcome is Outcome.OK
            assert peer.payloads == [payload_of(0, b"body")] * 2
            first, *rest = request.partition(b"\r\n\r\n")[0].split(b"\r\n")
            for head in peer.heads:
                sent_first, *sent = head.split(b"\r\n")
                assert sent_first == first
                assert sorted(sent) == sorted(rest), "no header is added, changed or lost"

    run(test())


def test_what_is_cancelled_before_its_task_began_never_reaches_the_library() -> None:
    async def test() -> None:
        tape = Tape()
        async with HttpPeer(lambda payload: Answer(), tape) as peer, opened(aiohttp_transport, peer.url, tape) as transport:
            for row in range(3):
                transport.issue(row, encode_request("POST", "/", "test", [], payload_of(row)))
            transport.cancel(1, 0, Outcome.UNFINISHED, "end of drain")
            assert transport.abandon_waiting() == [0, 2]
            assert tape.order == [1]
            transport.issue(3, encode_request("POST", "/", "test", [], payload_of(3)))
            assert (await tape.of(3)).outcome is Outcome.OK
            assert set(tape.issues) == {3}
            assert [row_of(payload) for payload in peer.payloads] == [3]

    run(test())


class Stubborn(ReferenceTransport):
    """A library that delivers its reply whether or not the query was cancelled."""

    async def carry(self, query: Query, request: bytes | memoryview) -> None:
        self.begin(query, 0)
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.get_running_loop().create_future()
        self.fail(query, 1, Outcome.PROTOCOL, "late")

    async def close_library(self) -> None:
        pass


def test_a_cancelled_query_never_ends_the_next_of_its_number() -> None:
    async def test() -> None:
        tape, following = Tape(), Tape()
        transport = Stubborn(tape)
        transport.issue(0, b"")
        await until(lambda: 0 in tape.issues)
        transport.cancel(0, 0, Outcome.TIMEOUT, "no complete reply in time")
        transport.sink = following
        transport.issue(0, b"")
        await until(lambda: 0 in following.issues)
        assert tape.of(0).result().outcome is Outcome.TIMEOUT
        assert not following.order
        await transport.close()
        assert following.of(0).result().detail == "the transport was closed"

    run(test())


@pytest.mark.parametrize("make", [pytest.param(aiohttp_transport, id="aiohttp"), pytest.param(grpcio_transport, id="grpcio")])
def test_failures_leave_no_garbage(make: Make) -> None:
    """A worker's collector is off: what needed it would stay, and at a dead server's rates that is a lot."""

    async def test() -> None:
        tape = Tape()
        peer = HttpPeer if make is aiohttp_transport else GrpcPeer
        encode = frame_message if peer is GrpcPeer else lambda body: encode_request("POST", "/", "test", [], body)
        async with peer(lambda payload: Answer(), tape) as server, opened(make, server.url, tape) as transport:
            await server.stop()
            gc.collect()
            gc.disable()
            try:
                for row in range(100):
                    transport.issue(row, encode(payload_of(row)))
                await tape.ends(100)
                await until(lambda: len(asyncio.all_tasks()) <= 1 + (2 if peer is GrpcPeer else 0))
                assert gc.collect() < 100
            finally:
                gc.enable()
        assert {tape.of(row).result().outcome for row in range(50, 100)} == {Outcome.CONNECT}

    run(test())


def test_time_spent_at_the_cap_is_known_and_counts_as_service_time() -> None:
    async def test() -> None:
        tape = Tape()
        async with HttpPeer(lambda payload: Answer(after=row_of(payload)), tape) as peer:
            transport = AiohttpTransport(peer.url, tape, max_connections=1)
            await transport.open(1)
            for row in range(4):
                transport.issue(row, encode_request("POST", "/", "test", [], payload_of(row)))
            await tape.ends(4)
            ends = [tape.of(row).result() for row in range(4)]
            assert all(tape.issues[row][0] < ends[0].at_ns for row in range(4)), "issued before a connection was free"
            stats = transport.stats
            assert (stats.connections_opened, stats.connections_peak, stats.cap_waits) == (1, 1, 3)
            waits_ns = [ends[row - 1].at_ns - tape.issues[row][0] for row in range(1, 4)]
            assert stats.cap_wait_ns == pytest.approx(sum(waits_ns), rel=0.5)
            await transport.close()

    run(test())


def test_our_own_host_running_out_of_files_is_our_fault() -> None:
    async def test() -> None:
        tape = Tape()
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        async with HttpPeer(lambda payload: Answer(), tape) as peer, opened(aiohttp_transport, peer.url, tape) as transport:
            probe = socket.socket()
            resource.setrlimit(resource.RLIMIT_NOFILE, (probe.fileno(), hard))
            probe.close()
            taken = []
            try:
                with contextlib.suppress(OSError):
                    while True:
                        taken.append(socket.socket())
                transport.issue(0, encode_request("POST", "/", "test", [], payload_of(0)))
                end = await tape.of(0)
            finally:
                resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
                for sock in taken:
                    sock.close()
            assert (end.outcome, end.detail) == (Outcome.CLIENT, "connect: Too many open files")

    run(test())


def test_grpcio_gives_up_at_the_deadline_it_was_given() -> None:
    async def test() -> None:
        tape = Tape()
        async with GrpcPeer(lambda payload: Answer("never"), tape) as peer:
            transport = GrpcioTransport(peer.url, tape, METHOD, channels=1, timeout_ns=50_000_000)
            await transport.open(1)
            transport.issue(0, frame_message(payload_of(0)))
            end = await tape.of(0)
            assert (end.outcome, end.detail) == (Outcome.TIMEOUT, "no complete reply in time")
            assert end.at_ns - tape.issues[0][0] >= 49_000_000
            await transport.close()

    run(test())


def test_grpcio_channels_have_connections_of_their_own_and_take_turns() -> None:
    async def test() -> None:
        tape = Tape()
        async with GrpcPeer(lambda payload: Answer(), tape) as peer:
            transport = GrpcioTransport(peer.url, tape, METHOD, channels=3, timeout_ns=TIMEOUT_NS)
            await transport.open(1)
            assert peer.accepted == transport.stats.connections_opened == transport.stats.connections_open == 3
            for row in range(6):
                transport.issue(row, frame_message(payload_of(row)))
            await tape.ends(6)
            assert [tape.issues[row][1] for row in range(6)] == [0, 1, 2, 0, 1, 2]
            for connection in list(peer.transports):
                connection.abort()
            await until(lambda: transport.stats.connections_open == 0)
            await transport.close()

    run(test())


NO_CONNECTION = "failed to connect to all addresses; last error: "


@pytest.mark.parametrize(
    ("code", "details", "expected"),
    [
        # As grpcio 1.60, 1.66, 1.74 and 1.85 word them.
        pytest.param(
            "UNAVAILABLE", f"{NO_CONNECTION}UNKNOWN: ipv4:127.0.0.1:1: Connection refused", Outcome.CONNECT, id="1.60: refused"
        ),
        pytest.param(
            "UNAVAILABLE", f"{NO_CONNECTION}UNKNOWN: connect: Connection refused (111)", Outcome.CONNECT, id="1.66: refused"
        ),
        pytest.param(
            "UNAVAILABLE",
            f"{NO_CONNECTION}INTERNAL: ipv4:127.0.0.1:1: socket: Too many open files\n\0\x95s",
            Outcome.CLIENT,
            id="1.85: no descriptors",
        ),
        pytest.param(
            "UNAVAILABLE", "DNS resolution failed for x.invalid:1: C-ares status", Outcome.CONNECT, id="1.74: no such host"
        ),
        pytest.param("UNAVAILABLE", "errors resolving x.invalid:1: []", Outcome.CONNECT, id="1.85: no such host"),
        pytest.param("UNAVAILABLE", "Socket closed", Outcome.RESET, id="1.60: closed"),
        pytest.param("UNAVAILABLE", "recvmsg:Connection reset by peer", Outcome.RESET, id="1.60: reset"),
        pytest.param("UNAVAILABLE", "GOAWAY received; Error code: 0; Debug Text: ", Outcome.RESET, id="1.66: goaway"),
        pytest.param("UNAVAILABLE", "Stream removed (Socket closed)", Outcome.RESET, id="1.85: closed"),
        pytest.param("CANCELLED", "Received RST_STREAM with error code 8", Outcome.RESET, id="1.74: stream reset"),
        pytest.param(
            "INTERNAL",
            "Stream removed (RST_STREAM (Received RST_STREAM with error code 2))",
            Outcome.RESET,
            id="1.85: stream reset",
        ),
        pytest.param("UNKNOWN", "Stream removed", Outcome.PROTOCOL, id="1.60: garbage"),
        pytest.param("UNKNOWN", "Stream removed (Failed parsing HTTP/2)", Outcome.PROTOCOL, id="1.85: garbage"),
        pytest.param("DEADLINE_EXCEEDED", "Deadline Exceeded", Outcome.TIMEOUT, id="1.60: deadline"),
        pytest.param("DEADLINE_EXCEEDED", "Stream removed (Deadline Exceeded)", Outcome.TIMEOUT, id="1.85: deadline"),
        pytest.param("DEADLINE_EXCEEDED", "the model took too long", Outcome.STATUS, id="the server's deadline"),
        pytest.param("UNAVAILABLE", "Socket to the model worker closed", Outcome.STATUS, id="the server's own words"),
        pytest.param("INTERNAL", "", Outcome.STATUS, id="no words at all"),
    ],
)
def test_grpcios_own_troubles_are_known_by_their_words(code: str, details: str, expected: Outcome) -> None:
    outcome, detail = read_error(code, details)
    assert outcome is expected
    assert "\n" not in detail
    if outcome is Outcome.STATUS:
        assert detail == (f"{code}: {details}" if details else code)


# --- opening and closing ----------------------------------------------------------------------


@pytest.mark.parametrize("peer", [pytest.param(HttpPeer, id="aiohttp"), pytest.param(GrpcPeer, id="grpcio")])
def test_tls_with_a_private_authority(tmp_path: Path, peer: type[Peer]) -> None:
    authority, stranger = trustme.CA(), trustme.CA()
    server_tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server_tls)
    if peer is GrpcPeer:
        server_tls.set_alpn_protocols(["h2"])

    def make(url: str, tape: Tape, trusted: trustme.CA) -> Transport:
        ca_file = tmp_path / "ca.pem"
        trusted.cert_pem.write_to_path(str(ca_file))
        if peer is GrpcPeer:
            return GrpcioTransport(url, tape, METHOD, channels=1, ca_file=str(ca_file), timeout_ns=TIMEOUT_NS)
        return AiohttpTransport(url, tape, ssl_context=ssl.create_default_context(cafile=str(ca_file)))

    encode = frame_message if peer is GrpcPeer else lambda body: encode_request("POST", "/", "test", [], body)

    async def test() -> None:
        tape = Tape()
        async with peer(lambda payload: Answer(), tape, tls=server_tls) as server:
            async with opened(lambda url, tape: make(url, tape, authority), server.url, tape) as transport:
                for row in range(3):
                    transport.issue(row, encode(payload_of(row)))
                    assert (await tape.of(row)).outcome is Outcome.OK
            with pytest.raises(TransportError, match=r"127\.0\.0\.1:\d+: cannot connect: .*CERTIFICATE_VERIFY_FAILED"):
                await make(server.url, tape, stranger).open(1)

    run(test())


@pytest.mark.parametrize("make", [pytest.param(aiohttp_transport, id="aiohttp"), pytest.param(grpcio_transport, id="grpcio")])
def test_an_unresolvable_host_is_named(make: Make) -> None:
    async def test() -> None:
        scheme = "http" if make is aiohttp_transport else "grpc"
        with pytest.raises(TransportError, match=r"no-such-host\.invalid: cannot be resolved"):
            await make(f"{scheme}://no-such-host.invalid:80", Tape()).open(1)

    run(test())


@pytest.mark.parametrize(
    ("make", "url", "kinds"),
    [
        pytest.param(aiohttp_transport, "ftp://127.0.0.1", "http:// or https://", id="aiohttp"),
        pytest.param(grpcio_transport, "grpc://127.0.0.1", "grpc:// or grpcs:// address with a port", id="grpcio"),
    ],
)
def test_an_address_of_another_kind_is_refused(make: Make, url: str, kinds: str) -> None:
    with pytest.raises(TransportError, match=re.escape(f"{url}: not an http" if "http" in kinds else f"{url}: not a grpc")):
        make(url, Tape())


def test_a_missing_grpcio_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("grpc", "grpc.aio"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(TransportError, match=r"pip install 'servebench\[grpc\]'"):
        GrpcioTransport("grpc://127.0.0.1:1", Tape(), METHOD, channels=1, timeout_ns=TIMEOUT_NS)


LEAVING = """
import asyncio, sys
import uvloop
from scripted_peers import Answer, GrpcPeer, HttpPeer, Tape, payload_of
from servebench.transport.aiohttp_client import AiohttpTransport
from servebench.transport.grpcio_client import GrpcioTransport
from servebench.wire.grpc import frame_message
from servebench.wire.http1 import encode_request

async def main():
    tape = Tape()
    script = lambda payload: Answer("never" if payload == payload_of(1) else "reply")
    async with HttpPeer(script, tape) as http, GrpcPeer(script, tape) as grpc:
        if sys.argv[1] == "aiohttp":
            transport, encode = AiohttpTransport(http.url, tape), lambda body: encode_request("POST", "/", "x", [], body)
        else:
            transport, encode = GrpcioTransport(grpc.url, tape, "/a/b", channels=2, timeout_ns=10**10), frame_message
        await transport.open(1)
        for row in range(3):
            transport.issue(row, encode(payload_of(row)))
        await tape.ends(2)
        await transport.close()
        assert tape.order[-1] == 1

uvloop.run(main())
print("left")
"""


@pytest.mark.parametrize("client", ["aiohttp", "grpcio"])
def test_a_process_that_closes_its_client_leaves_in_silence(client: str) -> None:
    """As a worker does; in a process of its own, because grpcio has threads that must end with it."""
    argv = [sys.executable, "-X", "dev", "-W", "error", "-c", LEAVING, client]
    done = subprocess.run(argv, cwd=Path(__file__).parent, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "left\n", "")
