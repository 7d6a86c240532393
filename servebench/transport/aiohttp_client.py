"""HTTP/1.1 through aiohttp's client: what an ordinary asyncio application would feel.

The same pre-encoded requests as `servebench.transport.http.HttpTransport` takes are handed to one
`aiohttp.ClientSession`: no redirects, no cookies, no headers of its own, no decompression; its
connection pool is as it comes (limit apart, idle connections are closed after 15 s). POST is
never repeated; aiohttp itself repeats a GET whose reused connection was closed.

Time stamps are an application's: issued when it calls the session, first byte when the response
object is there (its headers are parsed), completed when the whole body has been read. What
aiohttp tells of its pool through `aiohttp.TraceConfig` is counted: connections opened, queries
that waited for one to open, and at the cap. When it closes an idle one it does not tell, so
``connections_open`` counts those that carry a query. The peak is exact all the same: a
connection is only opened when every open one is busy.
"""

from __future__ import annotations

import asyncio
import io
import ssl
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import aiohttp
from yarl import URL

from servebench.clock import now_ns
from servebench.errors import TransportError
from servebench.record.outcome import Outcome
from servebench.transport.base import Sink, Transport
from servebench.transport.connecting import connect, connect_outcome, connect_reason, read_http_address, resolve
from servebench.transport.reference import Query, ReferenceTransport
from servebench.wire.http1 import MAX_HEADER_BYTES

_BLANK_LINE = b"\r\n\r\n"
#: aiohttp adds these to every request unless told not to.
_AUTOMATIC_HEADERS = ("Accept", "Accept-Encoding", "Content-Type", "User-Agent")
#: aiohttp wants larger bodies as files: it writes those in pieces and lets the loop run in between.
_LARGE_BODY_BYTES = 1 << 20
#: The library does not say which connection it will take.
_CONNECTION = 0


@dataclass(frozen=True, slots=True)
class _Call:
    """An encoded request taken apart into what aiohttp's interface asks for."""

    request: bytes | memoryview  #: the original, so that its identity stays its own
    method: str
    url: URL
    headers: list[tuple[str, str]]
    body: memoryview

    def data(self) -> memoryview | io.BytesIO:
        """The body for one use; taken before the query is issued, because a large one is copied."""
        return self.body if len(self.body) <= _LARGE_BODY_BYTES else io.BytesIO(self.body)


