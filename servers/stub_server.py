"""The stub server's process: ``python -m servebench_servers.stub_server --model NAME --config JSON``.

One thread on uvloop. An inference query arrives when its last byte does, takes its place in
`QueueModel`, and its reply leaves when the model says so, to some microseconds; the moment is
stamped just before the reply is handed to the socket. The model's times are ideal ones: a reply
that leaves a little late does not delay the next. Everything but an inference query that the
model accepts bypasses the queue.

HTTP: KServe v2 (``/v2...``), and ``/stub``: ``POST /stub/reset`` restarts the random streams and
forgets the stamps, ``GET /stub/stamps`` gives `STAMPS` of every inference query in the order
of arrival: JSON with one list a column, or with ``?format=npy`` a structured numpy array.
"""

from __future__ import annotations

import argparse
import asyncio
import functools
import gc
import io
import signal
import sys
from array import array
from collections import deque
from collections.abc import Callable
from importlib.metadata import version
from urllib.parse import unquote

import numpy as np
import uvloop

from servebench.clock import DeadlineTimer, now_ns

from .stub import StubOptions
from .stub_connection import Connection, Ending, Exchange
from .stub_faults import Fault, FaultStream
from .stub_kserve import VERSION, Answers, Reply, RequestError, StubModel, error_reply, json_reply, reply
from .stub_queue import QueueModel

#: Columns of the stamps: CLOCK_MONOTONIC ns (0: not yet) of the arrival, of the departure in the ideal
#: queue, and of the actual one; service time and size of its batch. All but the arrival are 0 for a refused query.
STAMPS = ("arrival_ns", "due_ns", "departure_ns", "service_ns", "batch_size")

_SPIN_NS = 200_000  # waking from the kernel's timer takes up to some 150 us on a virtual machine
_BACKLOG = 4096  # open-loop clients open many connections at once; the kernel caps it at somaxconn
_GARBAGE = b"\x16\x03\x01 this is not HTTP \xff\r\n\r\n"


