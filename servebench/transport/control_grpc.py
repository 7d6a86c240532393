"""The control plane over gRPC: what a KServe v2 server says of itself and of a model. Not timed, so it is grpcio."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import grpc

from servebench.errors import TransportError
from servebench.protos import KSERVE, KSERVE_SERVICE
from servebench.transport.control import Discovery
from servebench.wire.kserve_grpc import metadata_of

_TIMEOUT_S = 15.0


def grpc_channel(url: str, ca_file: str | None) -> grpc.aio.Channel:
    """A channel of grpcio's to a ``grpc://`` or ``grpcs://`` address."""
    scheme, _, authority = url.partition("://")
    options = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]
    if scheme == "grpcs":
        roots = Path(ca_file).read_bytes() if ca_file else None
        return grpc.aio.secure_channel(authority.rstrip("/"), grpc.ssl_channel_credentials(roots), options=options)
    return grpc.aio.insecure_channel(authority.rstrip("/"), options=options)


async def call(channel: grpc.aio.Channel, method: str, message: bytes, metadata: Sequence[tuple[str, str]]) -> bytes:
    """One unary call with serialised messages. `grpc.aio.AioRpcError` for any status but OK."""
    reply: bytes = await channel.unary_unary(method)(
        message, metadata=[(name.lower(), value) for name, value in metadata], timeout=_TIMEOUT_S
    )
    return reply


async def discover_grpc(
    url: str, model: str, version: str | None, *, metadata: Sequence[tuple[str, str]], ca_file: str | None
) -> Discovery:
    """As `servebench.transport.control.discover`, over gRPC. ``config`` holds what we understand of it."""
    async with grpc_channel(url, ca_file) as channel:

        async def ask(name: str, request: Any, reply: Any) -> Any:
            return reply.FromString(await call(channel, f"/{KSERVE_SERVICE}/{name}", request.SerializeToString(), metadata))

        target = {"name": model, "version": version or ""}
        try:
            described = await ask("ModelMetadata", KSERVE.ModelMetadataRequest(**target), KSERVE.ModelMetadataResponse)
        except grpc.aio.AioRpcError as error:
            if error.code() in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                raise TransportError(f"{url}: cannot be reached: {error.details()}") from None
            listing = await _model_names(ask)
            raise TransportError(
                f"endpoint.model: {model!r} is not on the server at {url} ({error.code().name}: {error.details()})"
                f"{f'; it has: {listing}' if listing else ''}"
            ) from None
        config = server = None
        try:
            config = await ask("ModelConfig", KSERVE.ModelConfigRequest(**target), KSERVE.ModelConfigResponse)
            server = await ask("ServerMetadata", KSERVE.ServerMetadataRequest(), KSERVE.ServerMetadataResponse)
        except grpc.aio.AioRpcError:
            pass  # an extension of Triton's, and a courtesy: other servers may have neither
    about = {"name": server.name, "version": server.version, "extensions": list(server.extensions)} if server else {}
    known = None if config is None else {"name": config.config.name, "max_batch_size": config.config.max_batch_size}
    return Discovery(about, metadata_of(described, config), known)


async def _model_names(ask: Any) -> str:
    try:
        index = await ask("RepositoryIndex", KSERVE.RepositoryIndexRequest(), KSERVE.RepositoryIndexResponse)
    except grpc.aio.AioRpcError:
        return ""
    return ", ".join(sorted({one.name for one in index.models}))
