"""One suite for every transport: what `servebench.transport.base` promises, against scripted servers.

Two servers, one per protocol (`peers`), and a script for the fake. Each transport says in its
`Kit` only how it is made and where the contract leaves it a choice.
"""

import asyncio
import contextlib
import gc
import tracemalloc
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

import pytest
from scripted_peers import (
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
    run,
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
    """How to test one transport: how it is made, and where the contract leaves it a choice.

    ``make(url, tape, capacity, script)``; ``capacity`` is how many queries may be on their way at a time.
    """

    make: Callable[[str, Tape, int | None, Script], Transport]
    peer: type[Peer] | None
    encode: Callable[[bytes], bytes]
    body: Callable[[bytes], bytes]  #: of a kept reply
    ok_status: int
    framing_bytes: int  #: of a reply that count as received beside its body
    refusal: tuple[int, str]
    when_full: dict[str, int]  #: statistics after 6 queries of which 2 find room
    library: bool = False  #: a client library owns connections and waiting


def http_body(reply: bytes) -> bytes:
    status, headers, body = parse_reply(reply)
    assert (status, headers["x-peer"], headers["content-length"]) == (200, "scripted", str(len(body)))
    return body


def http_request(payload: bytes) -> bytes:
    return encode_request("POST", "/infer?a=%2F", "test", [("Content-Type", "application/octet-stream")], payload)


def http(url: str, tape: Tape, capacity: int | None, script: Script) -> Transport:
    return HttpTransport(url, tape, max_connections=capacity)


def aiohttp(url: str, tape: Tape, capacity: int | None, script: Script) -> Transport:
    return AiohttpTransport(url, tape, max_connections=capacity)


def grpc(url: str, tape: Tape, capacity: int | None, script: Script) -> Transport:
    headers = call_headers(url.partition("://")[2], METHOD, tls=False, timeout_ns=TIMEOUT_NS)
    return GrpcTransport(url, tape, headers, channels=1)


def grpcio(url: str, tape: Tape, capacity: int | None, script: Script) -> Transport:
    return GrpcioTransport(url, tape, METHOD, channels=1, timeout_ns=TIMEOUT_NS)


def fake(url: str, tape: Tape, capacity: int | None, script: Script) -> Transport:
    """The fake ends its queries itself, some milliseconds apart where the script wants an order."""
    outcomes = {"reply": Outcome.OK, "refuse": Outcome.STATUS, "drop": Outcome.RESET, "never": Outcome.OUTSTANDING}

    def end(row: int) -> FakeEnd:
        answer = script(bytes(dict(transport.requests)[row]))
        status = REFUSAL_HTTP_STATUS if answer.kind == "refuse" else 200
        return FakeEnd(outcomes[answer.kind], 0.002 * answer.after, status, answer.body, REFUSAL)

    transport = FakeTransport(tape, end, max_connections=capacity)
    return transport


HTTP: dict[str, Any] = {
    "peer": HttpPeer,
    "encode": http_request,
    "body": http_body,
    "ok_status": 200,
    "framing_bytes": 0,
    "refusal": (REFUSAL_HTTP_STATUS, f"HTTP {REFUSAL_HTTP_STATUS}"),
}
GRPC: dict[str, Any] = {
    "peer": GrpcPeer,
    "encode": frame_message,
    "body": unframe_message,
    "ok_status": 0,
    "framing_bytes": 5,
    "refusal": (REFUSAL_GRPC_STATUS, f"UNAVAILABLE: {REFUSAL}"),
}
POOL_FULL = {"connections_opened": 2, "connections_peak": 2, "cap_waits": 4, "stream_waits": 0}
CHANNEL_FULL = {"connections_opened": 1, "connections_peak": 1, "cap_waits": 0}
KITS = {
    "http": Kit(http, **HTTP, when_full={**POOL_FULL, "connection_waits": 4}),
    # The library opens nothing ahead: the first two wait as well, for connections to open.
    "aiohttp": Kit(aiohttp, **HTTP, when_full={**POOL_FULL, "connection_waits": 6}, library=True),
    "grpc": Kit(grpc, **GRPC, when_full={**CHANNEL_FULL, "connection_waits": 4, "stream_waits": 4}),
    # The library does not tell who waits for a stream.
    "grpcio": Kit(grpcio, **GRPC, when_full={**CHANNEL_FULL, "connection_waits": 0, "stream_waits": 0}, library=True),
    "fake": Kit(
        fake,
        peer=None,
        encode=bytes,
        body=bytes,
        ok_status=200,
        framing_bytes=0,
        refusal=(REFUSAL_HTTP_STATUS, REFUSAL),
        when_full={**POOL_FULL, "connection_waits": 4},
    ),
}
every_transport = pytest.mark.parametrize("kit", [pytest.param(kit, id=name) for name, kit in KITS.items()])
every_real_transport = pytest.mark.parametrize("kit", [pytest.param(kit, id=name) for name, kit in KITS.items() if kit.peer])


@dataclass
class Scene:
    """An open transport and its server, which the fake has not."""

    kit: Kit
    tape: Tape
    transport: Transport
    peer: Peer | None

    def issue(self, row: int, rest: bytes = b"") -> None:
        self.transport.issue(row, self.kit.encode(payload_of(row, rest)))

    async def arrived(self, count: int) -> None:
        """Wait until that many queries are where they wait for their answers."""
        if self.peer is not None:
            await self.peer.seen(count)
        await until(lambda: len(self.tape.issues) >= count)

    def body(self, row: int, tape: Tape | None = None) -> bytes:
        return self.kit.body((tape or self.tape).replies[row])


@contextlib.asynccontextmanager
async def playing(kit: Kit, script: Script, *, capacity: int | None = None) -> AsyncIterator[Scene]:
    """A scene whose transport leaves neither a task nor a connection behind, whatever happened in it."""
    tape = Tape()
    async with contextlib.AsyncExitStack() as stack:
        peer, url = None, ""
        if kit.peer is not None:
            peer = await stack.enter_async_context(kit.peer(script, tape, max_streams=capacity))
            url = peer.url
        before = asyncio.all_tasks()
        transport = kit.make(url, tape, capacity, script)
        await transport.open(capacity or 1)
        try:
            yield Scene(kit, tape, transport, peer)
        finally:
            await transport.close()
            left = asyncio.all_tasks() - before - (peer.tasks if peer is not None else set())
            assert not left
            if peer is not None:
                await until(lambda: peer.open == 0)
        stats = transport.stats
        assert stats.connections_open == 0
        assert stats.connections_opened >= stats.connections_peak >= 1
        assert stats.connection_waits >= stats.cap_waits + stats.stream_waits
        assert (stats.cap_wait_ns > 0) <= (stats.cap_waits > 0)
    gc.collect()  # what was left open is a warning now, and warnings are errors


def reversing(payload: bytes) -> Answer:
    return Answer(body=payload[::-1])


@every_transport
def test_a_reply_is_stamped_in_order_counted_and_kept(kit: Kit) -> None:
    async def test() -> None:
        async with playing(kit, reversing) as scene:
            for row in range(3):
                before_ns = now_ns()
                scene.issue(row, b"abc")
                end = await scene.tape.of(row)
                assert end.outcome is Outcome.OK, end.detail
                assert before_ns <= scene.tape.issues[row][0] < end.first_byte_ns <= end.at_ns <= now_ns()
                assert (end.status, end.response_bytes) == (kit.ok_status, kit.framing_bytes + 7)
                assert scene.body(row) == b"cba" + payload_of(row)[::-1]
            scene.transport.sink = following = Tape(keep=False)
            scene.issue(0, b"abc")
            assert (await following.of(0)).response_bytes == kit.framing_bytes + 7
            assert not following.replies, "nobody asked for it"

    run(test())


@every_transport
def test_a_refusal_has_its_status_and_words_and_harms_nobody_else(kit: Kit) -> None:
    async def test() -> None:
        async with playing(kit, lambda payload: Answer("refuse" if row_of(payload) == 1 else "reply")) as scene:
            for row in range(3):
                scene.issue(row)
                end = await scene.tape.of(row)
                if row != 1:
                    assert end.outcome is Outcome.OK
                    continue
                status, detail = kit.refusal
                assert (end.outcome, end.status) == (Outcome.STATUS, status)
                assert end.detail.startswith(detail)
                assert REFUSAL in end.detail
                assert scene.tape.issues[row][0] < end.first_byte_ns <= end.at_ns
            assert {0, 2} == set(scene.tape.replies)
            if scene.peer is not None and not kit.library:
                assert scene.peer.accepted <= 2, "the connection stays in use"

    run(test())


@every_transport
def test_replies_may_come_in_any_order(kit: Kit) -> None:
    async def test() -> None:
        async with playing(kit, lambda payload: Answer(body=payload, after=4 - row_of(payload))) as scene:
            for row in range(5):
                scene.issue(row)
            await scene.tape.ends(5)
            assert scene.tape.order == [4, 3, 2, 1, 0]
            assert [scene.body(row) for row in range(5)] == [payload_of(row) for row in range(5)]

    run(test())


@every_transport
def test_a_hundred_at_once(kit: Kit) -> None:
    async def test() -> None:
        # Nobody is answered before all have arrived: not one waited for another.
        async with playing(kit, lambda payload: Answer(body=payload[::-1], seen=100)) as scene:
            for row in range(100):
                scene.issue(row, b"%03d" % row)
            await scene.tape.ends(100)
            for row in range(100):
                assert scene.tape.of(row).result().outcome is Outcome.OK
                assert scene.body(row) == payload_of(row, b"%03d" % row)[::-1]
            assert sorted(scene.tape.order) == list(range(100))
            assert scene.transport.stats.cap_waits == scene.transport.stats.stream_waits == 0

    run(test())


@every_transport
def test_five_megabytes_both_ways(kit: Kit) -> None:
    """More than gRPC's libraries take without being told to (4 MiB)."""

    async def test() -> None:
        rest = bytes(range(256)) * (20 << 10)
        async with playing(kit, reversing) as scene:
            for row, view in enumerate((bytes, memoryview)):
                scene.transport.issue(row, view(kit.encode(payload_of(row, rest))))
                end = await scene.tape.of(row)
                assert end.outcome is Outcome.OK, end.detail
                assert end.response_bytes == len(rest) + 4 + kit.framing_bytes
                assert scene.body(row) == payload_of(row, rest)[::-1]

    run(test())


@every_transport
def test_a_cancelled_query_ends_once_and_its_late_reply_goes_to_nobody(kit: Kit) -> None:
    def script(payload: bytes) -> Answer:
        return Answer(body=b"late", after=1) if payload.endswith(b"first") else Answer(body=b"right")

    async def test() -> None:
        async with playing(kit, script) as scene:
            scene.issue(0, b"first")
            await scene.arrived(1)
            connection = scene.tape.issues[0][1]
            scene.transport.cancel(0, connection, Outcome.TIMEOUT, "no complete reply in time")
            end = scene.tape.of(0).result()
            assert (end.outcome, end.first_byte_ns, end.detail) == (Outcome.TIMEOUT, 0, "no complete reply in time")
            scene.transport.cancel(0, connection, Outcome.UNFINISHED, "a second time")
            # The next phase counts its rows from 0 again.
            scene.transport.sink = following = Tape()
            scene.issue(0, b"second")
            assert (await following.of(0)).outcome is Outcome.OK
            assert scene.body(0, following) == b"right"
            scene.transport.cancel(0, following.issues[0][1], Outcome.TIMEOUT, "too late to matter")
            for row in range(1, 4):
                scene.issue(row)
                assert (await following.of(row)).outcome is Outcome.OK
            assert scene.tape.order == [0]

    run(test())


@every_transport
def test_a_connection_lost_inside_a_reply_ends_one_query_and_the_next_works(kit: Kit) -> None:
    async def test() -> None:
        async with playing(kit, lambda payload: Answer("drop" if row_of(payload) == 1 else "reply"), capacity=1) as scene:
            for row, outcome in enumerate((Outcome.OK, Outcome.RESET)):
                scene.issue(row)
                assert (await scene.tape.of(row)).outcome is outcome
            # We know at once; a library may lose some more before it does.
            for row in range(2, 20 if kit.library else 3):
                scene.issue(row)
                end = await scene.tape.of(row)
                if end.outcome is Outcome.OK:
                    break
                assert end.outcome in (Outcome.RESET, Outcome.STALE), end.detail
            assert end.outcome is Outcome.OK
            if scene.peer is not None:
                rows = [row_of(payload) for payload in scene.peer.payloads]
                assert len(rows) == len(set(rows)), "nothing is sent twice"

    run(test())


@every_real_transport
def test_nobody_listens_any_more(kit: Kit) -> None:
    async def test() -> None:
        async with playing(kit, lambda payload: Answer()) as scene:
            assert scene.peer is not None
            scene.issue(0)
            await scene.tape.of(0)
            await scene.peer.stop()
            received = scene.peer.received_bytes
            # The first ones may still find the old connection, and lose it.
            for row in range(1, 10):
                scene.issue(row)
                end = await scene.tape.of(row)
                if end.outcome is Outcome.CONNECT:
                    break
                assert end.outcome in (Outcome.RESET, Outcome.STALE)
            assert end.outcome is Outcome.CONNECT
            assert end.first_byte_ns == 0
            assert end.detail.startswith("connect: ")
            assert "Connection refused" in end.detail
            assert (row in scene.tape.issues) == kit.library, "a library is called before it connects"
            assert scene.peer.received_bytes == received, "no byte of it was sent"
            await until(lambda: sum(scene.transport.stats.connect_failures.values()) >= 1)
            address = scene.peer.url.partition("://")[2]
            with pytest.raises(TransportError, match=rf"{address}: cannot connect: .*Connection refused"):
                await kit.make(scene.peer.url, Tape(), None, scene.peer.script).open(1)

    run(test())


@every_transport
def test_queries_that_were_never_sent_are_given_back(kit: Kit) -> None:
    async def test() -> None:
        script = lambda payload: Answer("never" if row_of(payload) < 3 else "reply")  # noqa: E731
        async with playing(kit, script, capacity=1) as scene:
            for row in range(3):
                scene.issue(row)
            await scene.arrived(1)
            abandoned = scene.transport.abandon_waiting()
            assert not set(abandoned) & set(scene.tape.issues)
            assert abandoned == ([] if kit.library else [1, 2])
            for row, (_, connection) in list(scene.tape.issues.items()):
                scene.transport.cancel(row, connection, Outcome.UNFINISHED, "end of drain")
                assert scene.tape.of(row).result().outcome is Outcome.UNFINISHED
            assert sorted(abandoned + scene.tape.order) == [0, 1, 2]
            scene.issue(3)
            assert (await scene.tape.of(3)).outcome is Outcome.OK
            if scene.peer is not None:
                rows = [row_of(payload) for payload in scene.peer.payloads]
                # grpcio learns of the three cancellations one by one, and fills each place with the next in line.
                assert rows == [0, 3] or (kit.peer is GrpcPeer and kit.library and rows == sorted({0, *rows, 3}))

    run(test())


@pytest.mark.parametrize("name", ["http", "grpc"])
def test_a_query_that_waits_takes_little_memory(name: str) -> None:
    """A client far behind holds millions: not more of it than of their records on disk, which is 64 bytes a query."""

    async def test() -> None:
        kit, waiting = KITS[name], 20_000
        async with playing(kit, lambda payload: Answer("never"), capacity=1) as scene:
            scene.issue(0)
            await scene.arrived(1)
            request = kit.encode(payload_of(1))
            tracemalloc.start()
            try:
                for row in range(1000, 1000 + waiting):
                    scene.transport.issue(row, request)
                assert tracemalloc.get_traced_memory()[0] < 64 * waiting
            finally:
                tracemalloc.stop()
            assert scene.transport.abandon_waiting() == list(range(1000, 1000 + waiting))

    run(test())


@every_transport
def test_closing_ends_what_is_out(kit: Kit) -> None:
    async def test() -> None:
        async with playing(kit, lambda payload: Answer("never")) as scene:
            for row in range(3):
                scene.issue(row)
            await scene.arrived(3)
            await scene.transport.close()
            await until(lambda: len(scene.tape.order) == 3)
            for row in range(3):
                end = scene.tape.of(row).result()
                assert (end.outcome, end.first_byte_ns) == (Outcome.RESET, 0)

    run(test())


@every_transport
def test_waits_are_counted_where_they_can_be_known(kit: Kit) -> None:
    async def test() -> None:
        async with playing(kit, lambda payload: Answer(seen=2), capacity=2) as scene:
            for row in range(6):
                scene.issue(row)
            await scene.tape.ends(6)
            assert {scene.tape.of(row).result().outcome for row in range(6)} == {Outcome.OK}
            stats = scene.transport.stats
            assert {name: getattr(stats, name) for name in kit.when_full} == kit.when_full
            if kit.peer is HttpPeer:
                assert stats.cap_wait_ns > 0

    run(test())
