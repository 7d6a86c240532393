"""The stub server's process: ``python -m servebench_servers.stub_server --model NAME --config JSON``.

One thread on uvloop. An inference query arrives when its last byte does, takes its place in
`QueueModel`, and its reply leaves when the model says so, to some microseconds; the moment is
stamped just before the reply is handed to the socket. The model's times are ideal ones: a reply
that leaves a little late does not delay the next. Everything but an inference query that the
model accepts bypasses the queue.

HTTP: KServe v2 (``/v2...``), and ``/stub``: ``POST /stub/reset`` restarts the random streams and
forgets the stamps, ``GET /stub/stamps`` gives `STAMPS` of every inference query in the order
of arrival: JSON with one list a column, or with ``?format=npy`` a structured numpy array, and
``GET /stub/grpc`` tells the ``url`` of gRPC, or the ``reason`` why there is none.

gRPC: KServe v2 on a port of its own (`stub_grpc`), through the same queue. It needs h2 and
protobuf, which are imported only if the port is wanted; without them there is HTTP alone.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import io
import signal
import sys
from array import array
from collections import deque
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import TYPE_CHECKING
from urllib.parse import unquote

import numpy as np
import uvloop

from servebench.clock import DeadlineTimer, now_ns

from .stub import StubOptions
from .stub_connection import Connection, Ending, Exchange
from .stub_faults import Fault, FaultStream, Prepare
from .stub_kserve import VERSION, Answers, Reply, RequestError, StubModel, error_reply, json_reply, reply, unknown_model
from .stub_queue import QueueModel

#: Columns of the stamps: CLOCK_MONOTONIC ns (0: not yet) of the arrival, of the departure in the ideal
#: queue, and of the actual one; service time and size of its batch. All but the arrival are 0 for a refused query.
STAMPS = ("arrival_ns", "due_ns", "departure_ns", "service_ns", "batch_size")

if TYPE_CHECKING:
    from .stub_grpc import GrpcConnection

_SPIN_NS = 200_000  # waking from the kernel's timer takes up to some 150 us on a virtual machine
_BACKLOG = 4096  # open-loop clients open many connections at once; the kernel caps it at somaxconn
_GARBAGE = b"\x16\x03\x01 this is not HTTP \xff\r\n\r\n"


class StubServer:
    """Runs the queue, keeps the stamps, and routes HTTP requests.

    ``grpc`` is what ``GET /stub/grpc`` says.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, model: str, options: StubOptions) -> None:
        self._loop = loop
        self._options = options
        self.model = StubModel(model, options.input_elements, options.output_elements)
        self.refusal = f"the queue is full: {options.queue_limit} queries are waiting"
        self.grpc: dict[str, str] = {}
        # The queries that the queue holds, in order: those with a prepared reply, then the others.
        self._prepared: deque[Callable[[], None]] = deque()
        self._pending: deque[Callable[[], Callable[[], None]]] = deque()
        self._most_prepared = options.service.max_batch or 1  # those in service, at least
        self._timer = DeadlineTimer(loop, self._on_timer, spin_ns=_SPIN_NS if options.precise else 0)
        self._fault_reply = error_reply(options.faults.status_code, "an injected fault")
        self._refusal = error_reply(503, self.refusal)
        self._routes = self._make_routes()
        self._armed_ns: int | None = None
        self._restart()

    def handle(self, exchange: Exchange) -> None:
        """Answer a request now, or when its time has come."""
        path = exchange.target.partition("?")[0]
        if "%" in path:
            path = unquote(path)
        action = self._routes.get((exchange.method, path))
        if action is not None:
            action(exchange)
        else:
            exchange.send(self._no_route(path).data)

    def close(self) -> None:
        """Release the timer."""
        self._timer.close()

    def _make_routes(self) -> dict[tuple[str, str], Callable[[Exchange], None]]:
        model = f"/v2/models/{self.model.name}"
        ok = reply(200, b"")
        facts = {
            "/v2": json_reply({"name": "stub", "version": version("servebench"), "extensions": ["binary_tensor_data"]}),
            "/v2/health/live": ok,
            "/v2/health/ready": ok,
        }
        routes: dict[tuple[str, str], Callable[[Exchange], None]] = {}
        for path in (model, f"{model}/versions/{VERSION}"):
            facts[path] = json_reply(self.model.metadata())
            facts[f"{path}/ready"] = ok
            facts[f"{path}/config"] = json_reply(self.model.config())
            routes["POST", f"{path}/infer"] = self._infer
        for path, fact in facts.items():
            routes["GET", path] = partial(_answer, fact)
        routes["POST", "/stub/reset"] = self._reset
        routes["GET", "/stub/stamps"] = self._give_stamps
        routes["GET", "/stub/grpc"] = self._tell_grpc
        return routes

    def _no_route(self, path: str) -> Reply:
        if any(path == known for _, known in self._routes):
            return error_reply(405, "method not allowed")
        model = path.removeprefix("/v2/models/").partition("/")[0]
        if path.startswith("/v2/models/") and model != self.model.name:
            return error_reply(404, unknown_model(model))
        return error_reply(404, f"there is nothing at {path}")

    # The queue.

    def admit(self, arrival_ns: int, prepare: Prepare) -> bool:
        """Take an inference query that arrived just now; False when it is refused.

        ``prepare`` is called about when the query enters service, what it returns when it departs.
        Making a reply takes longer than sending it, and is done while nothing is due.
        """
        self._release(arrival_ns)
        self._stamps.extend((arrival_ns, 0, 0, 0, 0))
        fault = self._faults.next()
        if not self._queue.arrive(arrival_ns):
            return False
        self._pending.append(partial(prepare, fault))
        self._release(arrival_ns)  # a service time of zero is over; else this sets the timer
        return True

    def _on_timer(self) -> None:
        self._release(now_ns())

    def _release(self, until_ns: int) -> None:
        """Send every reply that is due by ``until_ns``, and set the timer for the next one."""
        while (batch := self._queue.depart(until_ns)) is not None:
            for number in batch.arrivals:
                send = self._prepared.popleft() if self._prepared else self._pending.popleft()()
                row = number * len(STAMPS)
                departed = (batch.departure_ns, now_ns(), batch.service_ns, len(batch.arrivals))
                self._stamps[row + 1 : row + len(STAMPS)] = array("q", departed)
                send()
        next_ns = self._queue.next_departure_ns
        if next_ns is not None and next_ns != self._armed_ns:
            self._armed_ns = next_ns
            self._timer.arm(next_ns)
        while self._pending and len(self._prepared) < self._most_prepared:
            self._prepared.append(self._pending.popleft()())

    # Inference over HTTP.

    def _infer(self, exchange: Exchange) -> None:
        try:
            answers = self.model.answers(exchange.document, exchange.raw_bytes)
        except RequestError as error:
            exchange.send(error_reply(error.status, str(error)).data)
            return
        if not self.admit(exchange.arrival_ns, partial(self._prepare, exchange, answers)):
            exchange.send(self._refusal.data)

    def _prepare(self, exchange: Exchange, answers: Answers, fault: Fault | None) -> Callable[[], None]:
        good = answers.good
        half = good.head_bytes + (len(good.data) - good.head_bytes) // 2
        match fault:
            case None:
                return partial(exchange.send, good.data)
            case Fault.STATUS:
                return partial(exchange.send, self._fault_reply.data)
            case Fault.RESET:
                return partial(exchange.send, b"", Ending.RESET)
            case Fault.TRUNCATED:
                return partial(exchange.send, good.data[:half], Ending.CLOSE)
            case Fault.SLOW_BODY:
                return partial(self._send_slowly, exchange, good.data[:half], good.data[half:])
            case Fault.HANG:
                return _do_nothing
            case Fault.WRONG_OUTPUT:
                return partial(exchange.send, answers.empty.data)
            case Fault.GARBAGE:
                return partial(exchange.send, _GARBAGE)
            case Fault.CLOSE_IDLE:
                return partial(exchange.send, good.data, Ending.CLOSE)

    def _send_slowly(self, exchange: Exchange, first: bytes, second: bytes) -> None:
        exchange.send(first, Ending.MORE)
        self._loop.call_later(self._options.faults.slow_body_delay_ms / 1e3, exchange.send, second)

    # Control.

    def _restart(self) -> None:
        self._queue = QueueModel(self._options.service, self._options.queue_limit)
        self._faults = FaultStream(self._options.faults)
        self._stamps = array("q")  # rows of STAMPS, one after the other
        self._armed_ns = None

    def _reset(self, exchange: Exchange) -> None:
        if held := len(self._prepared) + len(self._pending):
            exchange.send(error_reply(409, f"{held} queries are still in the queue; wait until it is empty").data)
            return
        self._restart()
        exchange.send(json_reply({}).data)

    def _give_stamps(self, exchange: Exchange) -> None:
        rows = np.array(self._stamps, dtype="<i8").reshape(-1, len(STAMPS))
        if exchange.target.endswith("?format=npy"):
            file = io.BytesIO()
            np.save(file, rows.view([(name, "<i8") for name in STAMPS]).reshape(-1))
            exchange.send(reply(200, file.getvalue(), "application/octet-stream").data)
        else:
            exchange.send(json_reply(dict(zip(STAMPS, rows.T.tolist(), strict=True))).data)

    def _tell_grpc(self, exchange: Exchange) -> None:
        exchange.send(json_reply(self.grpc).data)


