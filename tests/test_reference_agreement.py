"""Do aiohttp and grpcio see the same server as our own wire clients do? They are held against each other, query by query."""

import asyncio
import contextlib
import json
import urllib.request
from collections import Counter
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import grpc.aio
import pytest
from e2e import stub
from reference_transports import METADATA, METHOD, TIMEOUT_NS, Make, aiohttp_transport, grpcio_transport, opened
from scripted_peers import (
    GRPC_HEADERS,
    Answer,
    End,
    GrpcConnection,
    GrpcPeer,
    HttpConnection,
    HttpPeer,
    PeerConnection,
    Tape,
    payload_of,
    row_of,
    run,
)

from servebench.record.outcome import Outcome
from servebench.transport.base import Transport
from servebench.transport.grpc import GrpcTransport
from servebench.transport.http import HttpTransport
from servebench.wire.grpc import call_headers, frame_message, unframe_message
from servebench.wire.http1 import encode_request, parse_reply

QUERIES = 200


def http_transport(url: str, tape: Tape) -> Transport:
    return HttpTransport(url, tape, max_connections=8)


def grpc_transport(url: str, tape: Tape) -> Transport:
    authority = url.partition("://")[2]
    headers = call_headers(authority, METHOD, tls=False, timeout_ns=TIMEOUT_NS, metadata=METADATA)
    return GrpcTransport(url, tape, headers, channels=2)


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
