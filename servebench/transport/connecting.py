"""What every transport needs to open a connection: resolve once, connect without delay, say why not."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from typing import Any, TypeVar

from servebench.errors import TransportError
from servebench.record.outcome import Outcome

Address = tuple[socket.AddressFamily, Any]
P = TypeVar("P", bound=asyncio.Protocol)

#: Our own host ran out: never the server's fault.
_CLIENT_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM})


async def resolve(host: str, port: int) -> Address:
    """The host's first address. `TransportError` when there is none."""
    try:
        found = await asyncio.get_running_loop().getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise TransportError(f"{host}: cannot be resolved: {error.strerror}") from None
    family, _, _, _, address = found[0]
    return family, address


async def connect(protocol: P, address: Address, *, tls: ssl.SSLContext | None, host: str, timeout_s: float) -> P:
    """Connect ``protocol``, TCP_NODELAY on; `OSError` (TimeoutError, ssl.SSLError among them) when it cannot be."""
    family, (ip, port, *_) = address
    async with asyncio.timeout(timeout_s):  # event loops set TCP_NODELAY themselves
        await asyncio.get_running_loop().create_connection(
            lambda: protocol, ip, port, family=family, ssl=tls, server_hostname=host if tls else None
        )
    return protocol


def connect_outcome(error: OSError) -> Outcome:
    """Whose fault it is that a connection could not be opened."""
    return Outcome.CLIENT if error.errno in _CLIENT_ERRNOS else Outcome.CONNECT


def connect_reason(error: OSError) -> str:
    """Why a connection could not be opened, in words."""
    if isinstance(error, ssl.SSLError):
        return f"TLS: {error.reason or error}"
    if isinstance(error, TimeoutError) and error.errno is None:
        return "no answer within the time allowed"
    return os.strerror(error.errno) if error.errno else str(error)
