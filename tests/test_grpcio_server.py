"""The gRPC transport against grpcio's own server."""

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import ThreadPoolExecutor

import grpc
import pytest
from grpc_calls import REQUEST, opened
from scripted_peers import Tape, run, until

from servebench.record.outcome import Outcome
from servebench.transport.grpc import GrpcTransport
from servebench.wire.grpc import call_headers, frame_message, unframe_message


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
        tape = Tape(keep=False)
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
        tape = Tape(keep=False)
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
        tape = Tape(keep=False)
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