class AiohttpTransport(ReferenceTransport):
    """One `aiohttp.ClientSession` to one ``http://`` or ``https://`` server; see `servebench.transport.base.Transport`.

    ``timeout_s`` is the time allowed for opening a connection. All queries are said to be on connection 0.
    """

    def __init__(
        self,
        url: str,
        sink: Sink,
        *,
        max_connections: int | None = None,
        ssl_context: ssl.SSLContext | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        super().__init__(sink)
        self._host, self._port, self._ssl = read_http_address(url, ssl_context)
        self._origin = URL.build(scheme="https" if self._ssl else "http", host=self._host, port=self._port)
        self._max_connections = max_connections
        self._timeout_s = timeout_s
        self._calls: dict[int, _Call] = {}  # by the identity of the request object, which is one per sample
        self._session: aiohttp.ClientSession | None = None

    async def open(self, connections: int) -> None:
        """Find out whether anybody listens, with a connection that is closed at once.

        aiohttp opens connections only for queries, so none is open ahead: warm-up traffic fills the pool.
        """
        address = await resolve(self._host, self._port)
        try:
            probe = await connect(_Probe(), address, tls=self._ssl, host=self._host, timeout_s=self._timeout_s)
        except OSError as error:
            raise TransportError(f"{self._host}:{self._port}: cannot connect: {connect_reason(error)}") from None
        probe.transport.close()
        await probe.closed
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=self._max_connections or 0, ssl=self._ssl or True),
            skip_auto_headers=_AUTOMATIC_HEADERS,
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._timeout_s),
            trace_configs=[self._tracing()],
        )

    async def carry(self, query: Query, request: bytes | memoryview) -> None:
        assert self._session is not None, "open() comes first"
        call = self._calls.get(id(request)) or self._take_apart(request)
        data = call.data()
        keep = self.begin(query, _CONNECTION)
        try:
            response = await self._session.request(
                call.method, call.url, headers=call.headers, data=data, allow_redirects=False, trace_request_ctx=query
            )
            query.first_byte_ns = now_ns()
            body = await response.read()
            at_ns = now_ns()
        except (aiohttp.ClientError, TimeoutError) as error:
            self._fail(query, now_ns(), error)
            return
        finally:
            if query.connected:
                self.set_open(self.stats.connections_open - 1)
        if not self.claim(query):
            return
        status = response.status
        if 200 <= status < 300:
            self.sink.completed(query.row, query.first_byte_ns, at_ns, status, len(body))
            if keep:
                self.sink.reply(query.row, [_raw_reply(response, body)])
        else:
            tail = _raw_reply(response, body)
            self.sink.refused(query.row, query.first_byte_ns, at_ns, status, len(body), f"HTTP {status}", tail)

    async def close_library(self) -> None:
        if self._session is not None:
            await self._session.close()
            await asyncio.sleep(0)  # let the transports run their connection_lost

    def _fail(self, query: Query, at_ns: int, error: Exception) -> None:
        outcome, detail = _read_failure(error, reused=query.reused)
        _let_go(error)
        if not query.connected and detail.startswith("connect: "):
            self.count_connect_failure(detail.removeprefix("connect: "))
        self.fail(query, at_ns, outcome, detail)

    def _take_apart(self, request: bytes | memoryview) -> _Call:
        view = memoryview(request)
        head, blank, _ = bytes(view[: MAX_HEADER_BYTES + len(_BLANK_LINE)]).partition(_BLANK_LINE)
        if not blank:
            raise ValueError(f"no whole HTTP request: its header block does not end within {MAX_HEADER_BYTES} bytes")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        headers = [(name, value) for name, _, value in (line.partition(": ") for line in lines)]
        url = URL(f"{self._origin}{target}", encoded=True)
        call = self._calls[id(request)] = _Call(request, method, url, headers, view[len(head) + len(_BLANK_LINE) :])
        return call

    # --- what aiohttp tells of its pool -----------------------------------------------------

    def _tracing(self) -> aiohttp.TraceConfig:
        tracing = aiohttp.TraceConfig()
        tracing.on_connection_queued_start.append(self._queued)
        tracing.on_connection_queued_end.append(self._unqueued)
        tracing.on_connection_create_start.append(self._connecting)
        tracing.on_connection_create_end.append(self._connected)
        tracing.on_connection_reuseconn.append(self._reused)
        return tracing

    async def _queued(self, _session: aiohttp.ClientSession, context: SimpleNamespace, _: Any) -> None:
        query: Query = context.trace_request_ctx
        if not query.queued_ns:  # aiohttp may queue it again, when another was quicker
            self.stats.connection_waits += 1
            self.stats.cap_waits += 1
        query.queued_ns = now_ns()

    async def _unqueued(self, _session: aiohttp.ClientSession, context: SimpleNamespace, _: Any) -> None:
        self.stats.cap_wait_ns += now_ns() - context.trace_request_ctx.queued_ns

    async def _connecting(self, _session: aiohttp.ClientSession, context: SimpleNamespace, _: Any) -> None:
        self.stats.connection_waits += not context.trace_request_ctx.queued_ns

    async def _connected(self, _session: aiohttp.ClientSession, context: SimpleNamespace, _: Any) -> None:
        context.trace_request_ctx.connected = True
        self.stats.connections_opened += 1
        self.set_open(self.stats.connections_open + 1)

    async def _reused(self, _session: aiohttp.ClientSession, context: SimpleNamespace, _: Any) -> None:
        context.trace_request_ctx.connected = context.trace_request_ctx.reused = True
        self.set_open(self.stats.connections_open + 1)


class _Probe(asyncio.Protocol):
    """A connection that carries nothing."""

    def __init__(self) -> None:
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport

    def connection_lost(self, exc: Exception | None) -> None:
        self.closed.set_result(None)


def _read_failure(error: Exception, *, reused: bool) -> tuple[Outcome, str]:
    """What an exception of aiohttp means, in the words of `servebench.transport.http.HttpTransport` where both know it."""
    if isinstance(error, TimeoutError):  # the only timeout that is set
        return Outcome.CONNECT, "connect: no answer within the time allowed"
    if isinstance(error, aiohttp.ClientConnectorError):
        cause = error.__cause__ if isinstance(error.__cause__, OSError) else error
        return connect_outcome(cause), f"connect: {connect_reason(cause)}"
    if isinstance(error, aiohttp.ServerDisconnectedError):
        # Closed in good order. With the head of a reply in it, the error is no plain string.
        if not isinstance(error.message, str):
            return Outcome.RESET, "connection closed inside the reply's header block"
        # Whether the query reached the server first is not known here: the socket is gone. So it is never called STALE.
        where = " (it had served queries before: perhaps closed while idle)" if reused else ""
        return Outcome.RESET, f"connection closed before any reply{where}"
    if isinstance(error, aiohttp.ClientPayloadError):
        return Outcome.RESET, f"connection closed inside the reply: {error}"
    if isinstance(error, OSError):
        return Outcome.RESET, f"connection reset: {error}"
    return Outcome.PROTOCOL, f"not valid HTTP: {error}"


def _let_go(error: BaseException | None) -> None:
    """Cut an error from the frames it went through, which refer back to it: collection is off while measuring."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _raw_reply(response: aiohttp.ClientResponse, body: bytes) -> bytes:
    """The reply as bytes again, its body framed by its length: what `servebench.wire.http1.parse_reply` reads."""
    lines = [f"HTTP/1.1 {response.status} {response.reason or ''}".encode()]
    for name, value in response.raw_headers:
        if name.lower() not in (b"content-length", b"transfer-encoding"):
            lines.append(name + b": " + value)
    lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + _BLANK_LINE + body


_: type[Transport] = AiohttpTransport
