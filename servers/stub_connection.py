"""One connection of the stub: HTTP/1.1 requests in, replies out in the order of the requests.

Contract. Every complete request becomes an `Exchange`, handed to ``handle`` at once. Replies may
be given in any order; HTTP/1.1 lets them leave only in the order of the requests (RFC 9112
section 9.3.2), so one whose turn has not come is kept. A request arrives when its last byte
does: ``arrival_ns`` is taken before anything else happens to those bytes.

Limits: no ``Expect: 100-continue``, no upgrades, no content codings; bodies are held in memory.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from typing import cast

import httptools

from servebench.clock import now_ns

from .stub_kserve import error_reply

_LENGTH_HEADER = b"inference-header-content-length"


class Ending(Enum):
    """What follows the bytes that were sent."""

    MORE = "more"  #: the reply goes on
    KEEP = "keep"  #: the next reply (the connection ends if the client asked for that)
    CLOSE = "close"  #: the end of the connection
    RESET = "reset"  #: TCP RST


@dataclass(slots=True, eq=False)
class Exchange:
    """A request, and the reply that is owed for it."""

    connection: Connection
    arrival_ns: int
    method: str
    target: str
    #: The body without KServe's raw tensors, and how many bytes of those followed.
    document: bytes
    raw_bytes: int
    keep_alive: bool
    unsent: list[bytes] = field(default_factory=list)
    ending: Ending = Ending.MORE

    def send(self, data: bytes, ending: Ending = Ending.KEEP) -> None:
        """Send reply bytes, as soon as all earlier requests of the connection are answered; nothing if the client has gone."""
        if data:
            self.unsent.append(data)
        self.ending = Ending.CLOSE if ending is Ending.KEEP and not self.keep_alive else ending
        self.connection.flush()


class Connection(asyncio.Protocol):
    """The server's end of one client connection; ``connections`` holds it while it is open."""

    def __init__(self, handle: Callable[[Exchange], None], connections: set[Connection]) -> None:
        self._handle = handle
        self._connections = connections
        self._transport: asyncio.Transport | None = None
        self._parser: httptools.HttpRequestParser | None = None
        self._owed: deque[Exchange] = deque()
        self._arrival_ns = 0
        self.on_message_begin()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Start to parse."""
        self._transport = cast(asyncio.Transport, transport)
        self._parser = httptools.HttpRequestParser(self)
        self._connections.add(self)

    def data_received(self, data: bytes) -> None:
        """Bytes of requests; complete ones are handled before this returns."""
        self._arrival_ns = now_ns()
        if self._parser is None:
            return
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            refused = Exchange(self, self._arrival_ns, "", "", b"", 0, keep_alive=False)
            self._owed.append(refused)
            self._parser = None
            refused.send(error_reply(400, f"not an HTTP/1.1 request: {error}").data)

    def connection_lost(self, exc: Exception | None) -> None:
        """Replies that are still owed are dropped."""
        self._transport = None
        self._parser = None  # parser and connection refer to each other, and garbage collection is off
        self._owed.clear()
        self._connections.discard(self)

    def abort(self) -> None:
        """End the connection now."""
        if self._transport is not None:
            self._transport.abort()

    def flush(self) -> None:
        """Send what may be sent."""
        while self._transport is not None and self._owed:
            exchange = self._owed[0]
            for data in exchange.unsent:
                self._transport.write(data)
            exchange.unsent.clear()
            if exchange.ending is Ending.MORE:
                return
            self._owed.popleft()
            if exchange.ending is not Ending.KEEP:
                self._end(self._transport, reset=exchange.ending is Ending.RESET)

    def _end(self, transport: asyncio.Transport, *, reset: bool) -> None:
        self._transport = None
        self._parser = None
        self._owed.clear()
        if reset:  # closing with a linger time of zero makes the kernel send RST (socket(7))
            transport.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            transport.abort()
        else:
            transport.close()

    # Callbacks of httptools, in the order of a request's parts.

    def on_message_begin(self) -> None:
        """Forget the last request."""
        self._url = b""
        self._document_bytes: int | None = None
        self._chunks: list[bytes] = []

    def on_url(self, url: bytes) -> None:
        """A piece of the request target."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """Only KServe's own header matters: how much of the body is JSON."""
        if len(name) == len(_LENGTH_HEADER) and name.lower() == _LENGTH_HEADER:
            # A value that is no number reads as "nothing is JSON", which the model then refuses.
            self._document_bytes = int(value) if value.isdigit() else 0

    def on_body(self, body: bytes) -> None:
        """A piece of the body."""
        self._chunks.append(body)

    def on_message_complete(self) -> None:
        """Hand the request over, unless an earlier one ended the connection."""
        if self._parser is None:
            return
        chunks = self._chunks
        total_bytes = sum(map(len, chunks))
        document_bytes = total_bytes if self._document_bytes is None else min(self._document_bytes, total_bytes)
        body = chunks[0] if chunks and len(chunks[0]) >= document_bytes else b"".join(chunks)
        exchange = Exchange(
            self,
            self._arrival_ns,
            self._parser.get_method().decode("ascii"),
            self._url.decode("latin-1"),
            body[:document_bytes],
            total_bytes - document_bytes,
            keep_alive=self._parser.should_keep_alive(),
        )
        self._owed.append(exchange)
        self._handle(exchange)
