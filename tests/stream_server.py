"""A server on asyncio's streams that does what a test's script says, with or without TLS of a private authority."""

import asyncio
import contextlib
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable

import trustme

#: script(reader, writer, connection number)
StreamScript = Callable[[asyncio.StreamReader, asyncio.StreamWriter, int], Awaitable[None]]


@contextlib.asynccontextmanager
async def serving(script: StreamScript, tls: ssl.SSLContext | None = None) -> AsyncIterator[str]:
    """A server that runs the script on each connection, the first of which is number 0; gives its URL."""
    count = 0

    async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal count
        number, count = count, count + 1
        # Cancelled is what still waits as the loop ends, of which a stream's callback would complain.
        with contextlib.suppress(asyncio.CancelledError):
            with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
                await script(reader, writer, number)
            writer.close()
            with contextlib.suppress(ConnectionError, ssl.SSLError):
                await writer.wait_closed()

    server = await asyncio.start_server(accept, "127.0.0.1", 0, ssl=tls)
    port = server.sockets[0].getsockname()[1]
    try:
        yield f"{'https' if tls else 'http'}://127.0.0.1:{port}"
    finally:
        server.close()


def tls_pair(*alpn: str) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """A server's context for 127.0.0.1, and a client's that trusts it."""
    authority = trustme.CA()
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("127.0.0.1").configure_cert(server)
    if alpn:
        server.set_alpn_protocols(list(alpn))
    client = ssl.create_default_context()
    authority.configure_trust(client)
    return server, client