def _answer(fact: Reply, exchange: Exchange) -> None:
    exchange.send(fact.data)


def _do_nothing() -> None:
    pass


async def _listen(make: Callable[[], asyncio.Protocol], port: int) -> tuple[asyncio.Server, int]:
    """A listening socket, and its port. Raises OSError that says what to do."""
    try:
        server = await asyncio.get_running_loop().create_server(make, "127.0.0.1", port, backlog=_BACKLOG)
    except OSError as error:
        remedy = "choose another port, or 0 for a free one"
        raise OSError(error.errno, f"cannot listen on 127.0.0.1:{port}: {error.strerror}; {remedy}") from None
    return server, server.sockets[0].getsockname()[1]


async def _listen_grpc(stub: StubServer, options: StubOptions, connections: set[GrpcConnection]) -> asyncio.Server | None:
    """Serve gRPC if it is wanted and can be, and tell so in ``stub.grpc``."""
    if options.grpc_port is None:
        stub.grpc = {"reason": "grpc_port is null"}
        return None
    try:
        from .stub_grpc import GrpcConnection, GrpcService
        from .stub_grpc_kserve import GrpcModel
    except ImportError as error:
        stub.grpc = {"reason": f"{error}; pip install 'servebench[grpc]'"}
        return None
    service = GrpcService(GrpcModel(stub.model), options, stub.admit, stub.refusal)
    server, port = await _listen(lambda: GrpcConnection(service, connections), options.grpc_port)
    stub.grpc = {"url": f"grpc://127.0.0.1:{port}"}
    return server


