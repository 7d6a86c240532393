"""The transports of aiohttp and grpcio, as their tests make and open them."""

import contextlib
from collections.abc import AsyncIterator, Callable

from scripted_peers import Tape

from servebench.transport.aiohttp_client import AiohttpTransport
from servebench.transport.base import Transport
from servebench.transport.grpcio_client import GrpcioTransport

METHOD = "/test.Echo/Reverse"
METADATA = [("x-tenant", "blue"), ("authorization", "Bearer 0123")]
TIMEOUT_NS = 20_000_000_000

Make = Callable[[str, Tape], Transport]


def aiohttp_transport(url: str, tape: Tape) -> Transport:
    return AiohttpTransport(url, tape, max_connections=8)


def grpcio_transport(url: str, tape: Tape) -> Transport:
    return GrpcioTransport(url, tape, METHOD, METADATA, channels=2, timeout_ns=TIMEOUT_NS)


@contextlib.asynccontextmanager
async def opened(make: Make, url: str, tape: Tape) -> AsyncIterator[Transport]:
    transport = make(url, tape)
    await transport.open(1)
    try:
        yield transport
    finally:
        await transport.close()
