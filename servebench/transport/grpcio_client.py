"""Unary gRPC calls through grpc.aio: what an ordinary Python application would feel.

Each channel has its own connection (own subchannel pool), and queries take the channels in turn.
Messages go in and out as bytes, of any size; nothing is retried, no proxy of the environment is
used. Every call has the profile's time allowed as its deadline, so the server is told of it.

Time stamps are an application's: issued when it calls the stub, completed when the reply's
message is there. grpc.aio hands over a unary reply all at once, so the first byte has the same
stamp. The state of a channel is all that grpcio tells of its connections: connections opened,
lost and failed are counted from it, and one that is lost and replaced between two looks is missed.

grpcio gives its own troubles the same status codes as a server's, and tells them apart only in
words; `read_error` knows the words of grpcio 1.60 to 1.85. What it does not know is taken for the server's.
"""

from __future__ import annotations

import asyncio
import errno
import itertools
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from servebench.clock import now_ns
from servebench.errors import TransportError
from servebench.record.outcome import Outcome
from servebench.transport.base import Sink, Transport
from servebench.transport.connecting import read_grpc_address, resolve
from servebench.transport.reference import Query, ReferenceTransport
from servebench.wire.grpc import frame_message

_OPTIONS = (
    ("grpc.use_local_subchannel_pool", 1),  # else all channels to one server share one connection
    ("grpc.enable_retries", 0),
    ("grpc.enable_http_proxy", 0),
    ("grpc.max_send_message_length", -1),
    ("grpc.max_receive_message_length", -1),
)
_PREFIX_BYTES = 5
_NOT_CONNECTED = ("failed to connect to all addresses", "DNS resolution failed", "errors resolving")
#: How grpcio words what it found wrong itself; 1.85 says it in brackets, behind "Stream removed".
_OWN_WORDS = (
    "Stream removed",
    "Socket closed",
    "recvmsg:",
    "sendmsg:",
    "Delayed close",
    "GOAWAY received",
    "Received RST_STREAM",
)
_TIME_IS_UP = ("Stream removed (Deadline Exceeded)", "Deadline Exceeded")
#: Our own host ran out: never the server's fault.
_HOST_RAN_OUT = tuple(map(os.strerror, (errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM)))


class _Channel(NamedTuple):
    number: int
    channel: Any
    call: Any  #: of the one method
    settled: asyncio.Future[bool]  #: whether the first attempt to connect succeeded
    watcher: asyncio.Task[None]


