"""A chat completions server whose true queueing behaviour is known, for peers that speak OpenAI's API alone.

It is the package's stub server with two more routes, ``POST /v1/chat/completions`` and ``GET /v1/models``:
the same queue, the same stamps (``GET /stub/stamps``), the same ``POST /stub/reset``, the same options.
What is asked does not matter; the reply is a constant of a few tokens, streamed in one piece where streaming is wanted.
"""

from __future__ import annotations

import argparse
import asyncio
import gc
import json
import re
import signal
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import uvloop
from servebench_servers.stub import StubOptions
from servebench_servers.stub_connection import Connection, Exchange
from servebench_servers.stub_faults import Fault
from servebench_servers.stub_kserve import json_reply, reply
from servebench_servers.stub_server import StubServer

from benchmarks.peers.base import Target
from benchmarks.scratch_server import ScratchServer

MODEL = "stub"
PATH = "/v1/chat/completions"
BODY = json.dumps({"model": MODEL, "messages": [{"role": "user", "content": "Hello"}], "max_tokens": 1}).encode()
_LISTENING = re.compile(r"^listening on (http://127\.0\.0\.1:\d+)$", re.MULTILINE)
_BACKLOG = 4096
_USAGE = {"prompt_tokens": 1, "completion_tokens": 1, "total_tokens": 2}
_COMMON = {"id": "chatcmpl-0", "created": 0, "model": MODEL}
_STREAM = (
    {
        "object": "chat.completion.chunk",
        "choices": [{"index": 0, "delta": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
    },
    {"object": "chat.completion.chunk", "choices": [], "usage": _USAGE},
)
_COMPLETION = json_reply(
    {
        **_COMMON,
        "object": "chat.completion",
        "choices": [{"index": 0, "message": {"role": "assistant", "content": "Hi"}, "finish_reason": "stop"}],
        "usage": _USAGE,
    }
)
_EVENTS = "".join(f"data: {json.dumps(_COMMON | chunk)}\n\n" for chunk in _STREAM) + "data: [DONE]\n\n"
_STREAMED = reply(200, _EVENTS.encode(), "text/event-stream")


class ChatServer(StubServer):
    """The stub with OpenAI's routes; faults are not served on them."""

    def _make_routes(self) -> dict[tuple[str, str], Callable[[Exchange], None]]:
        models = json_reply({"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0, "owned_by": "stub"}]})
        return super()._make_routes() | {
            ("POST", PATH): self._chat,
            ("GET", "/v1/models"): lambda exchange: exchange.send(models.data),
            ("GET", "/health"): lambda exchange: exchange.send(reply(200, b"").data),
        }

    def _chat(self, exchange: Exchange) -> None:
        # The service time of the queue covers this parse only if it is not shorter; a null service shows it.
        document = json.loads(exchange.document)
        data = (_STREAMED if document.get("stream") else _COMPLETION).data

        def prepare(_: Fault | None) -> Callable[[], None]:
            return partial(exchange.send, data)

        if not self.admit(exchange.arrival_ns, prepare):
            exchange.send(reply(503, b"").data)


class OpenAIStub(ScratchServer):
    """A running stub."""

    name = "openai-stub"

    def __init__(self, cpus: Sequence[int], options: StubOptions) -> None:
        self._options = options
        super().__init__(cpus)

    def prepare(self, directory: Path) -> list[str]:
        """This module."""
        return [sys.executable, "-m", "benchmarks.openai_stub", "--config", self._options.model_dump_json()]

    def is_ready(self) -> bool:
        """Whether it has said where it listens."""
        listening = _LISTENING.search(self.log_tail())
        if listening is not None:
            self.url = listening[1]
        return listening is not None

    @property
    def target(self) -> Target:
        """The query that peers send."""
        return Target(url=self.url, model=MODEL, path=PATH, body=BODY, headers=(("content-type", "application/json"),))


async def serve(options: StubOptions) -> None:
    """Serve until SIGINT or SIGTERM; the address goes to stdout."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    stub = ChatServer(loop, MODEL, options)
    connections: set[Connection] = set()
    server = await loop.create_server(lambda: Connection(stub.handle, connections), "127.0.0.1", options.port, backlog=_BACKLOG)
    gc.freeze()
    gc.disable()  # as in the stub: a collection would delay departures
    print(f"listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await stop.wait()
    server.close()
    for connection in list(connections):
        connection.abort()
    stub.close()


def main() -> None:
    """Entry point."""
    parser = argparse.ArgumentParser(prog="openai_stub", description="A chat completions server with known queueing behaviour.")
    parser.add_argument("--config", default="{}", help="options of `servebench serve stub`, as JSON")
    uvloop.run(serve(StubOptions.model_validate_json(parser.parse_args().config)))


if __name__ == "__main__":
    main()
