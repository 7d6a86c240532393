"""A null model server from pip alone: one uvloop process that answers KServe requests with the constants nginx would.

It does the least that HTTP/1.1 asks of it: the header block up to its blank line, the body by ``content-length``, a constant
reply. Heads repeat, so what follows from one is worked out once. Slower than nginx: good for ratios, not for ceilings.
"""

from __future__ import annotations

import asyncio
import functools
import re
import signal
import sys
from http import HTTPStatus
from pathlib import Path
from typing import Any, cast

import uvloop

from benchmarks.nginx import MODEL, REPLIES
from benchmarks.scratch_server import ScratchServer

_BLANK_LINE = b"\r\n\r\n"
_LENGTH = re.compile(rb"\r\ncontent-length: *(\d+)", re.IGNORECASE)
_LISTENING = re.compile(r"^listening on (http://127\.0\.0\.1:\d+)$", re.MULTILINE)
#: More than a client's distinct heads; a wild one must not fill the memory.
_HEADS = 256
_BACKLOG = 4096


@functools.lru_cache(maxsize=_HEADS)
def answer_to(head: bytes) -> tuple[int, bytes]:
    """How long the body behind a header block (without its blank line) is, in bytes, and the whole reply."""
    length = _LENGTH.search(head)
    path = head.split(b" ", 2)[1].decode("latin-1")
    status, body = (HTTPStatus.OK, REPLIES[path]) if path in REPLIES else (HTTPStatus.NOT_FOUND, "")
    lines = (f"HTTP/1.1 {status} {status.phrase}", "Content-Type: application/json", f"Content-Length: {len(body)}", "", body)
    return int(length[1]) if length else 0, "\r\n".join(lines).encode()


class Connection(asyncio.Protocol):
    """Answers every complete request, in order; what is not complete waits for the rest."""

    def __init__(self) -> None:
        self._pending = b""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)

    def data_received(self, data: bytes) -> None:
        pending = self._pending + data if self._pending else data
        begin, replies = 0, []
        while (head_end := pending.find(_BLANK_LINE, begin)) >= 0:
            body_bytes, reply = answer_to(pending[begin:head_end])
            end = head_end + len(_BLANK_LINE) + body_bytes
            if end > len(pending):
                break
            replies.append(reply)
            begin = end
        self._pending = pending[begin:]
        if replies:
            self._transport.write(b"".join(replies))


class NullHttpServer(ScratchServer):
    """A running null server."""

    name = "null-http"
    endpoint: dict[str, Any] = {"model": MODEL, "tensor_format": "json"}  # noqa: RUF012 - read only
    saturating_connections: int | None = 64

    def prepare(self, directory: Path) -> list[str]:
        """This module."""
        return [sys.executable, "-m", "benchmarks.null_http"]

    def is_ready(self) -> bool:
        """Whether it has said where it listens."""
        listening = _LISTENING.search(self.log_tail())
        if listening is not None:
            self.url = listening[1]
        return listening is not None


async def serve() -> None:
    """Serve until SIGINT or SIGTERM; the address goes to stdout."""
    loop, stop = asyncio.get_running_loop(), asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        loop.add_signal_handler(number, stop.set)
    server = await loop.create_server(Connection, "127.0.0.1", 0, backlog=_BACKLOG)
    print(f"listening on http://127.0.0.1:{server.sockets[0].getsockname()[1]}", flush=True)
    await stop.wait()
    server.close()


if __name__ == "__main__":
    uvloop.run(serve())
