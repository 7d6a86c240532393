"""What every transport needs to open a connection: read the address, resolve once, connect without delay, say why not."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import ssl
from typing import Any, TypeVar
from urllib.parse import SplitResult, urlsplit

from servebench.errors import TransportError
from servebench.record.outcome import Outcome

Address = tuple[socket.AddressFamily, Any]
P = TypeVar("P", bound=asyncio.Protocol)

#: Our own host ran out: never the server's fault.
_CLIENT_ERRNOS = frozenset({errno.EMFILE, errno.ENFILE, errno.EADDRNOTAVAIL, errno.ENOBUFS, errno.ENOMEM})


def read_http_address(url: str, ssl_context: ssl.SSLContext | None) -> tuple[str, int, ssl.SSLContext | None]:
    """Host, port, and TLS settings (None for ``http://``) of a server; `TransportError` for what is not HTTP's address.

    Without an ``ssl_context``, ``https://`` gets Python's defaults.
    """
    parts, port = _split(url)
    if parts.scheme not in ("http", "https") or parts.hostname is None:
        raise TransportError(f"{url}: not an http:// or https:// address")
    if parts.scheme == "http":
        return parts.hostname, port or 80, None
    return parts.hostname, port or 443, ssl_context or ssl.create_default_context()


def read_grpc_address(url: str) -> tuple[str, int, bool]:
    """Host, port, and whether TLS is spoken with a server; `TransportError` for what is not gRPC's address."""
    parts, port = _split(url)
    if parts.scheme not in ("grpc", "grpcs") or parts.hostname is None or port is None:
        raise TransportError(f"{url}: not a grpc:// or grpcs:// address with a port")
    return parts.hostname, port, parts.scheme == "grpcs"


def _split(url: str) -> tuple[SplitResult, int | None]:
    """An address and its port."""
    try:
        parts = urlsplit(url)
        return parts, parts.port
    except ValueError as error:  # a port that is none, a broken IPv6 address
        raise TransportError(f"{url}: {error}") from None


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