async def serve(model: str, options: StubOptions) -> None:
    """Serve until SIGINT or SIGTERM; the address goes to stdout once it is listened on. Raises OSError when it is taken."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    stub = StubServer(loop, model, options)
    connections: set[Connection] = set()
    grpc_connections: set[GrpcConnection] = set()
    grpc_server = await _listen_grpc(stub, options, grpc_connections)
    server, port = await _listen(lambda: Connection(stub.handle, connections), options.port)
    gc.collect()
    gc.freeze()
    gc.disable()  # nothing on the hot path makes reference cycles, and a collection would delay departures
    sys.stdout.write(f"listening on http://127.0.0.1:{port}\n")
    sys.stdout.flush()
    await stop.wait()
    server.close()
    if grpc_server is not None:
        grpc_server.close()
    still_open: list[Connection | GrpcConnection] = [*connections, *grpc_connections]
    for connection in still_open:
        connection.abort()
    stub.close()


def main() -> None:
    """Read the command line and serve."""
    parser = argparse.ArgumentParser(prog="stub_server", description="A model server whose queueing behaviour is known.")
    parser.add_argument("--model", required=True, help="name of the model")
    parser.add_argument("--config", default="{}", help="StubOptions as JSON")
    arguments = parser.parse_args()
    options = StubOptions.model_validate_json(arguments.config)
    try:
        uvloop.run(serve(arguments.model, options))
    except OSError as error:
        sys.exit(error.strerror)


if __name__ == "__main__":
    main()