class StubServer:
    """Routes requests, runs the queue, and keeps the stamps."""

    def __init__(self, loop: asyncio.AbstractEventLoop, model: str, options: StubOptions) -> None:
        self._loop = loop
        self._options = options
        self._model = StubModel(model, options.input_elements, options.output_elements)
        self._pending: deque[tuple[Exchange, Answers, Fault | None]] = deque()
        self._timer = DeadlineTimer(loop, self._on_timer, spin_ns=_SPIN_NS if options.precise else 0)
        self._fault_reply = error_reply(options.faults.status_code, "an injected fault")
        self._refusal = error_reply(503, f"the queue is full: {options.queue_limit} queries are waiting")
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
        model = f"/v2/models/{self._model.name}"
        ok = reply(200, b"")
        facts = {
            "/v2": json_reply({"name": "stub", "version": version("servebench"), "extensions": ["binary_tensor_data"]}),
            "/v2/health/live": ok,
            "/v2/health/ready": ok,
        }
        routes: dict[tuple[str, str], Callable[[Exchange], None]] = {}
        for path in (model, f"{model}/versions/{VERSION}"):
            facts[path] = json_reply(self._model.metadata())
            facts[f"{path}/ready"] = ok
            facts[f"{path}/config"] = json_reply(self._model.config())
            routes["POST", f"{path}/infer"] = self._infer
        for path, fact in facts.items():
            routes["GET", path] = functools.partial(_answer, fact)
        routes["POST", "/stub/reset"] = self._reset
        routes["GET", "/stub/stamps"] = self._give_stamps
        return routes

    def _no_route(self, path: str) -> Reply:
        if any(path == known for _, known in self._routes):
            return error_reply(405, "method not allowed")
        model = path.removeprefix("/v2/models/").partition("/")[0]
        if path.startswith("/v2/models/") and model != self._model.name:
            return error_reply(404, f"Request for unknown model: '{model}' is not found")
        return error_reply(404, f"there is nothing at {path}")

    # The queue.

    def _infer(self, exchange: Exchange) -> None:
        try:
            answers = self._model.answers(exchange.document, exchange.raw_bytes)
        except RequestError as error:
            exchange.send(error_reply(error.status, str(error)).data)
            return
        arrival_ns = exchange.arrival_ns
        self._release(arrival_ns)
        self._stamps.extend((arrival_ns, 0, 0, 0, 0))
        fault = self._faults.next()
        if not self._queue.arrive(arrival_ns):
            exchange.send(self._refusal.data)
            return
        self._pending.append((exchange, answers, fault))
        self._release(arrival_ns)  # a service time of zero is over; else this sets the timer

    def _on_timer(self) -> None:
        self._release(now_ns())

    def _release(self, until_ns: int) -> None:
        """Send every reply that is due by ``until_ns``, and set the timer for the next one."""
        while (batch := self._queue.depart(until_ns)) is not None:
            for number in batch.arrivals:
                exchange, answers, fault = self._pending.popleft()
                row = number * len(STAMPS)
                departed = (batch.departure_ns, now_ns(), batch.service_ns, len(batch.arrivals))
                self._stamps[row + 1 : row + len(STAMPS)] = array("q", departed)
                if fault is None:
                    exchange.send(answers.good.data)
                else:
                    self._spoil(exchange, answers, fault)
        next_ns = self._queue.next_departure_ns
        if next_ns is not None and next_ns != self._armed_ns:
            self._armed_ns = next_ns
            self._timer.arm(next_ns)

    def _spoil(self, exchange: Exchange, answers: Answers, fault: Fault) -> None:
        good = answers.good
        half = good.head_bytes + (len(good.data) - good.head_bytes) // 2
        match fault:
            case Fault.STATUS:
                exchange.send(self._fault_reply.data)
            case Fault.RESET:
                exchange.send(b"", Ending.RESET)
            case Fault.TRUNCATED:
                exchange.send(good.data[:half], Ending.CLOSE)
            case Fault.SLOW_BODY:
                exchange.send(good.data[:half], Ending.MORE)
                self._loop.call_later(self._options.faults.slow_body_delay_ms / 1e3, exchange.send, good.data[half:])
            case Fault.HANG:
                pass
            case Fault.WRONG_OUTPUT:
                exchange.send(answers.empty.data)
            case Fault.GARBAGE:
                exchange.send(_GARBAGE)
            case Fault.CLOSE_IDLE:
                exchange.send(good.data, Ending.CLOSE)

    # Control.

    def _restart(self) -> None:
        self._queue = QueueModel(self._options.service, self._options.queue_limit)
        self._faults = FaultStream(self._options.faults)
        self._stamps = array("q")  # rows of STAMPS, one after the other
        self._armed_ns = None

    def _reset(self, exchange: Exchange) -> None:
        if self._pending:
            exchange.send(error_reply(409, f"{len(self._pending)} queries are still in the queue; wait until it is empty").data)
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


def _answer(fact: Reply, exchange: Exchange) -> None:
    exchange.send(fact.data)


async def serve(model: str, options: StubOptions) -> None:
    """Serve until SIGINT or SIGTERM; the address goes to stdout once it is listened on. Raises OSError when it is taken."""
    loop = asyncio.get_running_loop()
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    stub = StubServer(loop, model, options)
    connections: set[Connection] = set()
    server = await loop.create_server(lambda: Connection(stub.handle, connections), "127.0.0.1", options.port, backlog=_BACKLOG)
    gc.collect()
    gc.freeze()
    gc.disable()  # nothing on the hot path makes reference cycles, and a collection would delay departures
    sys.stdout.write(f"listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}\n")
    sys.stdout.flush()
    await stop.wait()
    server.close()
    for connection in list(connections):
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
        sys.exit(f"cannot listen on 127.0.0.1:{options.port}: {error.strerror}; choose another port, or 0 for a free one")


if __name__ == "__main__":
    main()