class GrpcioTransport(ReferenceTransport):
    """grpc.aio channels to one ``grpc://`` or ``grpcs://`` server; see `servebench.transport.base.Transport`.

    ``path`` is ``/package.Service/Method``; requests are messages behind their prefix, and so are
    replies that are kept. ``ca_file`` holds the authorities to trust, in PEM (grpcio's own list
    when omitted); grpcio cannot be told not to verify. ``timeout_ns`` is the time allowed for a
    call, and for connecting. `TransportError` when grpcio is not installed.
    """

    def __init__(
        self,
        url: str,
        sink: Sink,
        path: str,
        metadata: Iterable[tuple[str, str]] = (),
        *,
        channels: int,
        ca_file: str | None = None,
        timeout_ns: int,
    ) -> None:
        super().__init__(sink)
        self._host, self._port, self._tls = read_grpc_address(url)
        self._grpc = _import_grpcio()
        self._path = path
        self._metadata = tuple((name.lower(), value) for name, value in metadata)
        self._wanted = channels
        self._ca_file = ca_file
        self._timeout_ns = timeout_ns
        self._channels: list[_Channel] = []
        self._turn: Iterator[_Channel] = iter(())
        self._closed = False

    async def open(self, connections: int) -> None:
        """Connect all channels (``connections`` is HTTP/1.1's matter)."""
        await resolve(self._host, self._port)  # a wrong name is told at once, and in our words
        self._channels = [self._make_channel(number) for number in range(self._wanted)]
        self._turn = itertools.cycle(self._channels)
        await asyncio.wait([one.settled for one in self._channels], timeout=self._timeout_ns / 1e9)
        settled = [one.settled.result() for one in self._channels if one.settled.done()]
        if not any(settled):
            reason = await self._why_not(self._channels[0]) if settled else "no answer within the time allowed"
            await self.close()
            raise TransportError(f"{self._host}:{self._port}: cannot connect: {reason}")

    async def carry(self, query: Query, request: bytes | memoryview) -> None:
        message = bytes(memoryview(request)[_PREFIX_BYTES:])
        channel = next(self._turn)
        keep = self.begin(query, channel.number)
        try:
            reply = await channel.call(message, timeout=self._timeout_ns / 1e9, metadata=self._metadata)
            at_ns = now_ns()
        except self._grpc.aio.AioRpcError as error:
            self._fail(query, now_ns(), error)
            return
        if reply is None:  # what grpc.aio makes of status OK without a message
            self.fail(query, at_ns, Outcome.PROTOCOL, "the reply holds no whole message")
        elif self.claim(query):
            self.sink.completed(query.row, at_ns, at_ns, 0, _PREFIX_BYTES + len(reply))
            if keep:
                self.sink.reply(query.row, [frame_message(reply)])

    async def close_library(self) -> None:
        self._closed = True
        for one in self._channels:
            await one.channel.close()
        # Closing changes a channel's state: its watcher ends, and leaves nothing in grpcio's queue for a loop that is gone.
        await asyncio.gather(*(one.watcher for one in self._channels))
        self._channels = []

    def _fail(self, query: Query, at_ns: int, error: Any) -> None:
        code = error.code()
        outcome, detail = read_error(code.name, error.details() or "")
        if outcome is not Outcome.STATUS:
            self.fail(query, at_ns, outcome, detail)
        elif self.claim(query):
            self.sink.refused(query.row, at_ns, at_ns, code.value[0], 0, detail)

    # --- channels -----------------------------------------------------------------------

    def _make_channel(self, number: int) -> _Channel:
        aio, target = self._grpc.aio, f"[{self._host}]:{self._port}" if ":" in self._host else f"{self._host}:{self._port}"
        if self._tls:
            roots = Path(self._ca_file).read_bytes() if self._ca_file else None
            channel = aio.secure_channel(target, self._grpc.ssl_channel_credentials(roots), options=_OPTIONS)
        else:
            channel = aio.insecure_channel(target, options=_OPTIONS)
        call = channel.unary_unary(self._path, request_serializer=None, response_deserializer=None)
        settled = asyncio.get_running_loop().create_future()
        return _Channel(number, channel, call, settled, asyncio.create_task(self._watch(channel, settled)))

    async def _why_not(self, one: _Channel) -> str:
        """grpcio tells why it cannot connect only to a call, and this one is harmless where it can."""
        try:
            await one.channel.unary_unary("/grpc.health.v1.Health/Check")(b"", timeout=self._timeout_ns / 1e9)
        except self._grpc.aio.AioRpcError as error:
            return read_error(error.code().name, error.details() or "")[1].removeprefix("connect: ")
        return "the connection broke"

    async def _watch(self, channel: Any, settled: asyncio.Future[bool]) -> None:
        """Connect a channel, and count what becomes of its connections until it is closed."""
        was_ready = False
        while not self._closed:
            state = channel.get_state(try_to_connect=not settled.done())
            ready, failed = state.name == "READY", state.name == "TRANSIENT_FAILURE"
            if ready != was_ready:
                was_ready = ready
                self.stats.connections_opened += ready
                self.set_open(self.stats.connections_open + (1 if ready else -1))
            if failed:
                self.count_connect_failure("a channel could not connect")
            if (ready or failed) and not settled.done():
                settled.set_result(ready)
            await channel.wait_for_state_change(state)
        self.set_open(0)


def read_error(code: str, details: str) -> tuple[Outcome, str]:
    """What a call's status means: grpcio's own trouble, or the server's word (STATUS)."""
    if code == "UNAVAILABLE" and details.startswith(_NOT_CONNECTED):
        details = details.partition("\n")[0]  # behind it, 1.85 may add bytes of a socket address
        ours = any(words in details for words in _HOST_RAN_OUT)
        return Outcome.CLIENT if ours else Outcome.CONNECT, f"connect: {details}"
    if code == "DEADLINE_EXCEEDED" and details in _TIME_IS_UP:
        return Outcome.TIMEOUT, "no complete reply in time"
    if details.startswith(_OWN_WORDS):
        broken = code == "UNAVAILABLE" or "RST_STREAM" in details
        return Outcome.RESET if broken else Outcome.PROTOCOL, details
    return Outcome.STATUS, f"{code}: {details}" if details else code


def _import_grpcio() -> Any:
    try:
        import grpc.aio
    except ImportError:
        raise TransportError("the grpcio client needs grpcio; install it with: pip install 'servebench[grpc]'") from None
    return grpc


_: type[Transport] = GrpcioTransport
