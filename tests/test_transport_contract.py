"""One suite for every transport: what `servebench.transport.base` promises, against scripted servers.

Two servers, one per protocol (`peers`), and a script for the fake. Each transport says in its
`Kit` only how it is made and where the contract leaves it a choice.
"""

import asyncio
import contextlib
import gc
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from dataclasses import dataclass
from typing import Any

import pytest
import uvloop
from peers import (
    REFUSAL,
    REFUSAL_GRPC_STATUS,
    REFUSAL_HTTP_STATUS,
    Answer,
    GrpcPeer,
    HttpPeer,
    Peer,
    Script,
    Tape,
    payload_of,
    row_of,
    until,
)

from servebench.clock import now_ns
from servebench.errors import TransportError
from servebench.record.outcome import Outcome
from servebench.transport.aiohttp_client import AiohttpTransport
from servebench.transport.base import Transport
from servebench.transport.fake import FakeEnd, FakeTransport
from servebench.transport.grpc import GrpcTransport
from servebench.transport.grpcio_client import GrpcioTransport
from servebench.transport.http import HttpTransport
from servebench.wire.grpc import call_headers, frame_message, unframe_message
from servebench.wire.http1 import encode_request, parse_reply

METHOD = "/test.Echo/Reverse"
TIMEOUT_NS = 30_000_000_000


@dataclass(frozen=True)
class Kit:
    """How to test one transport. ``make(url, tape, capacity)``: ``capacity`` is of queries on their way at a time."""

    make: Callable[[str, Tape, int | None], Transport]
    peer: type[Peer] | None
    encode: Callable[[bytes], bytes]
    body: Callable[[bytes], bytes]  #: of a kept reply
    ok_status: int
    refusal: tuple[int, str]
    refused_connection: str
    library: bool = False  #: whether a client library owns the connections
    dropped: frozenset[Outcome] = frozenset({Outcome.RESET})


def _http_body(reply: bytes) -> bytes:
    status, headers, body = parse_reply(reply)
    assert (status, headers["x-peer"], headers["content-length"]) == (200, "scripted", str(len(body)))
    return body


def _http_request(payload: bytes) -> bytes:
    return encode_request("POST", "/infer", "test", [("Content-Type", "application/octet-stream")], payload)


def _grpc(url: str, tape: Tape, capacity: int | None) -> Transport:
    headers = call_headers(url.partition("://")[2], METHOD, tls=False, timeout_ns=TIMEOUT_NS)
    return GrpcTransport(url, tape, headers, channels=1)


def _grpcio(url: str, tape: Tape, capacity: int | None) -> Transport:
    return GrpcioTransport(url, tape, METHOD, channels=1, timeout_ns=TIMEOUT_NS)


HTTP = {
    "peer": HttpPeer,
    "encode": _http_request,
    "body": _http_body,
    "ok_status": 200,
    "refusal": (REFUSAL_HTTP_STATUS, f"HTTP {REFUSAL_HTTP_STATUS}"),
    "refused_connection": "Connection refused",
}
GRPC = {
    "peer": GrpcPeer,
    "encode": frame_message,
    "body": unframe_message,
    "ok_status": 0,
    "refusal": (REFUSAL_GRPC_STATUS, f"UNAVAILABLE: {REFUSAL}"),
    "refused_connection": "Connection refused",
}
KITS = {
    "http": Kit(make=lambda url, tape, capacity: HttpTransport(url, tape, max_connections=capacity), **HTTP),
    "aiohttp": Kit(
        make=lambda url, tape, capacity: AiohttpTransport(url, tape, max_connections=capacity), library=True, **HTTP
    ),
    "grpc": Kit(make=_grpc, **GRPC),
    "grpcio": Kit(make=_grpcio, library=True, **GRPC),
    "fake": Kit(
        make=lambda url, tape, capacity: FakeTransport(tape, max_connections=capacity),
        peer=None,
        encode=bytes,
        body=bytes,
        ok_status=200,
        refusal=(503, "scripted"),
        refused_connection="scripted",
    ),
}
