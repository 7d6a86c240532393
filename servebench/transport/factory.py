"""The transport that a worker's settings ask for."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from typing import Literal

from servebench.errors import TransportError
from servebench.transport.base import Sink, Transport
from servebench.transport.http import HttpTransport


@dataclass(frozen=True, slots=True)
class TransportSettings:
    """How to reach the server; travels as JSON."""

    client: Literal["wire", "aiohttp", "grpcio"]
    url: str
    target: str  #: gRPC's method path; HTTP requests carry theirs
    metadata: list[tuple[str, str]]  #: gRPC's; HTTP requests carry their headers
    max_connections: int | None
    channels: int
    timeout_ns: int
    ca_file: str | None
    verify_tls: bool


def make_transport(settings: TransportSettings, sink: Sink) -> Transport:
    """A transport, not open yet. `TransportError` names a missing extra."""
    timeout_s = settings.timeout_ns / 1e9
    tls = ssl_context(settings.ca_file, verify=settings.verify_tls)
    if settings.url.startswith("http"):
        if settings.client == "aiohttp":
            from servebench.transport.aiohttp_client import AiohttpTransport

            return AiohttpTransport(
                settings.url, sink, max_connections=settings.max_connections, ssl_context=tls, timeout_s=timeout_s
            )
        return HttpTransport(
            settings.url, sink, max_connections=settings.max_connections, ssl_context=tls, connect_timeout_s=timeout_s
        )
    try:
        if settings.client == "grpcio":
            from servebench.transport.grpcio_client import GrpcioTransport

            return GrpcioTransport(
                settings.url,
                sink,
                settings.target,
                [(name, value) for name, value in settings.metadata],
                channels=settings.channels,
                ca_file=settings.ca_file,
                timeout_ns=settings.timeout_ns,
            )
        from servebench.transport.grpc import GrpcTransport
        from servebench.wire.grpc import call_headers
    except ImportError as error:
        raise TransportError(f"{error}; install it with: pip install 'servebench[grpc]'") from None
    scheme, _, authority = settings.url.partition("://")
    block = call_headers(
        authority.rstrip("/"),
        settings.target,
        tls=scheme == "grpcs",
        timeout_ns=settings.timeout_ns,
        metadata=[(name, value) for name, value in settings.metadata],
    )
    return GrpcTransport(settings.url, sink, block, channels=settings.channels, ssl_context=tls, connect_timeout_s=timeout_s)


def ssl_context(ca_file: str | None, *, verify: bool) -> ssl.SSLContext:
    """TLS settings of a profile's endpoint."""
    context = ssl.create_default_context(cafile=ca_file)
    if not verify:
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
    return context
