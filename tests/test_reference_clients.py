"""The reference clients' own choices: what aiohttp and grpcio add, how they open, fail and leave.

What every transport promises is in `test_transport_contract`; that these see the same server as
our own clients, in `test_reference_agreement`.
"""

import asyncio
import contextlib
import gc
import re
import ssl
import subprocess
import sys
from pathlib import Path

import pytest
import trustme
from descriptors import no_descriptor_left
from reference_transports import METHOD, TIMEOUT_NS, Make, aiohttp_transport, grpcio_transport, opened
from scripted_peers import Answer, GrpcPeer, HttpPeer, Peer, Tape, payload_of, row_of, run, until

from servebench.errors import TransportError
from servebench.record.outcome import Outcome
from servebench.transport.aiohttp_client import AiohttpTransport
from servebench.transport.base import Transport
from servebench.transport.grpcio_client import GrpcioTransport, read_error
from servebench.transport.reference import Query, ReferenceTransport
from servebench.wire.grpc import frame_message
from servebench.wire.http1 import encode_request

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
        async with HttpPeer(lambda payload: Answer(), tape) as peer, opened(aiohttp_transport, peer.url, tape) as transport:
            with no_descriptor_left():
                transport.issue(0, encode_request("POST", "/", "test", [], payload_of(0)))
                end = await tape.of(0)
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


@pytest.mark.parametrize(
    ("make", "scheme"),
    [pytest.param(aiohttp_transport, "http", id="aiohttp"), pytest.param(grpcio_transport, "grpc", id="grpcio")],
)
def test_a_port_that_is_none_is_refused(make: Make, scheme: str) -> None:
    with pytest.raises(TransportError, match=f"{scheme}://a:b: Port could not be cast"):
        make(f"{scheme}://a:b", Tape())


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
    asyncio.get_running_loop().slow_callback_duration = 30  # a busy machine's long step is no complaint about the client
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
